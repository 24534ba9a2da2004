"""Messages about wrong values: every key of the schema, with values of wrong types."""

from __future__ import annotations

import copy
import re
from typing import Any, get_args

import pytest
from minimal_config import MINIMAL

from rlsys.config.files import parse_config
from rlsys.config.keys import all_keys
from rlsys.config.search import SearchConfig
from rlsys.config.search_values import ValueConfig
from rlsys.config.tasks import TaskConfig
from rlsys.errors import ConfigError

WRONG: tuple[Any, ...] = (
    *("no such name", "", True, -1, 1.5, 10**30, float("inf"), None),
    *([], ["a"], [1], [[]], [{"nope": 1}], {}, {"nope": 1}, {"type": "nope"}),
)
NEVER_RIGHT: tuple[Any, ...] = ([[]], [{"nope": 1}])
"""The values of WRONG that no key accepts. The others are of the right type for some keys."""
OTHER_RULE = re.compile(
    r"has no effect|give exactly one|needs a teacher|custom\.weight needs|no pairs in stage|value\.\w+ is for"
    r"|draws whole chains|must not exceed|must be a multiple|is below"
)
"""Rules between keys, which a value of the right type may break. They name the keys in their own words."""
RAW = re.compile(
    r"Input should|valid (string|dictionary|tuple|integer|number)|union|literal\[|https?://|pydantic|tuple|Config\b"
)
"""Phrases of pydantic, and names of Python."""
ALTERNATIVES: dict[str, tuple[Any, ...]] = {
    "task": get_args(get_args(TaskConfig)[0]),
    "search.value": get_args(get_args(ValueConfig)[0]),
    "search.selection": get_args(SearchConfig.model_fields["selection"].annotation),
}
NAMES = sorted({key.name for key in all_keys()} | {key.name.rpartition(".")[0] for key in all_keys()} - {""})


def with_value(name: str, value: Any) -> dict[str, Any]:
    """Return a config with a value at a dotted name; NAME and NUMBER stand for one entry."""
    values = copy.deepcopy(MINIMAL)
    for section, alternatives in ALTERNATIVES.items():
        key = name.removeprefix(f"{section}.").partition(".")[0]
        types = [each.model_fields["type"].annotation for each in alternatives if key in each.model_fields]
        if name.startswith(f"{section}.") and key != "type":
            put(values, f"{section}.type", get_args(types[0])[0])
    put(values, name, value)
    return values


def put(values: dict[str, Any], name: str, value: Any) -> None:
    """Set a value at a dotted name."""
    node: Any = values
    *parts, last = name.split(".")
    for place, part in enumerate(parts):
        after = [*parts, last][place + 1]
        inner: Any = [{}] if after == "NUMBER" else {}
        if part == "NUMBER":
            node = node[0]
        else:
            node[part] = inner if after == "NUMBER" or not isinstance(node.get(part), dict) else node[part]
            node = node[part]
    node[0 if last == "NUMBER" else last] = value


@pytest.mark.parametrize("name", NAMES)
def test_every_key_says_what_is_wrong_with_a_value(name: str) -> None:
    named = []
    path = name.replace("NUMBER", "0")
    for value in WRONG:
        try:
            parse_config(with_value(name, value), "c.yaml")
        except ConfigError as error:
            message = error.message
            assert message.startswith("c.yaml: ") and "\n" not in message
            assert not RAW.search(message)
            for fault in message.split("; c.yaml: "):
                assert fault.count("found") <= 1
            missing = re.compile(rf"c\.yaml: {re.escape(path.rpartition('.')[0])}\.\w+: missing; expected ")
            assert path in message or missing.match(message) or OTHER_RULE.search(message), value
            named += [value] if path in message else []
    assert [value for value in NEVER_RIGHT if value not in named] == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stages", "online", "expected a list, each entry one of warm_start, search, sft, preference, online, found "
         "'online'; a list is written [online]"),
        ("stages", ["onlin"], "stages.0: expected one of warm_start, search, sft, preference, online, found 'onlin'; "
         "did you mean online?"),
        ("task", {"type": "dataste"}, "task.type: expected one of letter_count, blocksworld, countdown, sums, guess, "
         "dataset, benchmark, reasoning_gym, custom, found 'dataste'; did you mean dataset?"),
        ("task", {}, "task.type: missing; expected one of letter_count, "),
        ("search.value", {"fn": "x"}, "search.value.type: missing; expected one of steps, agreement, "),
        ("search.value", {"type": "function", "fn": "x"}, "search.value.fn: expected `module:name` or `file.py:name`, "
         "found 'x'"),
        ("objective.policy.estimator", "gpro", "objective.policy.estimator: expected one of grpo, dr_grpo, rloo, "
         "reinforce_pp, reinforce_pp_baseline, gae, or `module:name` or `file.py:name` of your own, found 'gpro'; did "
         "you mean grpo?"),
        ("environment.fn", "calculater", "environment.fn: expected one of calculator, guess, multi_if, or "
         "`module:name` or `file.py:name` of your own, or null, found 'calculater'; did you mean calculator?"),
        ("train", None, "train: expected a section with keys such as max_steps, groups_per_step, group_size, "
         "updates_per_step, found nothing (null); leave the name of the section out, or write keys below it"),
        ("run.seed", True, "run.seed: expected a whole number, found true; YAML reads yes, no, on and off as true or "
         "false"),
        ("model.lora", {"target_modules": "all"}, "model.lora.target_modules: expected a list, each entry a text, or "
         "all-linear, found 'all'; "),
        ("rewards.functions", [{"fn": "lenght"}], "rewards.functions.0.fn: expected one of format, length, or "
         "`module:name` or `file.py:name` of your own, found 'lenght'; did you mean length?"),
        ("run", None, "run: expected a section with keys such as dir, seed, resume, device, found nothing (null); "
         "write keys below it"),
        ("task", None, "reasoning_gym, custom, found nothing (null); write keys below it"),
        ("run.device", "gpu", "run.device: expected one of cpu, cuda, found 'gpu'; did you mean cuda?"),
        ("learner.dtype", "float32", "found 'float32'; did you mean fp32?"),
        ("rewards.functions", "a.py:b", "found 'a.py:b'; a list is written [{fn: a.py:b}]"),
        ("rewards.functions", ["a.py:b"], "found 'a.py:b'; write {fn: a.py:b}"),
        ("rewards.functions", [{"fnn": "a.py:b"}], "rewards.functions.0.fnn: unknown key; did you mean "
         "rewards.functions.0.fn?"),
        ("search.nodes", {"tool": {"tagg": "x"}}, "search.nodes.tool.tagg: unknown key; did you mean "
         "search.nodes.tool.tag?"),
        ("train.max_steps", 1.5, "train.max_steps: expected a whole number, found 1.5"),
    ],
)  # fmt: skip
def test_some_messages(name: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(with_value(name, value), "c.yaml")
    assert message in caught.value.message


def test_a_key_that_is_no_text() -> None:
    with pytest.raises(ConfigError, match="expected a text as the name of a key, found 1; put it in quotes"):
        parse_config({**MINIMAL, "train": {1: 2}}, "c.yaml")
