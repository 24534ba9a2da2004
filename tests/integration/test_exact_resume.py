"""What a checkpoint must hold: a resume without any part of it ends otherwise than an undisturbed run, or is refused.

One run is made, and its directory copied for every part that is taken out of a checkpoint. Randomness is a function of
the seed, the weight version and the index of a prompt, so these stand for the random state of other systems.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_runs import TINY, FinishedRun, commands, last_checkpoint, steady_rows, wait_for_row, write_config
from reliability import begin, record, recorded
from safetensors.numpy import load_file, save_file

from rlsys.files import read_json, write_json
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.manifest import MANIFEST, verify_checkpoint
from rlsys.run.rollout_files import rollout_files

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(1800)]

STEPS, BEGINS = 4, 2
GROUPS = 4
FATES = ("trained", "filtered", "skipped")


def exact_config(warmed_up: FinishedRun, **train: Any) -> dict[str, Any]:
    """From the policy that another run has warmed up, so that rewards are mixed."""
    return {
        **TINY,
        "stages": ["online"],
        "model": {"path": str(warmed_up.dir / "stages" / "warm_start")},
        "actors": {**TINY["actors"], "count": 1},
        "train": {**TINY["train"], "max_steps": STEPS, "groups_per_step": GROUPS, **train},
        "checkpoint": {"interval": BEGINS, "keep_last": 9},
        "evaluation": {"prompts": 8, "samples": 1},
    }


@pytest.fixture(scope="module")
def undisturbed(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of STEPS steps."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with commands() as begin:
        begin("train", write_config(folder, exact_config(finished_run))).finish()
    return folder


@pytest.fixture
def killed(undisturbed: Path, finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A copy of that run as a kill before its last checkpoint leaves it."""
    shutil.copytree(undisturbed / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{STEPS:06d}")
    shutil.rmtree(tmp_path / "run" / "stages")
    write_config(tmp_path, exact_config(finished_run))
    assert last_checkpoint(tmp_path / "run").name == f"step_{BEGINS:06d}"
    return tmp_path


@contextlib.contextmanager
def reopened(run: Path) -> Iterator[Path]:
    """The files of the newest checkpoint, to be changed; it is valid again afterwards."""
    checkpoint = last_checkpoint(run)
    store, info = CheckpointStore(run / "checkpoints", 9), verify_checkpoint(checkpoint)
    temporary = store.begin(checkpoint.name)
    shutil.copytree(checkpoint, temporary, dirs_exist_ok=True)
    (temporary / MANIFEST).unlink()
    yield temporary
    store.commit(temporary, checkpoint.name, info)


def change_state(run: Path, **changes: Any) -> None:
    with reopened(run) as files:
        write_json(files / "state.json", {**read_json(files / "state.json"), **changes})


def state_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(last_checkpoint(run) / "state.json")
    return found


def ledger(run: Path) -> dict[int, dict[str, list[int]]]:
    """Prompts by fate, by weight version."""
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    return {line["version"]: {fate: line[fate] for fate in FATES} for line in lines}


def differences(run: Path, expected: Path) -> dict[str, set[str]]:
    """Return the differences of two runs that end at the same step: figures by step, fates, and final tensors."""
    rows, wanted = ({row["step"]: row for row in steady_rows(each)} for each in (run, expected))
    assert rows.keys() == wanted.keys() == set(range(STEPS + 1))
    found = {
        f"step {step}": {name for name in row.keys() | wanted[step].keys() if row.get(name) != wanted[step].get(name)}
        for step, row in rows.items()
    }
    lines, others = ([each[version] for version in sorted(each)] for each in (ledger(run), ledger(expected)))
    found["ledger"] = {fate for fate in FATES if [line[fate] for line in lines] != [line[fate] for line in others]}
    ends, expected_ends = digests(last_checkpoint(run)), digests(last_checkpoint(expected))
    assert ends.keys() == expected_ends.keys()
    found["end"] = {name for name, digest in ends.items() if digest != expected_ends[name]}
    return {place: names for place, names in found.items() if names}


def digests(checkpoint: Path) -> dict[str, str]:
    return {
        path.parent.name + "/" + path.stem: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in checkpoint.rglob("*.safetensors")
    }


def rollout_digests(run: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for _, path in rollout_files(run / "rollouts")}


TENSORS = {"policy/model", "learner/exp_avg", "learner/exp_avg_sq"}
FIRST = f"step {BEGINS + 1}"


def of_rollouts(names: set[str]) -> set[str]:
    """Return the figures of a step that the sampling alone determines."""
    return {name for name in names if name.startswith("rollout/")}


def control(without: str, promise: str, runs: int = 1) -> Any:
    """Decorates the test of a part that is taken out of a checkpoint: its row."""
    injection = "changed in a checkpoint, which is valid again"
    return recorded(fault=f"control: resumed {without}", promise=promise, injection=injection, runs=runs)


def test_a_whole_checkpoint_ends_as_the_undisturbed_run(start, killed: Path, undisturbed: Path) -> None:
    """The other tests here leave out one part each of what this test resumes."""
    start("train", str(killed / "config.yaml")).finish()
    assert digests(last_checkpoint(killed / "run")).keys() == TENSORS
    assert differences(killed / "run", undisturbed / "run") == {}
    kept, expected = (rollout_digests(folder / "run") for folder in (killed, undisturbed))
    assert kept == expected != {}, "advantages and gaps included"


@control("without moments", "not the bytes of the undisturbed run")
def test_without_moments_the_first_update_differs(start, killed: Path, undisturbed: Path) -> None:
    with reopened(killed / "run") as files:
        for name in ("exp_avg", "exp_avg_sq"):
            path = files / "learner" / f"{name}.safetensors"
            tensors = load_file(path)
            assert any(tensor.any() for tensor in tensors.values())
            save_file({key: np.zeros_like(tensor) for key, tensor in tensors.items()}, path, {"format": "pt"})
    start("train", str(killed / "config.yaml")).finish()
    found = differences(killed / "run", undisturbed / "run")
    assert found["end"] == TENSORS
    # The same prompts, the same weights and so the same samples: only what is made of them differs.
    assert of_rollouts(found.get(FIRST, set())) == set() and "ledger" not in found


@control("with another seed", "not the bytes of the undisturbed run")
def test_with_another_seed_the_first_samples_differ(start, killed: Path, undisturbed: Path) -> None:
    path = killed / "run" / "config.yaml"
    path.write_text(path.read_text().replace("seed: 3", "seed: 4"))
    start("train", str(killed / "config.yaml"), "run.seed=4").finish()
    found = differences(killed / "run", undisturbed / "run")
    assert found["end"] == TENSORS
    assert {"rollout/tokens"} <= of_rollouts(found[FIRST])
    assert "ledger" not in found  # the same places of the stream, with other prompts


@control("with another weight version", "not the bytes of the undisturbed run")
def test_with_another_weight_version_the_learner_deals_otherwise(start, killed: Path, undisturbed: Path) -> None:
    """The shuffle of a step is a function of the version that it makes."""
    run, later = killed / "run", 1000
    for name, version in (("metrics.jsonl", "weights/version"), ("ledger.jsonl", "version")):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(line for line in lines if json.loads(line)[version] <= BEGINS))
    change_state(run, weight_version=BEGINS + later)
    start("train", str(killed / "config.yaml")).finish()
    found = differences(run, undisturbed / "run")
    assert found["end"] == TENSORS
    assert of_rollouts(found[FIRST]) == set() and "ledger" not in found
    assert any(name.startswith(("learner/", "objective/")) for name in found[FIRST])


