"""Checkpoints survive a crash, a full disk and a flipped byte."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlsys.errors import CheckpointError
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.manifest import MANIFEST, render_manifest, verify_checkpoint

Content = dict[str, bytes]


def content(text: str) -> Content:
    return {
        "state.json": text.encode(),
        "learner/a.bin": b"a" + text.encode(),
        "learner/b.bin": b"b" + text.encode(),
    }


def small(text: str) -> Content:
    return {"state.json": text.encode(), "learner/a.bin": b"a" + text.encode()}


def write(temporary: Path, files: Content) -> None:
    for name, data in files.items():
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_bytes(data)


def save(store: CheckpointStore, name: str, version: int, files: Content) -> Path:
    temporary = store.begin(name)
    write(temporary, files)
    return store.commit(temporary, name, {"weight_version": version})


def stored(path: Path | None) -> Content:
    assert path is not None
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != MANIFEST
    }


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_last=1)


# --- commit, lookup, retention ---


def test_commit_and_latest(store: CheckpointStore) -> None:
    assert store.latest() is None
    path = save(store, "step-1", 1, content("one"))
    assert path == store.folder / "step-1"
    assert store.latest() == path
    assert stored(path) == content("one")
    assert verify_checkpoint(path) == {"weight_version": 1}
    manifest = json.loads((path / MANIFEST).read_text())
    # sha256 of b"one": from `printf one | sha256sum`
    assert manifest["files"][-1] == {
        "path": "state.json",
        "size": 3,
        "sha256": "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed",
    }
    assert [entry["path"] for entry in manifest["files"]] == ["learner/a.bin", "learner/b.bin", "state.json"]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_keeps_the_last_k_by_version_not_by_name(tmp_path: Path, keep_last: int) -> None:
    store = CheckpointStore(tmp_path, keep_last)
    for version in (2, 9, 10, 11):  # as text "10" < "9"
        save(store, f"step-{version}", version, content(str(version)))
    assert set(names(store)) == {f"step-{version}" for version in (2, 9, 10, 11)[-keep_last:]}
    assert store.latest() == tmp_path / "step-11"


def test_a_run_resumed_from_an_earlier_version_replaces_later_checkpoints(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    save(store, "step-10", 10, content("ten"))
    broken = save(store, "step-20", 20, content("twenty"))
    (broken / "state.json").unlink()
    assert store.latest() == tmp_path / "step-10"
    new = save(store, "step-15", 15, content("fifteen"))
    assert store.latest() == new
    assert names(store) == ["step-10", "step-15"]


def test_the_same_name_is_replaced(store: CheckpointStore) -> None:
    save(store, "step-1", 1, content("first attempt"))
    save(store, "step-1", 1, content("second attempt"))
    assert names(store) == ["step-1"]
    assert stored(store.latest()) == content("second attempt")


def test_sweep_removes_leftovers_only(store: CheckpointStore) -> None:
    kept = save(store, "step-1", 1, content("one"))
    write(store.begin("step-2"), content("two"))
    (store.folder / ".trash-step-0-x").mkdir()
    store.sweep()
    assert names(store) == ["step-1"]
    assert store.latest() == kept


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../a"])
def test_name_must_be_a_plain_folder(store: CheckpointStore, name: str) -> None:
    with pytest.raises(ValueError, match="plain folder name"):
        store.begin(name)


# --- crashes ---


def in_child(action: Callable[[], int]) -> int:
    """Return the exit code of `action` in a forked process."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = action()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_call(number: int, fault: Callable[[], None]) -> None:
    """Call `fault` at the number-th system call that opens or changes a file. Use it only in forked children.

    Python reports open, mkdir, rename, unlink and rmdir to audit hooks; fsync is wrapped.
    """
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            fault()

    def hook(event: str, _: object) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            count()

    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        count()
        real_fsync(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


def crash_during_save(store: CheckpointStore, number: int, name: str, version: int, files: Content) -> int:
    def child() -> int:
        at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        save(store, name, version, files)
        return 0

    return in_child(child)


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "version"), [("step-2", 2), ("step-1", 1)], ids=["next", "same-name"])
def test_crash_at_every_call(tmp_path: Path, name: str, version: int) -> None:
    """A SIGKILL before any call of a save leaves the previous checkpoint or the new one."""
    old, new = small("old"), small("new")
    seen = []
    code = -signal.SIGKILL
    while code:
        store = CheckpointStore(tmp_path / str(len(seen)), keep_last=1)
        save(store, "step-1", 1, old)
        code = crash_during_save(store, len(seen) + 1, name, version, new)
        assert code in (0, -signal.SIGKILL)
        latest = stored(store.latest())
        assert latest in (old, new)
        seen.append(latest == new)
        store.sweep()
        assert stored(store.latest()) == latest
        assert not [entry for entry in names(store) if entry.startswith(".")]
    # mkdir of 2 folders; open (write, hash, fsync) and fsync of 2 files: 8; fsync of 2 folders: 4; manifest: 3;
    # fsync of the top folder: 2; at least 1 rename; fsync of the parent: 2; then the removal of the old checkpoint
    assert len(seen) > 22
    assert seen == sorted(seen), "once the new checkpoint is visible, it stays visible"
    assert not seen[0]
    assert seen[-2], "the last calls remove the old checkpoint"


def commit_on_a_full_disk(store: CheckpointStore, number: int) -> str:
    """Return the outcome of a commit whose number-th call raises ENOSPC: refused, unharmed or not reached."""
    outcomes = ["not reached", "unharmed", "refused", "another error"]

    def child() -> int:
        reached = []

        def full() -> None:
            reached.append(number)
            raise OSError(errno.ENOSPC, "No space left on device")

        temporary = store.begin("step-2")
        write(temporary, small("new"))
        at_call(number, full)
        try:
            store.commit(temporary, "step-2", {"weight_version": 2})
        except CheckpointError as error:
            return 2 if "step-2 could not be written: [Errno 28]" in error.message else 3
        return 1 if reached else 0

    return outcomes[in_child(child)]


