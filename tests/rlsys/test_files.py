"""Files are written whole: records in order, and on disk before the checkpoint that needs them."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_runs import Run, config

from rlsys import files as files_module
from rlsys.errors import CheckpointError
from rlsys.files import RecordFile, json_record, read_json, read_records, resume_records, write_json
from rlsys.run.ledger import read_ledger
from rlsys.run.metrics import read_rows

RECORDS = [f"{number:09d}\n".encode() for number in range(9)]


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Limit every file of the process to `size` bytes. Keep the block short: the limit includes the files of pytest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_records_that_fsync_refuses_are_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems allocate space late: the write succeeds, fsync fails, and the lines are lost."""
    path, full = tmp_path / "lines", [True]
    file = RecordFile(path, lambda said: None, RECORDS[:2])
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if full.pop() if full else False:
            os.truncate(path, 20)
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    file.write(RECORDS[2])
    with pytest.raises(CheckpointError, match="quota exceeded"):
        file.sync()
    file.write(RECORDS[3])
    file.sync()
    assert path.read_bytes() == b"".join(RECORDS[:4])
    file.close()


@pytest.mark.parametrize("size", [20, 24, 0])
def test_records_that_do_not_fit_wait_and_overwrite_a_partial_record(size: int, tmp_path: Path) -> None:
    path, said = tmp_path / "folder" / "lines", list[str]()
    file = RecordFile(path, said.append, RECORDS[:2])
    with small_disk(size):
        for number in (2, 3, 4):
            file.write(RECORDS[number])
            assert path.read_bytes() == b"".join(RECORDS[:3])[: max(20, size)]
            assert len(said) == 1, "one message, however many lines wait"
        with pytest.raises(CheckpointError, match=rf"^{path} could not be written: .*large; free disk space"):
            file.sync()
    assert said[0].startswith(f"NOT WRITTEN, training goes on: {path}: ")
    file.write(RECORDS[5])
    assert path.read_bytes() == b"".join(RECORDS[:6])
    with small_disk(60):
        file.write(RECORDS[6])
    assert len(said) == 2
    file.sync()
    assert path.read_bytes() == b"".join(RECORDS[:7])
    file.write(RECORDS[7])
    file.close()
    assert path.read_bytes() == b"".join(RECORDS[:8])
    assert [each.name for each in path.parent.iterdir()] == ["lines"]


def test_records_that_still_wait_at_the_end_are_reported_as_lost(tmp_path: Path) -> None:
    said: list[str] = []
    file = RecordFile(tmp_path / "lines", said.append)
    with small_disk(5):
        file.write(RECORDS[0])
        file.write(RECORDS[1])
        file.close()
    assert said[1].startswith(f"{tmp_path / 'lines'}: its last 2 lines are lost: ")


def test_a_file_that_cannot_be_created_is_named_and_the_old_one_stays(tmp_path: Path) -> None:
    RecordFile(tmp_path / "lines", print, RECORDS[:1]).close()
    with pytest.raises(CheckpointError, match="lines could not be written: .*large"), small_disk(5):
        RecordFile(tmp_path / "lines", print, RECORDS)
    assert (tmp_path / "lines").read_bytes() == RECORDS[0]


