"""The next attempt removes the leftovers of a killed one, and nothing that belongs to another run."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlsys.launch import ray_cluster as cluster
from rlsys.run.checkpoints import CheckpointStore


@pytest.fixture
def scratch() -> Iterator[list[Path]]:
    """Make two folders named like scratch folders: one of a dead attempt, one of another running command."""
    folders = [Path(f"/tmp/rl-{uuid.uuid4().hex[:8]}") for _ in range(2)]
    for folder in folders:
        (folder / "tmp").mkdir(parents=True)
        (folder / "tmp" / "socket").write_text("")
    yield folders
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def test_only_the_scratch_folder_of_the_dead_attempt_is_removed(scratch: list[Path], tmp_path: Path) -> None:
    dead, alive = scratch
    (tmp_path / cluster.TEMPORARY_NOTE).write_text(str(dead))
    (tmp_path / f"{cluster.RENDEZVOUS}0").write_text("")
    (tmp_path / "metrics.jsonl").write_text("")
    own = cluster._temporary_folder(tmp_path)
    try:
        assert not dead.exists() and (alive / "tmp" / "socket").exists() and own.is_dir()
        assert (tmp_path / cluster.TEMPORARY_NOTE).read_text() == f"{own}\n"
        assert {path.name for path in tmp_path.iterdir()} == {cluster.TEMPORARY_NOTE, "metrics.jsonl"}
    finally:
        cluster.remove_leftovers(tmp_path)
    assert not own.exists() and (alive / "tmp" / "socket").exists()


def test_a_scratch_folder_that_cannot_be_removed_yet_stays_in_the_note(
    scratch: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, other = scratch
    note = tmp_path / cluster.TEMPORARY_NOTE
    note.write_text(f"{busy}\n{other}\n")
    with monkeypatch.context() as patch:
        rmtree = shutil.rmtree
        patch.setattr(shutil, "rmtree", lambda path, **options: path == str(busy) or rmtree(path, **options))
        own = cluster._temporary_folder(tmp_path)
    assert busy.exists() and not other.exists()
    assert note.read_text() == f"{busy}\n{other}\n{own}\n"
    cluster.remove_leftovers(tmp_path)
    assert not busy.exists() and not own.exists() and not note.exists()


@pytest.mark.parametrize("note", ["{tmp}/precious", "/tmp/rl-0123456g", "/tmp/rl-01234567/../{name}", "{tmp}", "/", ""])
def test_a_note_of_any_other_path_removes_nothing(tmp_path: Path, note: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / cluster.TEMPORARY_NOTE).write_text(note.format(tmp=tmp_path, name=tmp_path.name))
    cluster.remove_leftovers(run)
    assert precious.is_dir() and not (run / cluster.TEMPORARY_NOTE).exists()


def test_the_sweep_of_checkpoints_removes_only_unfinished_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
    for name in (".tmp-step_000001-a", ".trash-step_000001-b", ".snapshot", "notes"):
        (store.folder / name).mkdir(parents=True)
    (store.folder / "step_000001.pinned").write_text("")
    store.sweep()
    assert {path.name for path in store.folder.iterdir()} == {".snapshot", "notes", "step_000001.pinned"}