@pytest.mark.heavy
def test_disk_full_at_every_call(tmp_path: Path) -> None:
    """An error before the rename leaves only the old checkpoint. After the rename, the new checkpoint stays."""
    outcomes = []
    while "not reached" not in outcomes:
        store = CheckpointStore(tmp_path / str(len(outcomes)), keep_last=1)
        save(store, "step-1", 1, small("old"))
        outcomes.append(commit_on_a_full_disk(store, len(outcomes) + 1))
        assert not [name for name in names(store) if name.startswith(".tmp-")]
        if outcomes[-1] == "refused":
            assert stored(store.folder / "step-1") == small("old")
            verify_checkpoint(store.folder / "step-1")
        else:
            assert stored(store.latest()) == small("new")
    assert outcomes.count("refused") > 10
    assert set(outcomes) == {"refused", "unharmed", "not reached"}


def test_begin_names_the_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"step-1 could not be written.*Not a directory"):
        CheckpointStore(tmp_path / "file" / "checkpoints", 1).begin("step-1")


def test_order_of_sync_and_rename(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data are flushed before the manifest, all files before the rename, and the parent folder after it."""
    save(store, "step-1", 1, content("old"))
    calls: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        calls.append("sync " + os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), store.folder))
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        calls.append(f"rename {source.name} {target.name.partition('-')[0]}")
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    temporary = store.begin("step-2")
    write(temporary, content("new"))
    store.commit(temporary, "step-2", {"weight_version": 2})

    t = temporary.name
    data = {f"sync {t}/{name}" for name in content("new")}
    assert set(calls[:3]) == data
    assert calls[3:] == [
        f"sync {t}/learner",
        f"sync {t}",
        f"sync {t}/{MANIFEST}",
        f"sync {t}",
        f"rename {t} step",
        "sync .",
        "rename step-1 .trash",
    ]


# --- corruption ---


def flip(file: Path, position: int, mask: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= mask
    file.write_bytes(bytes(data))


def swap(first: Path, second: Path) -> None:
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


CORRUPTIONS: dict[str, Callable[[Path], object]] = {
    "flipped": lambda file: flip(file, 0),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "emptied": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "deleted": lambda file: file.unlink(),
    "renamed": lambda file: file.rename(file.with_name(file.name + "~")),
    "linked": lambda file: file.rename(file.parent.parent / "aside") and file.symlink_to("../aside"),
}


@pytest.mark.parametrize("way", CORRUPTIONS)
@pytest.mark.parametrize("name", ["learner/a.bin", "learner/b.bin", "state.json", MANIFEST])
def test_a_corrupted_checkpoint_is_skipped_for_the_previous_one(
    tmp_path: Path, name: str, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    previous = save(store, "step-1", 1, content("one"))
    newest = save(store, "step-2", 2, content("two"))
    CORRUPTIONS[way](newest / name)
    with caplog.at_level(logging.WARNING):
        assert store.latest() == previous
    assert name in caplog.text
    with pytest.raises(CheckpointError):
        verify_checkpoint(newest)


def test_swapped_and_added_files_are_detected(store: CheckpointStore) -> None:
    path = save(store, "step-1", 1, content("one"))
    swap(path / "learner/a.bin", path / "learner/b.bin")
    with pytest.raises(CheckpointError, match=r"a\.bin: expected sha256"):
        verify_checkpoint(path)
    swap(path / "learner/a.bin", path / "learner/b.bin")
    verify_checkpoint(path)
    (path / "learner/c.bin").write_bytes(b"c")
    with pytest.raises(CheckpointError, match=r"learner/c\.bin is not in the manifest"):
        verify_checkpoint(path)


def test_a_flip_in_every_byte_of_the_manifest_is_detected(store: CheckpointStore) -> None:
    path = save(store, "step-1", 1, {"state.json": b"one"})
    for position in range((path / MANIFEST).stat().st_size):
        mask = (0x01, 0x20)[position % 2]  # 0x20 changes the case of a letter, which a lenient comparison would accept
        flip(path / MANIFEST, position, mask)
        with pytest.raises(CheckpointError):
            verify_checkpoint(path)
        flip(path / MANIFEST, position, mask)
    verify_checkpoint(path)


def test_without_a_valid_checkpoint_latest_is_an_error(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for version in (1, 2):
        save(store, f"step-{version}", version, content("x"))
        flip(tmp_path / f"step-{version}" / "state.json", 0)
    with pytest.raises(CheckpointError, match=f"none of the 2 checkpoints is valid.*delete {tmp_path}"):
        store.latest()


@pytest.mark.parametrize("evil", ["../outside", "/etc/hostname", "learner/../../outside"])
def test_a_manifest_that_leads_out_is_refused(store: CheckpointStore, evil: str) -> None:
    path = save(store, "step-1", 1, content("one"))
    (path.parent / "outside").write_bytes(b"one")
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["sha256"]
    manifest["files"][-1]["path"] = evil
    (path / MANIFEST).write_text(render_manifest(manifest))
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        verify_checkpoint(path)


@pytest.mark.parametrize("how", ["link", "manifest"])
def test_a_link_or_a_manifest_of_a_writer_is_refused(store: CheckpointStore, how: str) -> None:
    temporary = store.begin("step-1")
    if how == "link":
        (temporary / "link").symlink_to("/etc/hostname")
    else:
        (temporary / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match=r"link|writer made MANIFEST"):
        store.commit(temporary, "step-1", {"weight_version": 1})
    assert names(store) == []
