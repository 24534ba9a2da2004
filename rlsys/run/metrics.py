"""Register the names of all metrics, and write them to metrics.jsonl and TensorBoard events.

Both files carry the names of `METRICS` and no others. A metric is `volatile` if two runs with the same config and seed
may differ in it: times, rates and sizes that depend on the machine.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.directory import RunDirectory
from rlsys.errors import CheckpointError, RlsysError
from rlsys.files import json_record, read_records, resume_records
from rlsys.run.charts import hparams, layout
from rlsys.run.event_file import EventFile


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric. Its unit is "1" for plain numbers."""

    name: str
    unit: str
    meaning: str
    volatile: bool = False


def _term_specs() -> list[MetricSpec]:
    """Return the metrics of every term of the joint loss."""
    units = {  # of the denominator
        "policy": "by aggregation",
        "kl": "by aggregation",
        "value": "tokens",
        "preference": "pairs",
        "sft": "tokens",
        "distill": "tokens",
        "ranking": "prompts",
        "custom": "by aggregation",
    }
    specs = []
    for term, unit in units.items():
        name = f"objective/{term}"
        specs += [
            MetricSpec(
                f"{name}_loss", "1", f"loss of the term {term}, divided by its own denominator, mean over the updates"
            ),
            MetricSpec(f"{name}_weight", "1", f"weight of the term {term} in this step"),
            MetricSpec(
                f"{name}_denominator", unit, f"denominator of the term {term} in an update, mean over the updates"
            ),
            MetricSpec(f"{name}_share", "share", f"share of the term {term} in all targets and pairs of the step"),
            MetricSpec(f"{name}_grad_norm", "1", f"norm of the weighted gradient of the term {term}, {_where(term)}"),
        ]
        if term != "value":
            share = f"gradient norm of the term {term}, divided by the sum of the norms of all terms"
            specs.append(MetricSpec(f"{name}_grad_share", "share", share))
    return specs


def _where(term: str) -> str:
    """Return where the gradient norm of a term is measured."""
    return "all of the critic" if term == "value" else "in the last layer, every objective.grad_norm_interval steps"


