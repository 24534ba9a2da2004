"""A SIGKILL at every libc call that writes a checkpoint, and every way to damage a checkpoint."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_child import save

from rlsys.errors import CheckpointError
from rlsys.files import read_json, write_json
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.manifest import MANIFEST, verify_checkpoint

HERE = Path(__file__).parent
Saver = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def saver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saver]:
    """Return a function that runs a job of checkpoint_child.py in a fork, killed before or halfway through a call."""
    library = tmp_path_factory.mktemp("library") / "kill_at_call.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, HERE / "kill_at_call.c", "-ldl"], check=True)
    process = subprocess.Popen(
        [sys.executable, str(HERE / "checkpoint_child.py"), str(library)],
        env={**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(HERE.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(path: Path, kill_at: int = 0, half: bool = False, **job: Any) -> dict[str, Any]:
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps({"path": str(path), "kill_at": kill_at, "half": half, **job}) + "\n")
        process.stdin.flush()
        outcome: dict[str, Any] = json.loads(process.stdout.readline())
        return outcome

    try:
        yield run
    finally:
        process.kill()
        process.wait()


def digests(path: Path | None) -> dict[str, str]:
    """Return the sha256 of every file of a checkpoint, which must be valid."""
    assert path is not None
    verify_checkpoint(path)
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.rglob("*")
        if file.is_file() and file.name != MANIFEST
    }


def names(store: CheckpointStore) -> set[str]:
    return {path.name for path in store.folder.iterdir()}


# Earlier checkpoints (name: version), keep_last, name and version of the new checkpoint, and the names afterwards.
Before = dict[str, int]
CASES: dict[str, tuple[Before, int, str, int, set[str]]] = {
    "the one before is pruned": ({"a": 1}, 1, "b", 2, {"b"}),
    "the oldest of three is pruned": ({"a": 1, "b": 2}, 2, "c", 3, {"b", "c"}),
    "one of the same name is replaced": ({"a": 1}, 1, "a", 1, {"a"}),
    "a damaged one of the same name is replaced": ({"a": 1, "damaged": 2}, 2, "damaged", 2, {"a", "damaged"}),
}


def earlier(folder: Path, before: Before, keep_last: int) -> CheckpointStore:
    store = CheckpointStore(folder, keep_last)
    for name, version in before.items():
        path = save(store, name, version, f"old {name}")
        if name == "damaged":
            (path / "state.json").write_text("{}")
    return store


@pytest.mark.parametrize("half", [False, True], ids=["before", "half-way"])
@pytest.mark.parametrize("case", CASES)
def test_a_kill_at_every_call_leaves_the_previous_or_the_new_one(
    saver: Saver, tmp_path: Path, case: str, half: bool
) -> None:
    # Every call of every case is killed in tests/integration/test_checkpoint_rows.py.
    every = 1 if case == "the one before is pruned" else 3
    assert kill_at_every_call(saver, tmp_path, case, half, every) >= (6 if half else 40) // every


def kill_at_every_call(saver: Saver, folder: Path, case: str, half: bool, every: int = 1) -> int:
    """Kill a save at every call, then check what `latest` returns and that the next save works.

    Args:
        half: send SIGKILL after half of a write, instead of before a call.
        every: 3 takes every third call, and the first and the last.
    Returns:
        The number of kills.
    """
    before, keep_last, name, version, after = CASES[case]
    job = {"action": "save", "name": name, "version": version, "text": "new", "keep_last": keep_last}
    store = earlier(folder / "whole", before, keep_last)
    old, calls = digests(store.latest()), saver(store.folder, **job)["calls"]
    new = digests(store.latest())
    assert new != old and names(store) == after
    new_is_visible = []
    moments = [(number, call) for number, call in enumerate(calls, start=1) if not half or call.startswith("write")]
    for number, call in [*moments[:-1:every], moments[-1]]:
        store = earlier(folder / str(number), before, keep_last)
        outcome = saver(store.folder, number, half, **job)
        assert outcome["code"] == -signal.SIGKILL, call
        latest = digests(store.latest())
        assert latest in (old, new), call
        new_is_visible.append(latest == new)
        store.sweep()
        assert digests(store.latest()) == latest
        save(store, "next", 9, "next")
        assert digests(store.latest())["state.json"] not in (old["state.json"], new["state.json"])
        assert len(names(store)) == keep_last and not any(name.startswith(".") for name in names(store)), call
        shutil.rmtree(store.folder)
    assert new_is_visible == sorted(new_is_visible), "once the new checkpoint is visible, it stays visible"
    assert not new_is_visible[0] and (half or new_is_visible[-1]), "from the first write to the last removal"
    return len(new_is_visible)


def test_a_kill_at_every_call_of_the_removal_of_leftovers(saver: Saver, tmp_path: Path) -> None:
    def leftovers(folder: Path) -> CheckpointStore:
        store = earlier(folder, {"a": 1}, 1)
        (store.begin("b") / "part").write_text("x")
        shutil.copytree(store.folder / "a", store.folder / ".trash-c")
        return store

    store = leftovers(tmp_path / "whole")
    calls = saver(store.folder, action="sweep", keep_last=1)["calls"]
    assert names(store) == {"a"} and len(calls) > 6
    for number in range(1, len(calls) + 1):
        store = leftovers(tmp_path / str(number))
        good = digests(store.latest())
        assert saver(store.folder, number, action="sweep", keep_last=1)["code"] == -signal.SIGKILL
        assert digests(store.latest()) == good
        store.sweep()
        assert names(store) == {"a"} and digests(store.latest()) == good


@pytest.mark.parametrize("half", [False, True], ids=["before", "half-way"])
def test_a_kill_at_every_call_leaves_a_json_file_old_or_new(saver: Saver, tmp_path: Path, half: bool) -> None:
    path = tmp_path / "state.json"
    write_json(path, "old")
    calls = saver(tmp_path / "other.json", action="write", value="new")["calls"]
    values = []
    for number in range(1, len(calls) + 1):
        outcome = saver(path, number, half, action="write", value="new")
        assert outcome["code"] == -signal.SIGKILL
        values.append(read_json(path))
    assert values == sorted(values, reverse=True) and set(values) == {"old", "new"}


# --- power cuts: the order of flushes and renames ---


def test_everything_is_on_disk_before_the_rename_and_the_rename_before_a_removal(saver: Saver, tmp_path: Path) -> None:
    store = earlier(tmp_path / "checkpoints", {"a": 1}, 1)
    job = {"action": "save", "name": "b", "version": 2, "text": "new", "keep_last": 1}
    calls = saver(store.folder, **job)["calls"]
    temporary, new = Path(calls[0].removeprefix("mkdir ").strip()), store.folder / "b"
    assert temporary.name.startswith(".tmp-b-")

    def at(*wanted: str) -> list[int]:
        return [number for number, call in enumerate(calls) if call.startswith(wanted)]

    [renamed], [parent] = at(f"rename {new}"), at(f"fsync {store.folder}\n")
    manifest = at(f"write {temporary / MANIFEST}")
    data = [number for number in at(f"write {temporary}/") if number not in manifest]
    assert len(data) >= 6 and max(data) < min(manifest), "the manifest comes last"
    for path in [new, *new.rglob("*")]:
        there = temporary / path.relative_to(new)
        if path.is_dir():
            changed = [n for n, call in enumerate(calls) if _changed_folder(call) == str(there)]
        else:
            changed = manifest if path.name == MANIFEST else data
        assert max(changed) < max(at(f"fsync {there}\n")) < renamed, path
    assert renamed < parent < min(at(f"rename {store.folder / '.trash-a'}", "unlink", "rmdir"))


def _changed_folder(call: str) -> str:
    """Return the folder whose entries a call changes."""
    kind, path = call.split(" ", 1)
    return str(Path(path.strip()).parent) if kind in ("open", "mkdir", "rename") else ""


def test_a_json_file_is_on_disk_before_its_rename(saver: Saver, tmp_path: Path) -> None:
    calls = [call.split() for call in saver(tmp_path / "state.json", action="write", value="new")["calls"]]
    assert [kind for kind, _ in calls] == ["open", "write", "fsync", "rename", "fsync"]
    assert calls[0][1] == calls[1][1] == calls[2][1] != str(tmp_path / "state.json")
    assert [path for _, path in calls[3:]] == [str(tmp_path / "state.json"), str(tmp_path)]


# --- damage ---


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Return a store with a valid checkpoint `old` and a newer one `new`."""
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    for name, version in (("old", 1), ("new", 2)):
        temporary = store.begin(name)
        (temporary / "learner").mkdir()
        for file in ("state.json", "learner/a.bin", "learner/b.bin"):
            (temporary / file).write_text(f"{file} of {name}")
        store.commit(temporary, name, {"weight_version": version})
    return store


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damaged(path: Path) -> str:
    """Return the error message for a damaged checkpoint."""
    with pytest.raises(CheckpointError) as caught:
        verify_checkpoint(path)
    assert str(path) in caught.value.message
    return caught.value.message


