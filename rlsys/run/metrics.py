"""THE list of metric names, and the writer of metrics.jsonl and TensorBoard events.

Both files carry the names of `METRICS` and no others. A metric is `volatile` where two runs with the same
config and seed may differ in it: times, rates and sizes that depend on the machine.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.directory import RunDirectory
from rlsys.errors import CheckpointError, RlsysError
from rlsys.files import RecordFile, json_record, read_records, resume_records


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One metric. unit: "1" for counts' ratios and plain numbers."""

    name: str
    unit: str
    meaning: str
    volatile: bool = False


def _term_specs() -> list[MetricSpec]:
    """What is logged of every term of the joint loss."""
    counted = {
        "policy": "by aggregation",
        "kl": "by aggregation",
        "value": "tokens",
        "preference": "pairs",
        "sft": "tokens",
    }
    found = []
    for term, unit in counted.items():
        name = f"objective/{term}"
        found += [
            MetricSpec(f"{name}_loss", "1", f"loss of the term {term} over its own count, mean over the updates"),
            MetricSpec(f"{name}_weight", "1", f"weight of the term {term} in this step"),
            MetricSpec(f"{name}_denominator", unit, f"what the term {term} is divided by in an update, mean"),
            MetricSpec(f"{name}_share", "share", f"of all targets and pairs of the step, those of the term {term}"),
            MetricSpec(f"{name}_grad_norm", "1", f"norm of the weighted gradient of the term {term}, {_where(term)}"),
        ]
        if term != "value":
            share = f"that of the term {term}, over the sum of those of all terms"
            found.append(MetricSpec(f"{name}_grad_share", "share", share))
    return found


def _where(term: str) -> str:
    """The critic has a model of its own, and its whole gradient is known anyway."""
    return "all of the critic" if term == "value" else "in the last layer, now and then"


