"""Configs whose processes cannot share devices are refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
from minimal_config import minimal

from rlsys.config.files import parse_config
from rlsys.errors import ConfigError

COLOCATED = {"placement": "colocated", "actors": {"count": 2}, "learner": {"ranks": 2}}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"actors": {"count": 3}}, "expected actors.count = learner.ranks, found 3 and 2"),
        ({"train": {"max_staleness": 1}}, "expected train.max_staleness 0, found 1"),
        (
            {"run": {"dir": "d", "device": "cuda"}, "actors": {"count": 2, "tensor_parallel_size": 2}},
            "expected actors.tensor_parallel_size 1, found 2",
        ),
        ({"weight_sync": {"transport": "collective"}}, "expected weight_sync.transport object_store, found collective"),
        (
            {"run": {"dir": "d", "device": "cuda"}, "learner": {"ranks": 2, "zero_stage": 0}},
            "expected learner.zero_stage 1, 2 or 3",
        ),
    ],
)
def test_what_cannot_be_colocated(values: dict[str, Any], said: str) -> None:
    parse_config(minimal(**COLOCATED), "test")
    with pytest.raises(ConfigError, match=said):
        parse_config(minimal(**{**COLOCATED, **values}), "test")
