"""The list of config keys is complete, has the effective defaults, and suggests keys for typing errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlsys.config.files import dump_config, parse_config
from rlsys.config.keys import Key, all_keys, suggestion
from rlsys.config.other_names import OTHER_NAMES
from rlsys.errors import ConfigError

SMALLEST = {"run": {"dir": "d"}, "model": {"from_scratch": {}}, "task": {"type": "letter_count"}}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def test_every_key_of_a_dumped_config_is_listed_with_its_default() -> None:
    # parse_config and dump_config give the same names and defaults independently.
    dumped = flat(yaml.safe_load(dump_config(parse_config(SMALLEST, "test"))))
    keys = {key.name: key for key in reversed(all_keys())}  # the first alternative of task wins: letter_count
    assert set(dumped) <= set(keys)
    for name, value in dumped.items():
        if name not in ("run.dir", "task.questions_path"):
            assert yaml.safe_load(keys[name].default) in (value, str(value)), name


def test_every_key_has_a_meaning() -> None:
    assert [key.name for key in all_keys() if not key.meaning] == []


def test_some_keys() -> None:
    keys = all_keys()
    assert Key("run.device", "cpu | cuda", "cpu", "Device of the engines and learner ranks.") in keys
    task_types = ["letter_count", "blocksworld", "countdown", "sums", "guess", "dataset"]
    task_types += ["benchmark", "reasoning_gym", "custom"]
    assert [key.default for key in keys if key.name == "task.type"] == task_types
    assert [key.default for key in keys if key.name == "run.dir"] == ["required"]
    # The optimizer of every stage has separate defaults.
    rates = {key.name: key.default for key in keys if key.name.endswith("learning_rate")}
    assert rates == {
        "warm_start.optimizer.learning_rate": "0.001",
        "sft.optimizer.learning_rate": "0.0001",
        "preference.optimizer.learning_rate": "2e-05",
        "train.optimizer.learning_rate": "0.0001",
        "train.critic_optimizer.learning_rate": "0.0003",
    }


def test_keys_of_mappings_and_lists_of_sections() -> None:
    keys = {key.name: key for key in all_keys()}
    assert (keys["search.nodes"].type, keys["search.nodes"].default) == ("{name: section}", "{}")
    assert keys["search.nodes.NAME.tag"].default == "required"
    assert keys["search.tables.NAME.children"].type == "{name: {name: whole number}}"
    assert (keys["search.stop.correct"].type, keys["search.stop.correct"].default) == (
        "list of section",
        "[{count: 8, after: 0}, {count: 4, after: 32}]",
    )
    assert keys["search.stop.correct.NUMBER.after"].default == "0"
    assert keys["rewards.functions.NUMBER.arguments"].default == "{}"
    assert keys["search.max_depth"].type == "whole number | null"
    # Without quotes, YAML would read a mapping.
    assert yaml.safe_load(keys["search.model.question_template"].default) == "{question}"


def test_keys_of_alternatives_name_the_alternative() -> None:
    kinds = [key for key in all_keys() if key.name == "search.selection.type"]
    assert [(key.type, key.default) for key in kinds] == [
        ("ucb", "ucb"),
        ("puct", "required"),
        ("frontier", "required"),
        ("surprise", "required"),
        ("revision", "required"),
    ]
    assert kinds[1].meaning == "With `puct`, the keys that follow."


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "search.selection.form",
            "it belongs to another search.selection.type; `rlsys keys search.selection` shows all",
        ),
        ("search.nodes.mine.tagg", "did you mean search.nodes.mine.tag? `rlsys keys` shows all"),
        ("rewards.functions.0.fnn", "did you mean rewards.functions.0.fn? `rlsys keys` shows all"),
        ("train.max_step", "did you mean train.max_steps? `rlsys keys` shows all"),
        ("train.num_generations", "did you mean train.group_size? `rlsys keys` shows all"),
        (
            "grpo.beta",
            "did you mean objective.kl.weight or objective.distill.beta or objective.preference.beta? "
            "`rlsys keys` shows all",
        ),
        ("trains", "did you mean train? `rlsys keys` shows all"),
        (
            "max_steps",
            "did you mean preference.max_steps or sft.max_steps or train.max_steps or warm_start.max_steps? "
            "`rlsys keys` shows all",
        ),
        ("task.split", "it belongs to another task.type; `rlsys keys task` shows all"),
        ("qqqq", "`rlsys keys` shows all"),
    ],
)
def test_suggestion(name: str, expected: str) -> None:
    assert suggestion(name) == expected


def test_an_unknown_key_comes_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"^f: train\.max_step: unknown key; did you mean train\.max_steps\?"):
        parse_config({**SMALLEST, "train": {"max_step": 3}}, "f")


def test_an_unknown_key_of_an_alternative_is_named_as_in_the_file() -> None:
    selection = {"type": "puct", "form": "code"}
    with pytest.raises(
        ConfigError, match=r"^f: search\.selection\.form: unknown key; it belongs to another search\.sel"
    ):
        parse_config({**SMALLEST, "search": {"selection": selection}}, "f")


def test_names_of_other_systems_lead_to_keys_and_are_on_their_page() -> None:
    assert set(OTHER_NAMES.values()) <= {key.name for key in all_keys()}
    page = (Path(__file__).parents[3] / "docs" / "other_names.md").read_text(encoding="utf-8")
    rows = [re.findall("`(.+?)`", line) for line in page.splitlines() if line.startswith("| `")]
    assert {name: key for key, *names in rows for name in names} == OTHER_NAMES
