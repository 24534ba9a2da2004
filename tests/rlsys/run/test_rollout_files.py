"""The files of kept rollouts: exact resumes, cut and damaged files, full disks."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path

import pytest
from fakes import group, prompt
from viewed_run import step_record

from rlsys.errors import DamagedFileError
from rlsys.run.rollout_files import RolloutLog, read_members, read_rollouts, rollout_files

GROUPS = [group(prompt(f"train-{number}")) for number in range(3)]


def write(folder: Path, versions: range, resume: int = -1) -> list[str]:
    """Write the records of some weight versions after a resume; the messages."""
    said: list[str] = []
    log = RolloutLog(folder, resume, 2, str, said.append)
    for version in versions:
        log.write(version, step_record(log, GROUPS, version, version))
        log.sync()
    log.close()
    return said


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for _, path in rollout_files(folder / "rollouts")}


def test_rows_come_back_by_weight_version(tmp_path: Path) -> None:
    assert write(tmp_path, range(98, 103)) == []
    assert sorted(contents(tmp_path)) == ["000000.jsonl.gz", "000100.jsonl.gz"]
    assert list(read_rollouts(tmp_path, 0)) == [98, 99] and list(read_rollouts(tmp_path, 100)) == [100, 101, 102]
    assert read_rollouts(tmp_path, 200) == {}
    rows = read_rollouts(tmp_path, 0)[98]
    assert [row["sample"] for row in rows] == [0, 1, 0, 1] and {row["step"] for row in rows} == {98}
    lines = gzip.decompress(contents(tmp_path)["000000.jsonl.gz"]).splitlines()
    assert [json.loads(line)["version"] for line in lines] == [98] * 4 + [99] * 4, "any reader of gzip reads all steps"


@pytest.mark.parametrize("resume", [-1, 90, 98, 99, 100, 101, 102])
def test_a_resumed_run_leaves_the_same_bytes(resume: int, tmp_path: Path) -> None:
    write(tmp_path / "whole", range(95, 105))
    write(tmp_path / "resumed", range(95, 103))
    write(tmp_path / "resumed", range(max(95, resume + 1), 105), resume)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 9, 60])
def test_a_record_that_a_kill_cut_short_is_left_out_and_replaced(cut: int, tmp_path: Path) -> None:
    write(tmp_path / "whole", range(1, 4))
    write(tmp_path, range(1, 4))
    path = tmp_path / "rollouts" / "000000.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(read_rollouts(tmp_path, 0)) == [1, 2]
    assert write(tmp_path, range(3, 4), resume=2) == []
    assert contents(tmp_path) == contents(tmp_path / "whole")


def test_damaged_data_is_named_and_set_aside_by_a_resume(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "rollouts" / "000000.jsonl.gz"
    path.write_bytes(b"rubbish")
    with pytest.raises(DamagedFileError, match=r"000000\.jsonl\.gz: expected rollouts, found damaged data"):
        list(read_members(path))
    said = write(tmp_path, range(4, 5), resume=3)
    assert len(said) == 1 and "renamed to 000000.jsonl.gz.damaged" in said[0]
    assert path.with_name("000000.jsonl.gz.damaged").read_bytes() == b"rubbish"
    assert list(read_rollouts(tmp_path, 0)) == [4]


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "000000.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"format": 3}\n'))
    with pytest.raises(DamagedFileError, match=r"expected rollouts of format 2 or older, found \[3\]"):
        list(read_members(path))


def test_a_run_goes_on_from_rollouts_of_the_older_format(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    path = tmp_path / "rollouts" / "000000.jsonl.gz"
    new = {"advantages", "gaps", "untrained"}
    members = []
    for _, rows in read_members(path):
        old = [{key: value for key, value in row.items() if key not in new} | {"format": 1} for row in rows]
        members.append(gzip.compress("".join(json.dumps(row) + "\n" for row in old).encode()))
    path.write_bytes(b"".join(members))
    assert write(tmp_path, range(3, 4), resume=2) == []
    rows = read_rollouts(tmp_path, 0)
    assert [rows[version][0]["format"] for version in rows] == [1, 1, 2]
    assert "gaps" not in rows[2][0] and rows[3][0]["untrained"] == ""


def test_a_full_disk_ends_nothing_and_the_records_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    log = RolloutLog(tmp_path, -1, 2, str, said.append)
    log.write(1, step_record(log, GROUPS, 1, 1))
    real = os.pwrite

    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    log.write(2, step_record(log, GROUPS, 2, 2))
    log.sync()
    monkeypatch.setattr(os, "pwrite", real)
    log.write(3, step_record(log, GROUPS, 3, 3))
    log.close()
    assert list(read_rollouts(tmp_path, 0)) == [1, 2, 3]
    assert any("No space left" in text for text in said)


def test_a_disk_that_is_full_at_the_start_loses_no_kept_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, range(1, 4))
    real = os.fsync

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    log = RolloutLog(tmp_path, 3, 2, str)
    log.write(4, step_record(log, GROUPS, 4, 4))
    monkeypatch.setattr(os, "fsync", real)
    log.write(5, step_record(log, GROUPS, 5, 5))
    log.close()
    assert list(read_rollouts(tmp_path, 0)) == [1, 2, 3, 5], "step 4 found no file, and the others stay"


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "rollouts").write_text("a file")
    said = write(tmp_path, range(1, 4))
    assert len(said) == 1 and said[0].startswith("rollouts are not kept, training goes on")


def test_a_tokenizer_that_fails_ends_nothing(tmp_path: Path) -> None:
    def broken(_ids: object) -> str:
        raise RuntimeError("cannot decode")

    said: list[str] = []
    log = RolloutLog(tmp_path, -1, 2, broken, said.append)
    log.write(1, step_record(log, GROUPS, 1, 1))
    log.close()
    assert said == ["rollouts are not kept, training goes on: cannot decode"] and contents(tmp_path) == {}
