"""Charts of TensorBoard's tab Custom Scalars, and the settings in its tab HParams."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlsys.config.files import flat_fields, select_fields
from rlsys.config.schema import Config

# Metrics with the ends of their 95 % interval, which have the endings _low and _high.
INTERVALS = ("held_out/sampled_accuracy", "held_out/greedy_accuracy", "rollout/reward")
# Charts by category, for TensorBoard and `rlsys view`. A chart draws one metric with its interval, or the metrics that
# match its patterns.
CHARTS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "Progress": {  # TensorBoard draws the charts with intervals behind the others, the last one first
        "reward of the step (95 % interval)": ["rollout/reward"],
        "held-out accuracy, greedy (95 % interval)": ["held_out/greedy_accuracy"],
        "held-out accuracy, sampled (95 % interval)": ["held_out/sampled_accuracy"],
    },
    "Health": {
        "no answer, truncated, groups without a signal": [
            "rollout/(no_answer_rate|truncated_rate|zero_advantage_groups)$"
        ],
        "completion length, tokens": ["rollout/completion_length(_max)?$"],
        "KL and entropy, nats": ["learner/(kl|entropy)$"],
        "actor against learner, nats": ["learner/logprob_gap_(max|mean)$", "weights/probe_gap_max$"],
        "staleness, training steps": ["rollout/staleness_(mean|max)$"],
        "searched prompts: solved, reward": ["search/(solved|reward)$"],
        "parts of the reward": ["rewards/.*"],
    },
    "Losses": {
        "loss, and loss by term": ["learner/loss$", "objective/.*_loss$"],
        "share of the gradient by term": ["objective/.*_grad_share$"],
        "gradient norm": ["learner/grad_norm$"],
    },
    "Time": {
        "times of a step, s": ["time/.*_s$"],
        "tokens per second": ["(rollout|learner)/tokens_per_s$"],
        "idle share of the engines": ["rollout/idle_.*"],
    },
}
# The keys that people compare runs by.
SETTINGS = (
    "run.seed",
    "model.path",
    "task.type",
    "sampling.temperature",
    "sampling.max_tokens",
    "train.groups_per_step",
    "train.group_size",
    "train.updates_per_step",
    "train.max_staleness",
    "train.max_steps",
    "train.optimizer.learning_rate",
    "objective.policy.estimator",
    "objective.policy.surrogate",
    "objective.policy.clip_low",
    "objective.policy.clip_high",
    "objective.policy.weight",
    "objective.kl.weight",
    "objective.value.weight",
    "objective.preference.weight",
    "objective.sft.weight",
    "objective.distill.weight",
    "search.fraction",
)
COMPARED = ("held_out/sampled_accuracy", "held_out/greedy_accuracy", "held_out/pass_at_k", "rollout/reward")


def main_settings(config: Config) -> dict[str, bool | float | str]:
    """Return the stages and the keys of SETTINGS that have a value."""
    fields = select_fields(flat_fields(config.model_dump(mode="json")), SETTINGS)
    values = {name: fields[name] for name in SETTINGS if fields.get(name) is not None}
    values = {
        name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for name, value in values.items()
    }
    return {"stages": " ".join(config.stages), **values}


def layout() -> Any:
    """Return CHARTS as the layout of the tab Custom Scalars."""
    from tensorboard.plugins.custom_scalar import layout_pb2 as proto

    def chart(title: str, tags: Sequence[str]) -> Any:
        if tags[0] not in INTERVALS:
            return proto.Chart(title=title, multiline=proto.MultilineChartContent(tag=tags))
        series = proto.MarginChartContent.Series(value=tags[0], lower=f"{tags[0]}_low", upper=f"{tags[0]}_high")
        return proto.Chart(title=title, margin=proto.MarginChartContent(series=[series]))

    categories = [
        proto.Category(title=title, chart=[chart(name, tags) for name, tags in charts.items()])
        for title, charts in CHARTS.items()
    ]
    return proto.Layout(category=categories)


def hparams(settings: Mapping[str, bool | float | str]) -> dict[str, Any]:
    """Return settings and the names of the compared metrics as plugin data of the tab HParams."""
    from tensorboard.plugins.hparams import api_pb2, metadata
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

    experiment, start = api_pb2.Experiment(), SessionStartInfo()
    for name, value in settings.items():
        info = experiment.hparam_infos.add(name=name)
        if isinstance(value, bool):
            info.type, start.hparams[name].bool_value = api_pb2.DATA_TYPE_BOOL, value
        elif isinstance(value, str):
            info.type, start.hparams[name].string_value = api_pb2.DATA_TYPE_STRING, value
        else:
            info.type, start.hparams[name].number_value = api_pb2.DATA_TYPE_FLOAT64, value
    for tag in COMPARED:
        experiment.metric_infos.add(name=api_pb2.MetricName(tag=tag))
    return {
        metadata.EXPERIMENT_TAG: HParamsPluginData(experiment=experiment),
        metadata.SESSION_START_INFO_TAG: HParamsPluginData(session_start_info=start),
    }
