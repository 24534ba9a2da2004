"""The ranks of a learner that meets numbers that are not finite, and saves that fail.

Usage: undo_child.py RANKS JOBS. Every job is trained twice: undisturbed, and with a fault before each step. What
each fault did is written beside the jobs, one file a rank.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learner_child import begin, fork_ranks, groups, join, pairs, rows
from torch import Tensor, is_grad_enabled

from rlsys import fault_injection as faults
from rlsys.errors import CheckpointError, LearnerLostError, NonFiniteLossError
from rlsys.transfer.object_store import ObjectStoreSender
from rlsys.types import TrainingBatch

SMALL = 2**14  # bytes of the largest file that a full disk still takes; the models' are larger


def batch(step: int) -> TrainingBatch:
    """Return a little data for every term, in two groups: one for each update."""
    rng = np.random.default_rng(step)
    return TrainingBatch(
        groups=tuple(groups(rng, 2, 2)), demonstrations=tuple(rows(rng, 2)), pairs=tuple(pairs(rng, 2))
    )


def digest(learner: Any) -> str:
    """sha256 of everything an update changes on this rank, and of whether gradients are left."""
    found = hashlib.sha256()
    for model in filter(None, (learner.policy, learner.critic)):
        inner = getattr(model.engine.optimizer, "optimizer", model.engine.optimizer)
        tensors = [share(parameter, learner.settings.rank) for parameter in model.module.parameters()]
        for weights, entry in inner.state.items():
            tensors += [weights, *(entry[key] for key in sorted(entry))]
        for tensor in tensors:
            found.update(tensor.detach().contiguous().flatten().view(-1).float().numpy().tobytes())
        left = [parameter.grad is not None for parameter in model.module.parameters()]
        found.update(json.dumps([model.updates, any(left)]).encode())
    return found.hexdigest()


def share(parameter: Any, rank: int) -> Tensor:
    """Return this rank's part of a parameter, without the padding at its end, which DeepSpeed never writes (ZeRO 3)."""
    held = getattr(parameter, "ds_tensor", None)
    if held is None:
        return parameter
    return held.flatten()[: max(0, parameter.ds_numel - rank * held.numel())]


@contextlib.contextmanager
def disturbed(learner: Any, fault: dict[str, Any]) -> Iterator[None]:
    """Inject a fault into the block: points of rlsys.fault_injection, or a norm or score that is not finite."""
    faults._faults = faults.parse(fault.get("points", ""))
    hook: Any = None
    own = fault.get("rank") == learner.settings.rank
    if own and "norm" in fault:
        model = getattr(learner, fault["norm"])
        spoilt_update = model.updates + fault["update"]

        # After the learner has checked the gradient: only the norm, which is of all ranks, tells.
        def spoil(gradient: Tensor) -> Tensor:
            return gradient * math.inf if model.updates == spoilt_update else gradient

        hook = next(model.module.parameters()).register_hook(spoil)
    if own and "score" in fault:
        module = getattr(learner, fault["score"]).module.get_input_embeddings()
        hook = module.register_forward_hook(lambda _, __, found: found if is_grad_enabled() else found * math.nan)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if own and "limit" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, before[1]))
    try:
        yield
    finally:
        faults._faults = []
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if hook is not None:
            hook.remove()


def raised(kind: type[Exception], call: Callable[[], Any]) -> str:
    """Return the message of the error; "" without an error."""
    try:
        call()
    except kind as error:
        return str(error)
    return ""


def broken(learner: Any, job: dict[str, Any], fault: dict[str, Any]) -> str:
    """The error where one rank cannot read what a stage begins with, or cannot put away what it exports."""
    from learners import rank as learner_rank
    from learners.deepspeed import model_files

    def refuse(*_: Any, **_options: Any) -> Any:
        raise PermissionError(f"refused on rank {learner.settings.rank}")

    own = fault["rank"] == learner.settings.rank
    if "export" in fault:
        sender = ObjectStoreSender(len, SMALL)
        sender._shelf.buffer = refuse
        return raised(LearnerLostError, lambda: learner.send(sender, 0, ()))
    module, kind = {
        "load_policy": (learner_rank, LearnerLostError),
        "read_tensors": (model_files, CheckpointError),
    }[fault["unreadable"]]
    resumed = {**job, "resume": f"{job['folder']}/disturbed"}
    with pytest.MonkeyPatch.context() as patch:
        if own:
            patch.setattr(module, fault["unreadable"], refuse)
        message = raised(kind, lambda: begin(learner, resumed))
    begin(learner, resumed)
    return message


def run(learner: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Return for every fault its error, whether it changed nothing, and whether the next step was right."""
    training, saving = job["training"], job["saving"]
    steps = len(training) + 1
    begin(learner, job)
    expected = [digest(learner)]
    for step in range(steps):
        learner.train(batch(step), step, step + 1)
        expected.append(digest(learner))
    whole, seen = Path(job["folder"]), {}
    learner.save(whole / "undisturbed")
    begin(learner, job)
    for step, (name, fault) in enumerate(training.items()):
        for _ in range(fault.get("times", 1)):
            with disturbed(learner, fault):
                message = raised(NonFiniteLossError, lambda step=step: learner.train(batch(step), step, step + 1))
        seen[name] = {"raised": message, "unchanged": digest(learner) == expected[step]}
        learner.train(batch(step), step, step + 1)
        seen[name]["went_on"] = digest(learner) == expected[step + 1]
    for name, fault in saving.items():
        folder = whole / name
        if "blocked" in fault:
            (folder / fault["blocked"]).mkdir(parents=True, exist_ok=True)
        with disturbed(learner, fault):
            message = raised(CheckpointError, lambda folder=folder: learner.save(folder))
        seen[name] = {"raised": message, "unchanged": digest(learner) == expected[steps - 1]}
    learner.train(batch(steps - 1), steps - 1, steps)
    for name in saving:
        seen[name]["went_on"] = digest(learner) == expected[steps]
    learner.save(whole / "disturbed")
    for name, fault in job.get("others", {}).items():
        seen[name] = {"raised": broken(learner, job, fault), "unchanged": digest(learner) == expected[steps]}
        learner.send(ObjectStoreSender(len, SMALL), 0, ())
        seen[name]["went_on"] = len(learner.score([np.arange(3, 9)])) == 1
    return seen


def main(rank: int, ranks: int, jobs_file: Path) -> None:
    learner = join(rank, ranks, jobs_file.with_suffix(".store"))
    faults.identify("learner", rank, 0)
    seen = {job["name"]: run(learner, job) for job in json.loads(jobs_file.read_text())}
    jobs_file.with_suffix(f".{rank}.seen").write_text(json.dumps(seen))


if __name__ == "__main__":
    fork_ranks(main)