def test_write_json_replaces_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert read_json(path) == {"a": 2}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"state\.json: could not be written: .*No space left"):
        write_json(path, {"a": 3})
    assert read_json(path) == {"a": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("text", [None, "{", b"\xff"])
def test_read_json_names_the_file(tmp_path: Path, text: str | bytes | None) -> None:
    path = tmp_path / "state.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"state\.json: cannot be read"):
        read_json(path)


def has_number(record: Any) -> bool:
    return record["number"] > 0


def test_records_are_read_up_to_a_line_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_records(path, has_number, "a number") == []
    path.write_bytes(json_record({"number": 1}) + json_record({"number": 2}) + b'{"number": 3')
    assert read_records(path, has_number, "a number") == [{"number": 1}, {"number": 2}]


@pytest.mark.parametrize("rest", [b"\x89PNG\r", b"\xff\xfe", b"nonsense", b"\0\0a"])
def test_a_last_line_that_begins_as_no_record_is_named(rest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for whole in (b"", json_record({"number": 1})):
        path.write_bytes(whole + rest)
        with pytest.raises(
            CheckpointError, match=rf"lines\.jsonl:{1 + bool(whole)}: expected a number; restore the file$"
        ):
            read_records(path, has_number, "a number; restore the file")
    path.write_bytes(json_record({"number": 1}) + bytes(7))  # after a power cut
    assert read_records(path, has_number, "a number") == [{"number": 1}]


@pytest.mark.parametrize("line", ["[]", "5", "{}", "nonsense", '{"number": 0}'])
def test_a_line_that_is_not_a_valid_record_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(json_record({"number": 1}) + line.encode() + b"\n")
    with pytest.raises(CheckpointError, match=r"lines\.jsonl:2: expected a number; restore the file$"):
        read_records(path, has_number, "a number; restore the file")


def test_records_of_later_versions_are_removed_when_a_file_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    records = [{"version": version} for version in (1, 2, 3)]
    remaining, file = resume_records(path, records, print, version_key="version", last_version=2)
    assert remaining == records[:2]
    file.write(json_record({"version": 4}))
    file.close()
    assert path.read_text() == '{"version": 1}\n{"version": 2}\n{"version": 4}\n'


# --- in a run ---

FILES = ("metrics.jsonl", "ledger.jsonl", "events.out.tfevents.0000000000")


def full_disk(run: Run, versions: set[int], names: tuple[str, ...], patch: pytest.MonkeyPatch) -> None:
    """Let only half of a line fit, in files with these names, in the steps that make these versions."""
    pwrite = os.pwrite

    def write(descriptor: int, data: Any, offset: int) -> int:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        if run.learner.version not in versions or name not in names:
            return pwrite(descriptor, data, offset)
        if len(data) > 40:
            return pwrite(descriptor, data[:40], offset)
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(files_module.os, "pwrite", write)


def steps(count: int, **checkpoint: Any) -> Any:
    return config(stages=["online"], train={"max_steps": count}, checkpoint={"interval": 1, **checkpoint})


@pytest.mark.parametrize("names", [(name,) for name in FILES] + [FILES])
def test_a_disk_that_is_full_for_some_time_loses_no_line(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, steps(5))
    full_disk(run, {2, 3}, names, monkeypatch)
    before: list[list[str]] = []
    run.learner.on_train = lambda version: before.append(list(run.saved())) if version == 4 else None
    run()
    events_alone = names == FILES[2:]
    failed = 0 if events_alone else 2
    saved = [f"step_{version:06d}" for version in range(1, 6) if events_alone or version not in (2, 3)]
    assert list(run.saved()) == saved and before == [saved[: 3 - failed]]
    assert [line["version"] for line in read_ledger(tmp_path / "ledger.jsonl")] == [1, 2, 3, 4, 5]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5] and rows[-1]["process/failed_saves"] == failed
    whole = Run(tmp_path / "whole", steps(5))()
    events = [len((each.run_dir / "tensorboard" / FILES[2]).read_bytes()) for each in (run, whole)]
    assert events[0] == events[1]


@pytest.mark.parametrize("name", FILES[:2])
def test_lines_that_wait_for_too_long_or_to_the_end_of_a_stage_end_the_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "a", steps(9, max_failed_saves=1))
    full_disk(run, {2, 3, 4}, (name,), monkeypatch)
    with pytest.raises(CheckpointError, match=rf"2 saves in a row .*: .*{name} could not be written: .*No space left"):
        run()
    assert run.only("train")[-1] == ("train", 3) and list(run.saved()) == ["step_000001"]
    monkeypatch.undo()
    ended = Run(tmp_path / "b", steps(3))
    full_disk(ended, {3}, (name,), monkeypatch)
    with pytest.raises(CheckpointError, match=f"{name} could not be written: .*No space left.*; free disk space"):
        ended()
    monkeypatch.undo()
    for folder, last in (("a", 9), ("b", 3)):  # the lost steps are made again
        again = Run(tmp_path / folder, steps(last))()
        assert [line["version"] for line in read_ledger(again.run_dir / "ledger.jsonl")] == list(range(1, last + 1))


def test_the_lines_of_a_checkpoint_are_on_disk_before_it_is_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []

    def noted(name: str, path: Any) -> None:
        real = getattr(os, name)

        def call(first: Any, *rest: Any) -> Any:
            calls.append((name, path(first, *rest)))
            return real(first, *rest)

        monkeypatch.setattr(os, name, call)

    for name in ("pwrite", "fsync"):
        noted(name, lambda descriptor, *_rest: Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
    noted("rename", lambda _source, target: target.name)
    Run(tmp_path, steps(3))()
    for version in (1, 2, 3):
        before = calls[: calls.index(("rename", f"step_{version:06d}"))]
        for file in FILES[:2]:
            lines = [number for number, call in enumerate(before) if call == ("pwrite", file)]
            assert len(lines) == version + (file == FILES[0]), "one line for each step, and a row for the start"
            assert ("fsync", file) in before[lines[-1] :]
        events = [number for number, call in enumerate(before) if call == ("pwrite", FILES[2])]
        assert ("fsync", FILES[2]) in before[events[-1] :], "unflushed events stay in memory"
