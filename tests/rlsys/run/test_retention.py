"""Retention: the checkpoints that a commit keeps."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlsys.errors import CheckpointError
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.manifest import MANIFEST, verify_checkpoint

ACCURACY = "held_out/sampled_accuracy"


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    commit(store, 1)
    size = sum(path.stat().st_size for path in (tmp_path / "step_000001").rglob("*") if path.name != "MANIFEST.json")
    (tmp_path / "step_000009").mkdir()  # a damaged one, which may be pinned, says nothing of sizes
    usage = shutil.disk_usage(tmp_path)
    for free, enough in ((int(size * 1.29), False), (int(size * 1.31) + 1, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _path, free=free: usage._replace(free=free))
        if enough:
            store.discard(store.begin("step_000002"))
        else:
            with pytest.raises(CheckpointError, match="are free, and the last checkpoint has .*; free disk space"):
                store.begin("step_000002")
    assert versions(store) == [1, 9]


def test_last_best_regular_and_pinned_checkpoints_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2, keep_every=5, best=(ACCURACY, "max"))
    scores = {2: 0.5, 3: 0.9, 4: 0.7, 7: 0.8}
    for version in range(1, 13):
        commit(store, version, scores.get(version))
        if version == 6:
            (tmp_path / "step_000006.pinned").touch()
    assert versions(store) == [3, 5, 6, 10, 11, 12]
    assert store.earlier_best() == (tmp_path / "step_000003", 0.9)
    commit(store, 13, 0.9)  # as good as version 3, and newer
    assert versions(store) == [5, 6, 10, 12, 13]
    assert store.latest() == tmp_path / "step_000013" and store.earlier_best() is None


def test_the_smallest_score_may_be_the_best_and_none_at_all_keeps_none(tmp_path: Path) -> None:
    cases: list[tuple[Any, list[int]]] = [((ACCURACY, "min"), [2, 4]), (None, [4])]
    for best, kept in cases:
        store = CheckpointStore(tmp_path / str(len(kept)), keep_last=1, best=best)
        for version, score in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None)):
            commit(store, version, score)
        assert versions(store) == kept


def test_scores_of_another_metric_do_not_count(tmp_path: Path) -> None:
    """A resume may change checkpoint.best_metric."""
    store = CheckpointStore(tmp_path, keep_last=1, best=(ACCURACY, "max"))
    for version, score in ((1, 0.5), (2, None)):
        commit(store, version, score)
    commit(store, 3, 80.0, "rollout/completion_length")
    commit(store, 4)
    assert versions(store) == [1, 4]


def test_a_course_that_is_replaced_leaves_nothing_not_even_its_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=3, best=(ACCURACY, "max"))
    for version, score in ((1, 0.1), (2, 0.9), (3, 0.2)):
        commit(store, version, score)
    commit(store, 2, 0.3)  # the run was taken back to version 1 on purpose
    assert versions(store) == [1, 2]


@pytest.mark.parametrize("damaged", [MANIFEST, "weights"])
@pytest.mark.parametrize("version", [1, 3])
def test_a_pinned_checkpoint_stays_also_damaged_and_newer_than_those_made_instead(
    version: int, damaged: str, tmp_path: Path
) -> None:
    store = CheckpointStore(tmp_path, keep_last=1, keep_every=2)
    for each in (1, 2, 3):
        commit(store, each)
        (tmp_path / f"step_{each:06d}.pinned").touch()
    (tmp_path / f"step_{version:06d}" / damaged).write_text("{}")
    newest = store.latest()
    assert newest == tmp_path / f"step_{2 if version == 3 else 3:06d}"
    if version == 3:
        commit(store, 2)  # made again, from the one before
    commit(store, 4)
    assert versions(store) == [1, 2, 3, 4]
    (tmp_path / f"step_{version:06d}.pinned").unlink()
    commit(store, 5)
    assert versions(store) == [each for each in (1, 2, 3, 4, 5) if each != version]


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("unreadable", [1, 3])
def test_a_checkpoint_that_cannot_be_read_now_is_put_aside(
    unreadable: int, pinned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for version in (1, 3):
        commit(store, version)
    pin = tmp_path / f"step_{unreadable:06d}.pinned"
    if pinned:
        pin.touch()
    bad = tmp_path / f"step_{unreadable:06d}" / MANIFEST
    read_text = Path.read_text

    def failing_disk(path: Path, *arguments: Any, **options: Any) -> str:
        if path == bad:
            raise OSError(errno.EIO, "Input/output error")
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", failing_disk)
    for version in (4, 5):
        commit(store, version)
    aside = tmp_path / f".aside-step_{unreadable:06d}"
    names = {path.name for path in tmp_path.iterdir()} - {pin.name}
    assert names == {aside.name, "step_000004", "step_000005"}
    monkeypatch.undo()
    assert store.latest() == tmp_path / "step_000005"
    store.sweep()
    assert verify_checkpoint(aside)


def commit(store: CheckpointStore, version: int, score: float | None = None, metric: str = ACCURACY) -> None:
    temporary = store.begin(f"step_{version:06d}")
    (temporary / "weights").write_bytes(bytes(1000))
    info: dict[str, Any] = {"weight_version": version}
    if score is not None:
        info["score"] = {"metric": metric, "value": score}
    store.commit(temporary, f"step_{version:06d}", info)


def versions(store: CheckpointStore) -> list[int]:
    return sorted(int(path.name[5:]) for path in store.folder.iterdir() if path.is_dir())
