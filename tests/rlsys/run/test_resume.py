"""The start of a run, for every value of run.resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from resumable_runs import FRESH, begin, config, save, start, state, store

from rlsys.errors import CheckpointError, ConfigError
from rlsys.files import write_json
from rlsys.run.resume import Start, find_newest_start


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_an_empty_directory_starts_from_the_model(resume: str, tmp_path: Path) -> None:
    beginning = start(tmp_path, config(resume))
    assert beginning == Start(FRESH, None)
    assert beginning.describe() == "starting from the initial model"


def test_auto_continues_from_the_newest_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 2, 5)
    beginning = start(tmp_path, config())
    assert beginning == Start(state(5), tmp_path / "checkpoints" / "step_000005")
    assert "step_000005 (weight version 5)" in beginning.describe()


def test_auto_skips_a_damaged_checkpoint_and_never_starts_over_silently(tmp_path: Path) -> None:
    save(tmp_path, 2, 5)
    (tmp_path / "checkpoints" / "step_000005" / "state.json").write_text("{}")
    assert start(tmp_path, config()).state == state(2)
    (tmp_path / "checkpoints" / "step_000002" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is valid"):
        start(tmp_path, config())


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_that_lost_its_learner_continues_from_its_newest_checkpoint(resume: str, tmp_path: Path) -> None:
    begin(tmp_path, config(resume))
    save(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert find_newest_start(config(resume), tmp_path, store(tmp_path)) == Start(FRESH, None)
    save(tmp_path, 5, 9)
    beginning = find_newest_start(config(resume), tmp_path, store(tmp_path))
    assert beginning.state == state(9) and not beginning.named


def test_a_branched_run_continues_from_the_named_checkpoint_and_then_from_its_own(tmp_path: Path) -> None:
    save(tmp_path / "a", 5)
    named = config(str(tmp_path / "a" / "checkpoints" / "step_000005"))
    begin(tmp_path / "b", named)
    save(tmp_path / "b")
    assert find_newest_start(named, tmp_path / "b", store(tmp_path / "b")).state == state(5)
    save(tmp_path / "b", 7)
    assert find_newest_start(named, tmp_path / "b", store(tmp_path / "b")).state == state(7)


def test_never_refuses_a_used_directory(tmp_path: Path) -> None:
    save(tmp_path / "a", 2)
    with pytest.raises(ConfigError, match=r"run\.resume is never"):
        start(tmp_path / "a", config("never"))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"choose another run\.dir"):
        start(tmp_path, config("never"))


def test_a_path_names_the_beginning_of_a_run_and_the_same_command_continues_it(tmp_path: Path) -> None:
    save(tmp_path / "a", 2, 5)
    (tmp_path / "a" / "stages" / "warm_start").mkdir(parents=True)
    earlier = tmp_path / "a" / "checkpoints" / "step_000002"
    command = config(str(earlier))
    assert start(tmp_path / "b", command) == Start(state(2), earlier, named=True)
    assert not (tmp_path / "b").exists(), "nothing is changed before the start is accepted"
    (tmp_path / "b" / "stages" / "online").mkdir(parents=True)  # from an unrelated run
    begin(tmp_path / "b", command)
    assert [path.name for path in (tmp_path / "b" / "stages").iterdir()] == ["warm_start"]
    (tmp_path / "b" / "metrics.jsonl").write_text("")  # killed before its first own checkpoint
    assert begin(tmp_path / "b", command) == Start(state(2), earlier, named=True)
    save(tmp_path / "b", 3, 4)
    shutil.rmtree(tmp_path / "a")  # no longer needed
    assert start(tmp_path / "b", command) == Start(state(4), tmp_path / "b" / "checkpoints" / "step_000004")


def test_a_path_is_refused_in_the_directory_of_another_run(tmp_path: Path) -> None:
    save(tmp_path / "a", 2)
    save(tmp_path / "b", 7)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "metrics.jsonl").write_text("")
    path = str(tmp_path / "a" / "checkpoints" / "step_000002")
    for name in ("b", "c"):
        with pytest.raises(ConfigError, match=rf"run\.dir {tmp_path / name} holds another run; .* new run\.dir"):
            start(tmp_path / name, config(path))
        assert not (tmp_path / name / "resumed_from.json").exists()


def test_a_path_within_the_run_directory_is_refused_while_there_are_newer_ones(tmp_path: Path) -> None:
    save(tmp_path, 2, 5)
    (tmp_path / "metrics.jsonl").write_text("")
    path = tmp_path / "checkpoints" / "step_000002"
    with pytest.raises(ConfigError, match=r"step_000005 is newer; move the newer ones out of .*/checkpoints, or"):
        start(tmp_path, config(str(path)))
    (tmp_path / "checkpoints" / "step_000005").rename(tmp_path / "step_000005")
    (tmp_path / "stages" / "warm_start").mkdir(parents=True)
    assert begin(tmp_path, config(str(path))) == Start(state(2), path, named=True)
    assert (tmp_path / "stages" / "warm_start").is_dir()
    save(tmp_path, 3)  # the run continues from here, even if retention has removed the first checkpoint
    shutil.rmtree(path)
    assert start(tmp_path, config(str(path))).state == state(3)


def test_a_run_that_began_anew_descends_from_no_path(tmp_path: Path) -> None:
    save(tmp_path / "a", 2)
    path = str(tmp_path / "a" / "checkpoints" / "step_000002")
    begin(tmp_path / "b", config(path))
    assert start(tmp_path / "b", config()) == Start(FRESH, None)
    assert (tmp_path / "b" / "resumed_from.json").exists(), "asking alone forgets nothing"
    begin(tmp_path / "b", config())
    save(tmp_path / "b", 1)
    with pytest.raises(ConfigError, match="holds another run"):
        start(tmp_path / "b", config(path))


def test_the_end_of_another_run_leaves_nothing_to_do(tmp_path: Path) -> None:
    save(tmp_path / "a", 9)  # online, step 8
    path = str(tmp_path / "a" / "checkpoints" / "step_000009")
    message = r"^run\.resume: .* has made all 8 steps of the last stage; raise train\.max_steps \(now 8\)$"
    with pytest.raises(ConfigError, match=message):
        start(tmp_path / "b", config(path, train={"max_steps": 8}))
    assert start(tmp_path / "b", config(path, train={"max_steps": 9})).state == state(9)
    assert start(tmp_path / "a", config(path, train={"max_steps": 8})).state == state(9)  # the run itself is complete


def test_a_path_is_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a", 2)
    monkeypatch.chdir(tmp_path)
    checkpoint = start(tmp_path / "b", config("a/checkpoints/step_000002")).checkpoint
    assert checkpoint == tmp_path / "a" / "checkpoints" / "step_000002"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nowhere", "no such folder$"),
        ("always", "no such folder$"),
        ("file", "a file$"),
        ("empty", r"a folder without MANIFEST\.json$"),
        ("a", r"a folder without MANIFEST\.json; did you mean .*/a/checkpoints/step_000002\?$"),
        ("a/checkpoints", r"a folder without MANIFEST\.json; did you mean .*/a/checkpoints/step_000002\?$"),
    ],
)
def test_a_path_that_is_no_checkpoint(path: str, reason: str, tmp_path: Path) -> None:
    save(tmp_path / "a", 1, 2)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    expected = r"expected auto, never or the folder of a checkpoint, RUN_DIR/checkpoints/step_N, found "
    with pytest.raises(ConfigError, match=rf"^run\.resume {tmp_path / path}: {expected}{reason}"):
        start(tmp_path / "b", config(str(tmp_path / path)))


def test_a_path_of_a_damaged_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "a", 2)
    path = tmp_path / "a" / "checkpoints" / "step_000002"
    (path / "state.json").write_text("{}")
    message = rf"^run\.resume: {path}/state\.json: expected \d+ bytes, found 2; choose another checkpoint, or restore"
    with pytest.raises(ConfigError, match=message):
        start(tmp_path / "b", config(str(path)))


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_folders_of_others_among_the_checkpoints_are_refused_and_stay(tmp_path: Path, resume: str) -> None:
    """They would count as damaged checkpoints, which the next save removes."""
    save(tmp_path, 2)
    (tmp_path / "checkpoints" / "step_000009").mkdir()  # damaged, but with the name of a checkpoint
    (tmp_path / "checkpoints" / "step_000002.pinned").write_text("")
    assert start(tmp_path, config()).state == state(2)
    foreign = tmp_path / "checkpoints" / "checkpoint-500"
    foreign.mkdir()
    (foreign / "optimizer.pt").write_text("")
    message = (
        rf"^run\.dir {tmp_path}: expected checkpoints of rlsys alone in {foreign.parent}, found the folder "
        r"checkpoint-500 without a MANIFEST\.json; move it away, or choose another run\.dir$"
    )
    with pytest.raises(ConfigError, match=message):
        start(tmp_path, config(resume))
    assert (foreign / "optimizer.pt").exists()


@pytest.mark.parametrize("text", [None, "run: [", "run: {dir: x, speed: 2}"])
def test_a_run_without_a_usable_config_cannot_be_resumed(tmp_path: Path, text: str | None) -> None:
    save(tmp_path, 2)
    path = tmp_path / "config.yaml"
    path.unlink() if text is None else path.write_text(text)
    message = rf"^run\.dir or run\.resume: {tmp_path} cannot be resumed without its config\.yaml: .*; restore it, or"
    with pytest.raises(ConfigError, match=message):
        start(tmp_path, config())


@pytest.mark.parametrize("text", ["[]", "{}"])
def test_a_damaged_resumed_from_file_is_named(tmp_path: Path, text: str) -> None:
    save(tmp_path / "a", 2)
    begin(tmp_path / "b", config(str(tmp_path / "a" / "checkpoints" / "step_000002")))
    (tmp_path / "b" / "resumed_from.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"resumed_from\.json: damaged: expected a checkpoint; restore it"):
        start(tmp_path / "b", config(str(tmp_path / "a" / "checkpoints" / "step_000002")))


def test_the_directory_of_a_search_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "search.json", {})
    assert start(tmp_path, config()).checkpoint is None  # the search has no trees
    (tmp_path / "trees").mkdir()
    (tmp_path / "trees" / "00000.jsonl").write_text("")
    with pytest.raises(ConfigError, match="holds the trees of a search: choose another run.dir"):
        start(tmp_path, config())


def test_a_file_in_place_of_the_checkpoints_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ConfigError, match=rf"^run\.dir {tmp_path}: expected a folder, but \S+/checkpoints is none"):
        start(tmp_path, config())
