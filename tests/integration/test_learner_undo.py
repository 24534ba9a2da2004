"""DeepSpeed ranks in plain processes: a non-finite step or failed save is an error on all ranks and changes nothing."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from learner_child import CRITIC
from reliability import Row, record
from test_learner_ranks import build_models, digests, run_ranks

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]
LEARNERS: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"zero_stage": stage} for stage in (0, 1, 2, 3)},
    **{f"bf16-{stage}": {"zero_stage": stage, "dtype": "bf16"} for stage in (1, 2, 3)},
    **{f"offload{stage}": {"zero_stage": stage, "optimizer_offload": True} for stage in (1, 2, 3)},
    **{f"checkpointing{stage}": {"zero_stage": stage, "gradient_checkpointing": True} for stage in (2, 3)},
}
# Faults of a step of two updates. They alternate between the ranks and between the updates.
POLICY: dict[str, dict[str, Any]] = {
    "loss, first update": {"points": "learner.loss@number=1,update=0:nan"},
    "loss, later update": {"points": "learner.loss@number=0,update=1:nan"},
    "gradient, first update": {"points": "learner.gradient@number=0,update=0:nan", "times": 2},
    "gradient, later update": {"points": "learner.gradient@number=1,update=1,hit=1:nan"},
    "norm, first update": {"norm": "policy", "rank": 0, "update": 0},
    "norm, later update": {"norm": "policy", "rank": 1, "update": 1},
    "log-probabilities": {"score": "policy", "rank": 1},
}
BOTH: dict[str, dict[str, Any]] = {
    "loss of the critic": {"points": "learner.loss@number=1,update=0,model=critic:nan"},
    "gradient of the critic, later update": {"points": "learner.gradient@number=0,update=1,model=critic:nan"},
    "loss of the policy": {"points": "learner.loss@number=0,update=0,model=policy:nan"},
    # The critic has been updated by then.
    "norm of the policy": {"norm": "policy", "rank": 1, "update": 0},
    "norm of the policy, later update": {"norm": "policy", "rank": 0, "update": 1},
    "norm of the critic, later update": {"norm": "critic", "rank": 0, "update": 1},
    "values": {"score": "critic", "rank": 0},
}
OTHERS: dict[str, dict[str, Any]] = {
    "weights that rank 1 cannot read": {"unreadable": "load_policy", "rank": 1},
    "moments that rank 0 cannot read": {"unreadable": "read_tensors", "rank": 0},
    "weights that rank 0 cannot put away": {"export": True, "rank": 0},
}
# One update of one model, which keeps no copies.
ONE = {name: fault for name, fault in POLICY.items() if "first" in name}
KINDS: dict[str, dict[str, Any]] = {
    "policy": {"training": POLICY},
    "critic": {"training": BOTH, "objective": CRITIC},
    "one": {"training": ONE, "updates": 1, "others": OTHERS},
}
SAVING: dict[str, dict[str, Any]] = {
    "full before the weights": {"points": "checkpoint.learner@file=policy,number=0:full"},
    "full before the second moments, on another rank": {
        "points": "checkpoint.learner@file=learner,number=1,hit=2:full"
    },
    "a limit on the size of files": {"limit": True, "rank": 0},
    "a folder where a file belongs": {"blocked": "learner/learner.json"},
}
ROWS = {
    "training": Row(
        fault="number not finite in an update, without Ray: ZeRO 0 to 3, fp32, bf16 and offload",
        promise="all ranks say so; weights, moments and the next step are those of a learner that never saw it",
        injection="learner.loss and learner.gradient: nan on one rank; spoilt norms, log-probabilities and values",
        runs=0,
        passed=0,
    ),
    "saving": Row(
        fault="learner file that one rank cannot write, without Ray: ZeRO 0 to 3, fp32, bf16 and offload",
        promise="all ranks say so, none waits; the next step and the next save are as if it had not been tried",
        injection="checkpoint.learner: full; a limit on the size of files; a folder in the way",
        runs=0,
        passed=0,
    ),
}
CASES = {f"{kind}-{learner}": (kind, learner) for kind in KINDS for learner in LEARNERS}


def job(folder: Path, name: str) -> dict[str, Any]:
    kind, learner = CASES[name]
    return {
        "name": name,
        "model": str(folder / "model"),
        "folder": str(folder / name),
        "learner": LEARNERS[learner],
        "saving": SAVING,
        **KINDS[kind],
    }


def expected(name: str) -> str:
    """Return the expected message of a fault."""
    if name in SAVING or name in OTHERS:
        return "learner rank "
    found = {"loss": "loss is nan on rank", "gradient": "is not finite on rank", "norm": "gradient norm of the"}
    return found.get(name.split()[0].strip(","), "not finite; nothing was updated")


def seen(folder: Path, name: str, cases: list[str]) -> list[dict[str, Any]]:
    """Return what each of the two ranks saw of these cases."""
    run_ranks(folder, {name: (2, [job(folder, case) for case in cases])}, child="undo_child.py")
    return [json.loads((folder / f"{name}.{rank}.seen").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("undo")
    build_models(made)
    return made


@pytest.fixture(scope="module")
def grid(folder: Path) -> list[dict[str, Any]]:
    return seen(folder, "grid", list(CASES))


def check(name: str, ranks: list[dict[str, Any]]) -> None:
    """Assert the promised outcome of a fault in the results of every rank."""
    messages = {found[name]["raised"] for found in ranks}
    assert len(messages) == 1, f"{name}: the ranks say {messages}"
    assert expected(name) in messages.pop(), name
    for what in ("unchanged", "went_on"):
        assert [found[name][what] for found in ranks] == [True, True], f"{name}: {what}"


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_a_fault_is_an_error_of_all_ranks_and_changes_nothing(
    case: str, folder: Path, grid: list[dict[str, Any]]
) -> None:
    ranks = [found[case] for found in grid]
    given = job(folder, case)
    for name in [*given["training"], *given["saving"], *given.get("others", {})]:
        check(name, ranks)
    assert digests(folder / case / "disturbed") == digests(folder / case / "undisturbed")


@pytest.mark.long
@pytest.mark.parametrize("what", ROWS)
def test_the_whole_grid_makes_a_row_of_the_table(what: str, folder: Path, grid: list[dict[str, Any]]) -> None:
    runs = [(name, case) for case in CASES for name in job(folder, case)[what]]
    passed = 0
    for name, case in runs:
        with contextlib.suppress(AssertionError):
            check(name, [found[case] for found in grid])
            passed += 1
    record(replace(ROWS[what], runs=len(runs), passed=passed))
    assert passed == len(runs)


def test_what_is_promised_can_be_missed() -> None:
    good = {"raised": "joint loss is nan on rank 0, at update 0", "unchanged": True, "went_on": True}
    check("loss of the policy", [{"loss of the policy": good}] * 2)
    for bad in ({"raised": ""}, {"raised": "another"}, {"unchanged": False}, {"went_on": False}):
        with pytest.raises(AssertionError):
            check("loss of the policy", [{"loss of the policy": good}, {"loss of the policy": good | bad}])