def assert_skipped(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    """Assert that `latest` skips the damaged checkpoint `new` with a warning and returns `old`."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert store.latest() == store.folder / "old"
    assert [record.getMessage() for record in caplog.records] == [
        f"checkpoint skipped: {damaged(store.folder / 'new')}"
    ]


def flipped(data: bytes) -> Iterator[bytes]:
    """Yield the data with each bit flipped, one at a time."""
    for position, bit in itertools.product(range(len(data)), range(8)):
        yield data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def truncated(data: bytes) -> Iterator[bytes]:
    """Yield every shorter prefix of the data."""
    return (data[:size] for size in range(len(data)))


@pytest.mark.parametrize("way", [flipped, truncated])
def test_every_flipped_bit_and_every_truncation_is_detected(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, way: Callable[[bytes], Iterator[bytes]]
) -> None:
    assert damage_every_file(store, caplog, way) > 500


def damage_every_file(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, way: Callable[[bytes], Iterator[bytes]]
) -> int:
    """Damage every file of the newest checkpoint and assert that it is detected. Return the number of damages."""
    times = 0
    for file in files(store.folder / "new"):
        data = file.read_bytes()
        for content in way(data):
            file.write_bytes(content)
            assert file.name in damaged(store.folder / "new"), (file, content)
            times += 1
        assert_skipped(store, caplog)
        file.write_bytes(data)
    assert store.latest() == store.folder / "new"
    return times


def test_every_deleted_and_every_added_file_is_detected(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    new = store.folder / "new"
    for file in files(new):
        data = file.read_bytes()
        file.unlink()
        assert file.name in damaged(new)
        assert_skipped(store, caplog)
        file.write_bytes(data)
    for folder in (new, new / "learner", new / "more"):
        folder.mkdir(exist_ok=True)
        for content in (b"", b"x"):
            (folder / "added").write_bytes(content)
            assert "added is not in the manifest" in damaged(new)
            assert_skipped(store, caplog)
        (folder / "added").unlink()
    shutil.rmtree(new / "learner")
    assert "learner/a.bin is missing" in damaged(new)
    assert_skipped(store, caplog)


def test_every_swap_of_two_files_is_detected(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    assert swap_every_two_files(store, caplog) == 10


def swap_every_two_files(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> int:
    """Swap pairs of files, within the newest checkpoint or with the previous one, and assert that it is detected.

    Returns:
        The number of swaps.
    """
    old, new = store.folder / "old", store.folder / "new"
    pairs = list(itertools.combinations(files(new), 2)) + list(zip(files(old), files(new), strict=True))
    for one, other in pairs:
        swap(one, other)
        if one.is_relative_to(new):
            assert_skipped(store, caplog)
        else:
            damaged(old)
            damaged(new)
        swap(one, other)
    assert store.latest() == new
    return len(pairs)


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def test_checkpoints_of_each_others_names_keep_their_order(store: CheckpointStore) -> None:
    """The manifest, not the name of the folder, decides which checkpoint is newer."""
    for name, other in (("old", "aside"), ("new", "old"), ("aside", "new")):
        (store.folder / name).rename(store.folder / other)
    assert read_json(store.latest() / MANIFEST)["info"]["weight_version"] == 2


@pytest.mark.parametrize("file", ["state.json", "learner/a.bin", MANIFEST])
def test_a_run_without_a_valid_checkpoint_does_not_start_from_scratch(store: CheckpointStore, file: str) -> None:
    for name in ("old", "new"):
        (store.folder / name / file).write_text("{}")
    with pytest.raises(CheckpointError) as caught:
        store.latest()
    message = caught.value.message
    assert message.startswith(f"{store.folder}: none of the 2 checkpoints is valid (")
    assert any(str(store.folder / name / file) in message for name in ("old", "new"))
    assert message.endswith(f"; restore one, or delete {store.folder} to start again from scratch")
    assert names(store) == {"old", "new"}, "nothing is removed"