_SPECS = (
    MetricSpec("weights/version", "steps", "finished training steps of all stages"),
    MetricSpec("rollout/reward", "1", "mean reward of the step's sampled trajectories with a verdict"),
    MetricSpec("rollout/accuracy", "share", "trajectories whose outcome is ok"),
    MetricSpec("rollout/no_answer_rate", "share", "trajectories that the verifier found without a valid answer"),
    MetricSpec("rollout/truncated_rate", "share", "trajectories that reached the token limit"),
    MetricSpec("rollout/completion_length", "tokens", "mean length of the completions"),
    MetricSpec("rollout/completion_length_max", "tokens", "longest completion of the step"),
    MetricSpec("rollout/group_reward_std", "1", "standard deviation of the rewards of a group, mean"),
    MetricSpec("rollout/zero_advantage_groups", "share", "sampled groups whose judged rewards are all equal"),
    MetricSpec("rollout/failed", "groups", "failed rollouts of the run so far, searches included"),
    MetricSpec("rollout/verifier_errors", "trajectories", "verifications that raised or ran out of time"),
    MetricSpec("rollout/filtered", "groups", "groups without a learning signal that were replaced, of the run so far"),
    MetricSpec("rollout/filtered_tokens", "tokens", "tokens that were generated for them"),
    MetricSpec("rollout/tokens", "tokens", "generated tokens of the step's sampled groups"),
    MetricSpec(
        "rollout/generated_tokens",
        "tokens",
        "all that engines generated for the step: sampled, searched by all writers, replaced and failed",
    ),
    MetricSpec(
        "rollout/tokens_per_s", "tokens/s", "generated tokens over the seconds an engine worked, all actors", True
    ),
    MetricSpec("rollout/prefix_cache_hits", "share", "prompt tokens that the engines' prefix caches had", True),
    MetricSpec(
        "rollout/idle_policy", "share", "time since the step before in which an actor's engine did nothing", True
    ),
    MetricSpec("rollout/idle_model", "share", "the same, of the engines of search.model", True),
    MetricSpec("rollout/idle_reviewer", "share", "the same, of the engines of search.reviewer", True),
    MetricSpec("rollout/staleness_mean", "steps", "training steps from sampling or search to training, mean"),
    MetricSpec("rollout/staleness_max", "steps", "the same, largest"),
    MetricSpec("search/trees", "trees", "prompts of the step that were searched"),
    MetricSpec("search/solved", "share", "trees with a correct answer"),
    MetricSpec("search/reward", "1", "mean reward of the scored answers; 0 without any"),
    MetricSpec("search/simulations", "simulations", "simulations of the step's trees"),
    MetricSpec("search/calls", "calls", "completions asked of engines"),
    MetricSpec("search/tokens", "tokens", "tokens that all writers generated"),
    MetricSpec("search/scored", "answers", "distinct answers with a verdict"),
    MetricSpec("search/correct", "answers", "distinct correct answers"),
    MetricSpec("search/defects", "nodes", "nodes that nothing may follow: cut short, not closed, out of the pattern"),
    MetricSpec("search/duplicates", "nodes", "draws of a node that its parent had already"),
    MetricSpec("search/backtracks", "nodes", "nodes put there after a wrong answer"),
    MetricSpec("search/verifier_errors", "answers", "verifications that raised or ran out of time"),
    MetricSpec("search/trained_share", "share", "generated tokens that the policy loss trains"),
    MetricSpec("search/pairs", "pairs", "preference pairs of whole chains"),
    MetricSpec("search/step_preferences", "pairs", "preference pairs of sibling nodes"),
    MetricSpec("search/demonstrations", "chains", "correct chains to imitate"),
    MetricSpec("held_out/greedy_accuracy", "share", "held-out problems solved by greedy decoding"),
    MetricSpec("held_out/greedy_no_answer_rate", "share", "greedy completions without a valid answer"),
    MetricSpec("held_out/sampled_accuracy", "share", "samples at temperature 1 that solve their problem"),
    MetricSpec("held_out/sampled_no_answer_rate", "share", "samples without a valid answer"),
    MetricSpec("held_out/pass_at_k", "share", "held-out problems solved by one of k samples or more"),
    MetricSpec("held_out/verifier_error_rate", "share", "held-out verifications that raised or ran out of time"),
    MetricSpec("held_out/completion_length", "tokens", "mean length of the held-out completions"),
    MetricSpec("learner/loss", "1", "joint loss, mean over the step's updates"),
    MetricSpec(
        "learner/kl", "nats", "estimate of the divergence from the reference policy, per token (objective.kl.estimator)"
    ),
    MetricSpec("learner/entropy", "nats", "mean entropy of the policy on trained tokens"),
    MetricSpec("learner/grad_norm", "1", "global gradient norm before clipping, mean over the updates"),
    MetricSpec("learner/clip_low_fraction", "share", "trained tokens whose ratio was clipped from below"),
    MetricSpec("learner/clip_high_fraction", "share", "trained tokens whose ratio was clipped from above"),
    MetricSpec("learner/ratio_max", "1", "largest probability ratio of a trained token"),
    MetricSpec("learner/learning_rate", "1", "learning rate of the policy, mean over the step's updates"),
    MetricSpec("learner/tokens", "tokens", "tokens of the step's rows, prompts included"),
    MetricSpec("learner/tokens_per_s", "tokens/s", "real tokens over the learning time, all ranks", True),
    MetricSpec("learner/updates", "updates", "optimizer updates of the step"),
    MetricSpec(
        "learner/skipped_steps", "steps", "training steps of the stage so far left out: a loss or gradient not finite"
    ),
    MetricSpec("learner/logprob_gap_max", "nats", "largest |actor - learner| of a trained token"),
    MetricSpec("learner/logprob_gap_mean", "nats", "mean |actor - learner| of the trained tokens"),
    MetricSpec("learner/padding_share", "share", "positions of the micro-batches that are padding"),
    MetricSpec("learner/dual_clip_fraction", "share", "trained tokens whose term reached the dual clip"),
    MetricSpec("learner/importance_mean", "1", "mean ratio of the policy at the start of the step to the sampler"),
    MetricSpec("learner/importance_max", "1", "largest of these ratios, before truncation"),
    MetricSpec("learner/importance_truncated", "share", "trained tokens whose ratio was truncated"),
    MetricSpec("learner/empty_terms", "terms", "terms that an update had nothing for, mean over the updates"),
    *_term_specs(),
    MetricSpec("preference/accuracy", "share", "pairs whose chosen side gained more than the rejected one"),
    MetricSpec("preference/margin", "nats", "mean difference of what chosen and rejected side gained"),
    MetricSpec("preference/chosen_logratio", "nats", "what the chosen side gained over the reference policy, mean"),
    MetricSpec("preference/rejected_logratio", "nats", "the same of the rejected side"),
    MetricSpec("preference/chosen_logprob", "nats", "log-probability of the compared tokens of the chosen side, mean"),
    MetricSpec("preference/rejected_logprob", "nats", "the same of the rejected side"),
    MetricSpec(
        "preference/left_out", "pairs", "pairs of sibling nodes of which one begins with the other: not compared"
    ),
    MetricSpec("value/explained_variance", "share", "of the returns, by the critic at the start of the step"),
    MetricSpec("value/mean", "1", "mean of the critic's estimates"),
    MetricSpec("value/squared_error", "1", "mean squared error of the critic in the updates"),
    MetricSpec("value/clipped_fraction", "share", "estimates that moved past objective.value.clip"),
    MetricSpec("weights/publish_bytes", "bytes", "parameters sent to one actor in a publish"),
    MetricSpec("weights/probe_gap_max", "nats", "largest |actor - learner| on the probe after a publish"),
    MetricSpec("weights/publish_s", "s", "from the offer of a version to the last acknowledgement", True),
    MetricSpec("time/rollout_s", "s", "waiting for trajectories", True),
    MetricSpec("time/learn_s", "s", "the learner's call", True),
    MetricSpec("time/publish_s", "s", "export and publish of the new weights", True),
    MetricSpec("time/checkpoint_s", "s", "writing a checkpoint", True),
    MetricSpec("time/evaluate_s", "s", "held-out evaluation", True),
    MetricSpec("time/step_s", "s", "the whole training step", True),
    MetricSpec("process/actor_restarts", "actors", "lost and replaced since this command began", True),
    MetricSpec(
        "process/learner_restarts", "restarts", "of the learner from a checkpoint since this command began", True
    ),
    MetricSpec("process/failed_saves", "saves", "checkpoints not written since this command began", True),
    MetricSpec("process/driver_rss_mib", "MiB", "resident memory of the driver", True),
)