@control("with a cursor off by one", "refused; without the ledger not the bytes of the undisturbed run")
def test_a_cursor_off_by_one_is_refused_and_would_train_other_prompts(start, killed: Path, undisturbed: Path) -> None:
    run = killed / "run"
    cursor = state_of(run)["cursor"]
    assert cursor == BEGINS * GROUPS and accounts(run) == ([], [])
    change_state(run, cursor=cursor + 1)
    assert accounts(run) == ([cursor], [])
    message = start("train", str(killed / "config.yaml")).fail(2)
    assert f"issued {cursor + 1} prompts; the ledger and the prompts in flight lack [{cursor}] (1)" in message
    (run / "ledger.jsonl").unlink()  # what refuses it
    start("train", str(killed / "config.yaml")).finish()
    found = differences(run, undisturbed / "run")
    assert found["end"] == TENSORS and of_rollouts(found[FIRST])
    shifted = [index + 1 for index in ledger(undisturbed / "run")[BEGINS + 1]["trained"]]
    assert ledger(run)[BEGINS + 1]["trained"] == shifted


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_one_rank_continues_what_two_ranks_have_saved(start, killed: Path, undisturbed: Path, zero_stage: int) -> None:
    """Sums of another order differ by about 1e-7; the same samples all the same."""
    run, overrides = killed / "run", ["learner.ranks=1", f"learner.zero_stage={zero_stage}"]
    command = start("train", str(killed / "config.yaml"), *overrides).finish()
    assert f"changed: learner.ranks 2 -> 1, learner.zero_stage 2 -> {zero_stage}" in command.stdout + command.stderr
    found = differences(run, undisturbed / "run")
    assert "ledger" not in found
    assert [place for place, names in found.items() if of_rollouts(names) - {"rollout/logprob"}] == []
    before, expected, after = (
        np.concatenate([value.ravel() for _, value in sorted(load_file(path / "policy" / "model.safetensors").items())])
        for path in (
            undisturbed / "run" / "checkpoints" / f"step_{BEGINS:06d}",
            last_checkpoint(undisturbed / "run"),
            last_checkpoint(run),
        )
    )
    assert 0 < np.linalg.norm(after - expected) / np.linalg.norm(expected - before) < 1e-3


