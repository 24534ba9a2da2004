"""Write docs/metrics.md from the registry of metrics: `python -m rlsys.run.metrics_page > docs/metrics.md`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from rlsys.run.charts import CHARTS
from rlsys.run.metrics import HISTOGRAMS, METRICS, TEXTS

# Names or beginnings of names (with a star) that a user should watch, and what to look for.
ADVICE: Mapping[Sequence[str], str] = {
    ("rollout/reward", "held_out/sampled_accuracy"): "Should rise. The first is measured on the prompts of the step, "
    "the second on problems that are never trained. Their names with `_low` and `_high` are the ends of the 95 % "
    "interval.",
    ("held_out/greedy_no_answer_rate", "rollout/no_answer_rate", "rollout/truncated_rate"): "Chains that end without "
    "an answer, the fault that this project is about. If they rise together with the length, the policy loops.",
    ("rollout/zero_advantage_groups",): "Groups that are all right or all wrong teach nothing. Near 1 the task is too "
    "easy or too hard.",
    ("rollout/filtered", "rollout/filtered_tokens"): "Groups that `train.dynamic_sampling_rounds` has replaced, and "
    "what they cost.",
    ("rollout/generated_tokens",): "The cost of a step. Compare two runs at equal sums of it, not at equal steps.",
    ("objective/*_loss", "objective/*_grad_share"): "The loss of each term over its own count, and its share of the "
    "gradient norms. If one share is near 1, the other terms hardly count.",
    ("preference/accuracy", "preference/margin", "preference/chosen_logprob"): "Accuracy and margin should rise. If "
    "`chosen_logprob` falls far, the policy forgets the chains that it should prefer: raise `objective.sft.weight`.",
    ("value/explained_variance",): "Below 0 the critic is worse than a constant.",
    ("learner/entropy",): "Should fall slowly. A sudden fall means that the learning rate is too high.",
    ("learner/clip_high_fraction", "learner/clip_low_fraction", "learner/ratio_max"): "How far the updates of a step "
    "move from its first policy.",
    ("learner/importance_mean", "learner/importance_truncated"): "The old policy against the behavior policy: 1 and 0 "
    "if both are the same. Farther away, the groups are older or engine and learner disagree.",
    ("learner/logprob_gap_max", "weights/probe_gap_max"): "Actor against learner. In fp32 both stay near 1e-5; the "
    "first grows with staleness, and `rlsys view` shows at which tokens. The second is checked after every publish and "
    "ends the run above its bound.",
    ("search/solved", "search/reward", "search/correct"): "Searched prompts: share with a right answer, mean reward "
    "of the scored answers, right answers.",
    ("search/trained_share", "search/duplicates"): "Generated tokens that are trained; repeated draws of a node, "
    "which are many if the policy is certain.",
    ("rollout/staleness_max",): "Never above `train.max_staleness`.",
    ("process/actor_restarts", "process/learner_restarts", "process/failed_saves"): "0 in a healthy run. If there are "
    "more than a few, look into `logs/`.",
    ("learner/skipped_steps",): "Training steps with a loss or gradient that is not finite. 0 in a healthy run.",
    ("time/*", "rollout/tokens_per_s", "learner/tokens_per_s"): "Where the time of a step goes.",
    ("rollout/idle_policy", "rollout/prefix_cache_hits"): "Share of a step in which the engines did nothing, and "
    "share of the prompt tokens that the prefix cache had.",
}

VIEWS = """## TensorBoard

`tensorboard --logdir runs`. The tab **Custom Scalars** has the charts that a person watches, with intervals: \
{charts}. **Scalars** has every metric, grouped by the first part of its name, with its meaning. **Histograms** and \
**Text** have:

{details}

Histograms are written in every online step, texts in the first and every tenth. **HParams** compares runs by their \
main settings and their last held-out figures. A resumed run continues its curves: the steps after its checkpoint are \
shown once.

## Weights & Biases, MLflow, trackio

`run.trackers: [wandb]` (or `mlflow`, `trackio`, or several) sends the same metrics, under the same names and with the \
weight version as step, to experiment trackers. Install their packages yourself, for example \
`.venv/bin/pip install wandb`. Their own environment variables choose project, server and offline mode: \
`WANDB_PROJECT`, `WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, `TRACKIO_DIR`, \
`TRACKIO_SPACE_ID` and so on; the default project is `rlsys`.

- Each tracker runs in a process of its own that reads `metrics.jsonl`. If it fails, blocks or crashes, the run goes \
on: the driver prints one line, `logs/tracker-NAME.log` has the rest, and `trackers/NAME.json` counts the refused rows.
- `trackers/NAME.json` also keeps the id of the tracker's run. A resumed run continues that run, and what was not sent \
yet is sent then. To begin a new one, remove the file.
- Every row is sent once. After a rollback, the steps that are made again keep the numbers of the first time in the \
tracker; `metrics.jsonl` has those of the second.
- At the end of a command, a tracker has a minute to send what is left.
- W&B offline: `wandb sync RUN/trackers/wandb/offline-run-*` uploads all parts of a resumed run as one.
"""


def page() -> str:
    """Return the page as Markdown."""
    lines = [
        "# Metrics",
        "",
        "Every training step writes one row into `metrics.jsonl` and the same numbers into `tensorboard/`. The x axis "
        "of TensorBoard is the weight version, so the stages of a run follow one another. This page is made from the "
        "registry in `rlsys/run/metrics.py` by `make docs`. A run with reward functions also has `rewards/NAME` for "
        "each of them, and `rewards/task`: mean rewards without their weights ([rewards.md](rewards.md)).",
        "",
        "## What to look for",
        "",
        "| metric | what to look for |",
        "|---|---|",
        *(f"| {', '.join(f'`{name}`' for name in names)} | {advice} |" for names, advice in ADVICE.items()),
    ]
    details = "\n".join(f"- `{name}`: {meaning}" for name, meaning in {**HISTOGRAMS, **TEXTS}.items())
    charts = "; ".join(title for group in CHARTS.values() for title in group)
    lines += ["", VIEWS.format(charts=charts, details=details).rstrip()]
    prefixes = list(dict.fromkeys(name.split("/")[0] for name in METRICS))
    specs_by_prefix = sorted(METRICS.values(), key=lambda spec: prefixes.index(spec.name.split("/")[0]))
    for prefix, specs in groupby(specs_by_prefix, key=lambda spec: spec.name.split("/")[0]):
        lines += ["", f"## {prefix}", "", "| metric | unit | meaning |", "|---|---|---|"]
        lines += [f"| `{spec.name}` | {spec.unit} | {spec.meaning.replace('|', chr(92) + '|')} |" for spec in specs]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