_SPECS = (
    MetricSpec("weights/version", "steps", "number of finished training steps of all stages"),
    MetricSpec("rollout/reward", "1", "mean reward of the step's sampled trajectories with a verdict"),
    MetricSpec(
        "rollout/reward_low", "1", "lower end of its 95 % interval, from the spread of the groups' mean rewards"
    ),
    MetricSpec("rollout/reward_high", "1", "upper end of this interval"),
    MetricSpec("rollout/accuracy", "share", "share of the trajectories that the verifier found correct"),
    MetricSpec("rollout/no_answer_rate", "share", "share of the trajectories without a valid answer"),
    MetricSpec("rollout/truncated_rate", "share", "share of the trajectories that reached the token limit"),
    MetricSpec("rollout/completion_length", "tokens", "mean length of the completions"),
    MetricSpec("rollout/completion_length_max", "tokens", "longest completion of the step"),
    MetricSpec("rollout/group_reward_std", "1", "standard deviation of the rewards in a group, mean over the groups"),
    MetricSpec(
        "rollout/zero_advantage_groups",
        "share",
        "share of the sampled groups in which all judged rewards are equal, after the overlong shaping",
    ),
    MetricSpec("rollout/failed", "groups", "failed rollouts and searches of the run so far"),
    MetricSpec("rollout/verifier_errors", "trajectories", "trajectories whose verification raised or timed out"),
    MetricSpec("rollout/turns", "turns", "mean number of turns of the policy in an episode with an environment"),
    MetricSpec("rollout/out_of_turns_rate", "share", "share of the episodes that used up environment.max_turns"),
    MetricSpec("rollout/environment_share", "share", "share of the tokens after the prompt that the environment wrote"),
    MetricSpec("rollout/environment_errors", "trajectories", "episodes whose environment raised or timed out"),
    MetricSpec("rollout/filtered", "groups", "replaced groups without a learning signal, of the run so far"),
    MetricSpec("rollout/filtered_tokens", "tokens", "tokens generated for the replaced groups"),
    MetricSpec("rollout/tokens", "tokens", "tokens generated for the step's sampled groups"),
    MetricSpec(
        "rollout/generated_tokens",
        "tokens",
        "all tokens that engines generated for the step: sampled, searched (by all roles), replaced and failed",
    ),
    MetricSpec(
        "rollout/tokens_per_s",
        "tokens/s",
        "generated tokens per busy second of an actor's engine, sum over the actors",
        True,
    ),
    MetricSpec(
        "rollout/prefix_cache_hits",
        "share",
        "share of the prompt tokens found in the prefix caches of the engines",
        True,
    ),
    MetricSpec(
        "rollout/idle_policy",
        "share",
        "share of the time since the previous step in which the engines of the actors were idle",
        True,
    ),
    MetricSpec("rollout/idle_model", "share", "the same for the engines of search.model", True),
    MetricSpec("rollout/idle_reviewer", "share", "the same for the engines of search.reviewer", True),
    MetricSpec("rollout/idle_judge", "share", "the same for the engines of search.value", True),
    MetricSpec("rollout/idle_teacher", "share", "the same for the engines of teacher.model", True),
    MetricSpec("rollout/staleness_mean", "steps", "training steps between sampling or search and training, mean"),
    MetricSpec("rollout/staleness_max", "steps", "training steps between sampling or search and training, maximum"),
    MetricSpec("search/trees", "trees", "searched prompts of the step"),
    MetricSpec("search/solved", "share", "share of the trees with a correct answer"),
    MetricSpec("search/reward", "1", "mean reward of the scored answers; 0 without scored answers"),
    MetricSpec("search/simulations", "simulations", "simulations of the step's trees"),
    MetricSpec("search/calls", "calls", "completions requested from engines"),
    MetricSpec("search/tokens", "tokens", "tokens that all roles generated"),
    MetricSpec("search/scored", "answers", "answer nodes with a verdict"),
    MetricSpec("search/correct", "answers", "answer nodes that are right"),
    MetricSpec(
        "search/defects", "nodes", "invalid nodes, which end their chain: cut short, not closed, or not in the pattern"
    ),
    MetricSpec("search/duplicates", "nodes", "draws that repeat a child of the same parent"),
    MetricSpec("search/backtracks", "nodes", "nodes added after a wrong answer"),
    MetricSpec("search/verifier_errors", "answers", "answers whose verification raised or timed out"),
    MetricSpec("search/replies", "nodes", "replies of the environment in the trees"),
    MetricSpec("search/environment_errors", "turns", "turns in trees to which the environment gave no reply"),
    MetricSpec("search/values", "nodes", "new nodes for which search.value was asked"),
    MetricSpec("search/value_errors", "nodes", "those of them whose value failed or timed out"),
    MetricSpec("search/trained_share", "share", "share of the generated tokens that the policy loss trains"),
    MetricSpec("search/pairs", "pairs", "preference pairs of whole chains"),
    MetricSpec("search/step_preferences", "pairs", "preference pairs of sibling nodes"),
    MetricSpec("search/demonstrations", "chains", "correct chains to imitate"),
    MetricSpec("held_out/greedy_accuracy", "share", "share of the held-out problems that greedy decoding solves"),
    MetricSpec(
        "held_out/greedy_accuracy_low", "share", "lower end of its 95 % interval, by bootstrap over the problems"
    ),
    MetricSpec("held_out/greedy_accuracy_high", "share", "upper end of this interval"),
    MetricSpec("held_out/greedy_no_answer_rate", "share", "share of the greedy completions without a valid answer"),
    MetricSpec("held_out/greedy_reward", "1", "mean reward of the greedy completions with a verdict"),
    MetricSpec(
        "held_out/sampled_accuracy", "share", "share of the samples, at temperature 1, that solve their problem"
    ),
    MetricSpec(
        "held_out/sampled_accuracy_low", "share", "lower end of its 95 % interval, by bootstrap over the problems"
    ),
    MetricSpec("held_out/sampled_accuracy_high", "share", "upper end of this interval"),
    MetricSpec("held_out/sampled_no_answer_rate", "share", "share of the samples without a valid answer"),
    MetricSpec("held_out/sampled_reward", "1", "mean reward of the samples with a verdict"),
    MetricSpec("held_out/pass_at_k", "share", "share of the held-out problems that at least one of k samples solves"),
    MetricSpec("held_out/verifier_error_rate", "share", "share of the held-out verifications that raised or timed out"),
    MetricSpec("held_out/completion_length", "tokens", "mean length of the held-out completions"),
    MetricSpec("learner/loss", "1", "joint loss, mean over the step's updates"),
    MetricSpec(
        "distill/divergence",
        "nats",
        "divergence of the policy from the teacher per token, objective.distill.divergence",
    ),
    MetricSpec("distill/interpolation", "share", "share of the teacher in the distribution to learn, TAID's t"),
    MetricSpec(
        "learner/kl", "nats", "KL divergence from the reference policy per token, estimated by objective.kl.estimator"
    ),
    MetricSpec(
        "learner/left_out_share",
        "share",
        "share of the policy's samples and pairs without a gradient, such as those of groups with equal rewards; they "
        "are not passed through the model, and count in denominators alone",
    ),
    MetricSpec("learner/entropy", "nats", "mean entropy of the policy on trained tokens"),
    MetricSpec("learner/grad_norm", "1", "global gradient norm before clipping, mean over the updates"),
    MetricSpec("learner/clip_low_fraction", "share", "share of the trained tokens whose ratio was clipped from below"),
    MetricSpec("learner/clip_high_fraction", "share", "share of the trained tokens whose ratio was clipped from above"),
    MetricSpec("learner/ratio_max", "1", "largest probability ratio of a trained token"),
    MetricSpec("learner/learning_rate", "1", "learning rate of the policy, mean over the step's updates"),
    MetricSpec("learner/tokens", "tokens", "tokens of the samples that were trained, prompts included"),
    MetricSpec("learner/tokens_per_s", "tokens/s", "tokens without padding per second of learning, all ranks", True),
    MetricSpec("learner/updates", "updates", "optimizer updates of the step"),
    MetricSpec(
        "learner/skipped_steps",
        "steps",
        "skipped training steps of the stage so far, because a loss or gradient was not finite",
    ),
    MetricSpec("learner/logprob_gap_max", "nats", "largest |actor - learner| of a trained token"),
    MetricSpec("learner/logprob_gap_mean", "nats", "mean |actor - learner| of the trained tokens"),
    MetricSpec("learner/padding_share", "share", "share of the micro-batch positions that are padding"),
    MetricSpec("learner/dual_clip_fraction", "share", "share of the trained tokens whose loss reached the dual clip"),
    MetricSpec(
        "learner/importance_mean",
        "1",
        "mean probability ratio of the old policy (start of the step) to the behavior policy",
    ),
    MetricSpec("learner/importance_max", "1", "largest of these ratios, before truncation"),
    MetricSpec("learner/importance_truncated", "share", "share of the trained tokens whose ratio was truncated"),
    MetricSpec("learner/empty_terms", "terms", "terms without any data in an update, mean over the updates"),
    *_term_specs(),
    MetricSpec(
        "preference/accuracy",
        "share",
        "share of the pairs whose chosen side gained more over the reference policy than the rejected side",
    ),
    MetricSpec("preference/margin", "nats", "log-ratio of the chosen side minus log-ratio of the rejected side, mean"),
    MetricSpec("preference/chosen_logratio", "nats", "log-ratio of the chosen side to the reference policy, mean"),
    MetricSpec("preference/rejected_logratio", "nats", "the same for the rejected side"),
    MetricSpec("preference/chosen_logprob", "nats", "log-probability of the compared tokens of the chosen side, mean"),
    MetricSpec("preference/rejected_logprob", "nats", "the same for the rejected side"),
    MetricSpec(
        "preference/left_out", "pairs", "pairs of sibling nodes left out because one node begins with the other"
    ),
    MetricSpec(
        "ranking/accuracy",
        "share",
        "share of the pairs of a right and a wrong answer of a prompt that are in order, mean",
    ),
    MetricSpec(
        "value/explained_variance",
        "share",
        "share of the variance of the returns that the critic explains at the start of the step",
    ),
    MetricSpec("value/mean", "1", "mean of the critic's values"),
    MetricSpec("value/squared_error", "1", "squared error of the critic in the updates, mean"),
    MetricSpec("value/clipped_fraction", "share", "share of the values that moved by more than objective.value.clip"),
    MetricSpec("weights/publish_bytes", "bytes", "bytes of parameters sent to one actor in a publish"),
    MetricSpec("weights/probe_gap_max", "nats", "largest |actor - learner| on the probe after a publish"),
    MetricSpec("weights/publish_s", "s", "time from the offer of a version to the last acknowledgement", True),
    MetricSpec("time/rollout_s", "s", "time spent waiting for trajectories", True),
    MetricSpec("time/learn_s", "s", "time of the learner's call", True),
    MetricSpec("time/publish_s", "s", "time that the step waits for publishes", True),
    MetricSpec("time/checkpoint_s", "s", "time to write a checkpoint", True),
    MetricSpec("time/evaluate_s", "s", "time of the held-out evaluation", True),
    MetricSpec("time/step_s", "s", "time of the whole training step", True),
    MetricSpec("process/actor_restarts", "actors", "actors lost and replaced since this command started", True),
    MetricSpec(
        "process/learner_restarts",
        "restarts",
        "restarts of the learner from a checkpoint since this command started",
        True,
    ),
    MetricSpec(
        "process/failed_saves", "saves", "checkpoints that could not be written since this command started", True
    ),
    MetricSpec("process/driver_rss_mib", "MiB", "resident memory of the driver", True),
)