# --- asynchronous ---


def accounts(run: Path) -> tuple[list[int], list[int]]:
    """Prompts that the newest checkpoint has issued and that have no fate in the ledger, or several: lost, twice."""
    state = state_of(run)
    fates = Counter(state["in_flight"])
    for version, line in ledger(run).items():
        if version <= state["weight_version"]:
            fates.update(index for fate in FATES for index in line[fate])
    assert set(fates) <= set(range(state["cursor"]))
    lost = sorted(set(range(state["cursor"])) - set(fates))
    return lost, sorted(index for index, times in fates.items() if times > 1)


@pytest.fixture(scope="module")
def killed_asynchronous(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that samples a step ahead and replaces groups without a signal, killed within its fifth step or later."""
    folder = tmp_path_factory.mktemp("asynchronous")
    values = exact_config(finished_run, max_steps=10, max_staleness=1, dynamic_sampling_rounds=1)
    with commands() as begin:
        command = begin("train", write_config(folder, values))
        wait_for_row(command, folder / "run", "online", 5)
        command.signal(signal.SIGKILL, group=False)
        command.fail(-signal.SIGKILL)
        command.assert_gone(within_s=15)
    return folder


def copied(folder: Path, target: Path) -> Path:
    """A copy of a run and its config."""
    shutil.copytree(folder / "run", target / "run")
    config = (folder / "config.yaml").read_text().replace(str(folder / "run"), str(target / "run"))
    (target / "config.yaml").write_text(config)
    return target


def test_an_asynchronous_run_that_was_killed_loses_no_prompt_and_trains_none_twice(
    start, killed_asynchronous: Path, tmp_path: Path
) -> None:
    row = begin(
        fault="driver killed while actors sample ahead (train.max_staleness 1)",
        promise="the same command continues; every prompt has one fate",
        injection="SIGKILL within a step",
    )
    folder = copied(killed_asynchronous, tmp_path)
    run, state = folder / "run", state_of(folder / "run")
    assert state["weight_version"] in range(4, 10) and state["in_flight"]
    assert accounts(run) == ([], [])
    start("train", str(folder / "config.yaml")).finish().assert_gone(within_s=5)
    assert state_of(run)["weight_version"] == 10
    assert accounts(run) == ([], [])
    lines = ledger(run)
    assert sorted(lines) == list(range(1, 11)) and all(len(line["trained"]) == GROUPS for line in lines.values())
    assert any(line["filtered"] for line in lines.values()), "groups were replaced too"
    assert max(row["rollout/staleness_max"] for row in steady_rows(run)[-4:]) == 1, "it was asynchronous"
    # What was in flight when the checkpoint was made came first.
    after = [index for version, line in lines.items() if version > state["weight_version"] for index in line["trained"]]
    filtered = {index for line in lines.values() for index in line["filtered"]}
    waited = [index for index in state["in_flight"] if index not in filtered]
    assert set(waited) <= set(after[: 2 * GROUPS])
    lost, twice = accounts(run)
    record(replace(row, passed=1, prompts_lost=len(lost), trained_twice=len(twice), processes_left=0))


@control("without a prompt in flight", "refused", runs=2)
def test_a_prompt_that_is_dropped_from_those_in_flight_is_missed(
    start, killed_asynchronous: Path, tmp_path: Path
) -> None:
    for place in (0, -1):
        folder = copied(killed_asynchronous, tmp_path / str(place))
        run, in_flight = folder / "run", state_of(folder / "run")["in_flight"]
        dropped = in_flight.pop(place)
        change_state(run, in_flight=in_flight)
        assert accounts(run) == ([dropped], [])
        message = start("train", str(folder / "config.yaml")).fail(2)
        assert f"the ledger and the prompts in flight lack [{dropped}] (1)" in message