METRICS: Mapping[str, MetricSpec] = {spec.name: spec for spec in _SPECS}


class MetricsWriter:
    """Appends one row a training step to `metrics.jsonl` and the same numbers to `tensorboard/`.

    A row is {"stage", "step", then metrics in the order of the registry}; evaluations at the start of a stage
    are rows of step 0. TensorBoard's x axis is the weight version, so all stages follow one another.

    On construction the rows of versions above `resume_version`, and a last line that a kill cut short, are
    dropped, so that the file of a resumed run equals that of an undisturbed one. A row of exactly
    `resume_version` may date from before or after the checkpoint: writing it again changes nothing.

    Args:
        run_dir: the run directory.
        resume_version: weight version of the checkpoint the run continues from, -1 for a new run.
        say: is told when rows or events cannot be written and wait for the next one.
    Raises:
        RlsysError: a line of metrics.jsonl is not a row, or a file cannot be written.
    """

    def __init__(self, run_dir: Path, resume_version: int, say: Callable[[str], None] = lambda _text: None) -> None:
        path = RunDirectory(run_dir).metrics
        rows, self._file = resume_records(
            path, read_rows(path), say, version_key="weights/version", last_version=resume_version
        )
        self._written = {(row["stage"], row["step"]) for row in rows}
        self._repeatable = {(row["stage"], row["step"]) for row in rows if row["weights/version"] == resume_version}
        self._events = _EventFile(RunDirectory(run_dir).tensorboard, purge_step=resume_version + 1, say=say)

    def log(self, stage: str, step: int, version: int, metrics: Mapping[str, float]) -> None:
        """Write one row. A value that is not finite becomes null, and is left out of TensorBoard.

        Raises:
            RlsysError: a name is not in the registry, or the row exists.
        """
        unknown = sorted(set(metrics) - set(METRICS))
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

    def sync(self) -> None:
        """Bring all rows to disk, and TensorBoard's events, which are held in memory until they are there.

        Raises:
            CheckpointError: rows cannot be written. Events are for the eye and wait.
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
        CheckpointError: a line is not a row of metrics.
    """
    return read_records(path, _is_row, "a row with stage, step and weights/version; remove the line")


def _is_row(row: Any) -> bool:
    return {"stage", "step"} <= set(row) and isinstance(row["weights/version"], int | float)


def _ordered(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Values in the order of the registry as Python numbers, None where not finite."""
    row: dict[str, float | None] = {}
    for name in METRICS:
        if name in metrics:
            value = metrics[name]
            number = value if type(value) is int else float(value)
            row[name] = number if math.isfinite(number) else None
    return row


class _EventFile:
    """One TensorBoard event file. Written with the tensorboard package alone: its torch wrapper loads torch.

    A resumed run adds a file. TensorBoard reads the files in the order of their names, and the session start
    at `purge_step` makes it forget what earlier files hold from that step on.
    """

    def __init__(self, folder: Path, purge_step: int, say: Callable[[str], None]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        before = len(list(folder.glob("events.out.tfevents.*")))
        paths = (folder / f"events.out.tfevents.{number:010d}" for number in itertools.count(before))
        self._file = RecordFile(next(path for path in paths if not path.exists()), say)
        self._records = RecordWriter(self._file)  # which writes a record in one piece
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        summary = self._summary(
            value=[self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        )
        self._write(self._event(step=step, summary=summary))

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()  # noqa: TID251 - only shown to people, by TensorBoard
        self._records.write(event.SerializeToString())