METRICS: Mapping[str, MetricSpec] = {spec.name: spec for spec in _SPECS}
HISTOGRAMS: Mapping[str, str] = {
    "rollout/completion_lengths": "lengths of the step's sampled completions, tokens",
    "rollout/rewards": "rewards of the step's sampled trajectories with a verdict",
    "rollout/group_rewards": "mean reward of each sampled group: groups at either end teach nothing",
}
TEXTS: Mapping[str, str] = {
    "rollout/samples": "the best and the worst trajectory of a group of the step",
    "search/tree": "a searched tree: a star marks the way to a right answer",
}
"""Histograms and texts that only TensorBoard gets, with their meanings."""

REWARDS = "rewards/"
"""Prefix of the metrics whose names the config gives: one for each reward function, and rewards/task."""


def spec_of(name: str) -> MetricSpec | None:
    """Return the metric with a name, or None if there is none."""
    if name.startswith(REWARDS):
        part = name.removeprefix(REWARDS)
        return MetricSpec(name, "1", f"mean reward {part} without its weight, over the trajectories that have one")
    return METRICS.get(name)


class MetricsWriter:
    """The writer of metrics: one row for each training step in `metrics.jsonl`, and the same numbers in `tensorboard/`.

    A row has the keys "stage" and "step", then metrics in the order of the registry. An evaluation at the start of a
    stage is a row of step 0. TensorBoard's x axis is the weight version, so the stages follow one another.

    The constructor removes rows of versions above `resume_version`, and a last line that a kill cut short, so the file
    of a resumed run equals the file of an uninterrupted run. A row of exactly `resume_version` may have been written
    before or after the checkpoint, so writing it again has no effect.

    Args:
        run_dir: the run directory.
        resume_version: weight version of the checkpoint that the run continues from; -1 for a new run.
        say: called with a message when rows or events cannot be written and wait in memory.
        settings: the main settings of the run, for TensorBoard's tab HParams.
    Raises:
        DamagedFileError: a line of metrics.jsonl is not a row.
        CheckpointError: a file cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        resume_version: int,
        say: Callable[[str], None] = lambda _text: None,
        settings: Mapping[str, bool | float | str] | None = None,
    ) -> None:
        path = RunDirectory(run_dir).metrics
        was_there, is_branch = path.exists(), RunDirectory(run_dir).resumed_from.exists()
        rows, self._file = resume_records(
            path, read_rows(path), say, version_key="weights/version", last_version=resume_version
        )
        if was_there and not rows and resume_version > 0 and not is_branch:
            say(f"METRICS LOST, training goes on: {path}: expected rows to weight version {resume_version}, found none")
        self._written = {(row["stage"], row["step"]) for row in rows}
        self._repeatable = {(row["stage"], row["step"]) for row in rows if row["weights/version"] == resume_version}
        self._events = EventFile(RunDirectory(run_dir).tensorboard, resume_version + 1, say, _meaning)
        self._events.layout(layout())
        if settings:
            self._events.settings(hparams(settings))

    def log(self, stage: str, step: int, version: int, metrics: Mapping[str, float]) -> None:
        """Write one row. A value that is not finite becomes null, and TensorBoard does not get it.

        Raises:
            RlsysError: a name is not in the registry, or the row was written before.
        """
        unknown = sorted(name for name in metrics if spec_of(name) is None)
        if unknown:
            raise RlsysError(f"metrics {unknown} are not in the registry, METRICS in rlsys/run/metrics.py")
        if (stage, step) in self._repeatable:
            self._repeatable.remove((stage, step))
            return
        if (stage, step) in self._written:
            raise RlsysError(f"metrics of stage {stage}, step {step} were written before")
        self._written.add((stage, step))
        row = _ordered({**metrics, "weights/version": version})
        self._file.write(json_record({"stage": stage, "step": step, **row}))
        self._events.scalars(version, {name: value for name, value in row.items() if value is not None})

    def show(
        self, version: int, histograms: Mapping[str, np.ndarray] | None = None, texts: Mapping[str, str] | None = None
    ) -> None:
        """Write histograms and texts of a weight version, by names of HISTOGRAMS and TEXTS, to TensorBoard."""
        for tag, numbers in (histograms or {}).items():
            if numbers.size:
                self._events.histogram(version, tag, numbers)
        for tag, markdown in (texts or {}).items():
            self._events.text(version, tag, markdown)

    def sync(self) -> None:
        """Flush all rows and TensorBoard events to disk.

        Raises:
            CheckpointError: rows cannot be written. Events that cannot be written only wait in memory.
        """
        with contextlib.suppress(CheckpointError):
            self._events.sync()
        self._file.sync()

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._events.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl; see `rlsys.files.read_records`.

    Raises:
        DamagedFileError: a line is not a row of metrics.
    """
    return read_records(path, _is_row, "a row with stage, step and weights/version; remove the line")


def _is_row(row: Any) -> bool:
    return {"stage", "step"} <= set(row) and isinstance(row["weights/version"], int | float)


def _meaning(tag: str) -> str:
    spec = spec_of(tag)
    return f"{spec.meaning} ({spec.unit})" if spec else {**HISTOGRAMS, **TEXTS}[tag]


def _ordered(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Return the values as Python numbers in the order of the registry, with None for values that are not finite."""
    row: dict[str, float | None] = {}
    for name in (*METRICS, *sorted(name for name in metrics if name.startswith(REWARDS))):
        if name in metrics:
            value = metrics[name]
            number = value if type(value) is int else float(value)
            row[name] = number if math.isfinite(number) else None
    return row
