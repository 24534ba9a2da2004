"""What a killed attempt leaves is removed by the next one, and nothing that is another's."""

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
    """Folders of the form that runs use for sockets: of the dead attempt, and of a run that goes on."""
    folders = [Path(f"/tmp/rl-{uuid.uuid4().hex[:8]}") for _ in range(2)]
    for folder in folders:
        (folder / "tmp").mkdir(parents=True)
        (folder / "tmp" / "socket").write_text("")
    yield folders
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def test_the_scratch_folder_of_the_dead_attempt_goes_and_that_of_others_stays(
    scratch: list[Path], tmp_path: Path
) -> None:
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


def test_a_scratch_folder_that_cannot_be_removed_yet_is_not_forgotten(
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
def test_a_note_of_anything_else_removes_nothing(tmp_path: Path, note: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / cluster.TEMPORARY_NOTE).write_text(note.format(tmp=tmp_path, name=tmp_path.name))
    cluster.remove_leftovers(run)
    assert precious.is_dir() and not (run / cluster.TEMPORARY_NOTE).exists()


def test_the_sweep_of_checkpoints_leaves_what_is_not_half_made(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
    for name in (".tmp-step_000001-a", ".trash-step_000001-b", ".snapshot", "notes"):
        (store.folder / name).mkdir(parents=True)
    (store.folder / "step_000001.pinned").write_text("")
    store.sweep()
    assert {path.name for path in store.folder.iterdir()} == {".snapshot", "notes", "step_000001.pinned"}
