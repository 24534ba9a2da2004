"""What TensorBoard shows besides the curves, as it reads it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from resumable_runs import config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from rlsys.run.charts import CHARTS, COMPARED, INTERVALS, SETTINGS, main_settings
from rlsys.run.metrics import HISTOGRAMS, METRICS, REWARDS, TEXTS, MetricsWriter


def read(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0, "histograms": 0, "scalars": 0})
    return events.Reload()


def write(run_dir: Path, versions: range, resume_version: int, settings: Any = None) -> None:
    writer = MetricsWriter(run_dir, resume_version, settings=settings)
    for version in versions:
        writer.show(version, {"rollout/rewards": np.array([0.0, 1.0, 1.0])}, {"rollout/samples": f"text {version}"})
        writer.log("online", version, version, {"rollout/reward": 0.5})
    writer.close()


@pytest.mark.parametrize("pattern", [tag for charts in CHARTS.values() for tags in charts.values() for tag in tags])
def test_every_chart_draws_metrics_of_the_registry(pattern: str) -> None:
    assert any(re.match(pattern, name) for name in (*METRICS, f"{REWARDS}task"))
    if pattern in INTERVALS:
        assert {f"{pattern}_low", f"{pattern}_high"} <= set(METRICS)


def test_names_of_other_views_are_known() -> None:
    assert set(COMPARED) <= set(METRICS)
    assert not (set(HISTOGRAMS) | set(TEXTS)) & set(METRICS)  # a tag has one plugin
    assert set(SETTINGS) <= {*main_settings(config()), "model.path"}


def test_layout_and_settings_reach_tensorboard(tmp_path: Path) -> None:
    settings = main_settings(config())
    write(tmp_path, range(1, 3), -1, settings)
    events = read(tmp_path)
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(CHARTS)
    margin = layout.category[0].chart[0].margin.series[0]
    assert (margin.value, margin.lower) == ("rollout/reward", "rollout/reward_low")

    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert set(start.hparams) == set(settings)
    assert start.hparams["train.group_size"].number_value == settings["train.group_size"]
    assert start.hparams["stages"].string_value == settings["stages"]


def test_tags_have_their_meaning(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3), -1)
    events = read(tmp_path)
    assert events.SummaryMetadata("rollout/reward").summary_description == f"{METRICS['rollout/reward'].meaning} (1)"
    assert events.SummaryMetadata("rollout/samples").plugin_data.plugin_name == "text"


def test_a_resumed_run_shows_every_version_once(tmp_path: Path) -> None:
    """Killed after version 5, resumed from the checkpoint of version 3."""
    write(tmp_path, range(1, 6), -1)
    write(tmp_path, range(4, 9), 3)
    events = read(tmp_path)
    assert [event.step for event in events.Scalars("rollout/reward")] == list(range(1, 9))
    assert [event.step for event in events.Histograms("rollout/rewards")] == list(range(1, 9))
    shown = PluginAccumulator(str(tmp_path / "tensorboard"), tensor_size_guidance={"text": 0, "scalars": 0}).Reload()
    texts = [(event.step, event.tensor_proto.string_val[0].decode()) for event in shown.Tensors("rollout/samples")]
    assert [event.step for event in shown.Tensors("rollout/reward")] == list(range(1, 9))
    assert texts == [(version, f"text {version}") for version in range(1, 9)]


def test_a_histogram_keeps_all_numbers(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, -1)
    numbers = {1: np.array([2.0, 4.0, 4.0, 9.0]), 2: np.array([3.0, 3.0]), 3: np.array([])}
    for version, values in numbers.items():
        writer.show(version, {"rollout/completion_lengths": values})
    writer.close()
    first, second = read(tmp_path).Histograms("rollout/completion_lengths")
    histogram = first.histogram_value
    assert (histogram.min, histogram.max, histogram.num, histogram.sum) == (2, 9, 4, 19)
    assert histogram.sum_squares == 4 + 16 + 16 + 81
    assert sum(histogram.bucket) == 4
    assert (second.histogram_value.min, second.histogram_value.max) == (3, 3)


def test_a_distribution_of_numbers_that_differ_by_rounding_is_one_bucket(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, -1)
    writer.show(1, {"rollout/rewards": np.array([0.3, 0.1 + 0.2]), "rollout/completion_lengths": np.array([7.0])})
    writer.close()
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    [shown] = accumulator.Histograms("rollout/rewards")
    assert shown.histogram_value.bucket == [2.0]
