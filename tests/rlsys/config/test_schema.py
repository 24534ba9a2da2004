"""The schema: every mistake in one section gets one line that names the field, and every field has help."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import annotated_types
import pytest
from minimal_config import minimal
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlsys.config.files import parse_config
from rlsys.config.schema import Config, Section
from rlsys.config.tasks import DatasetConfig, LetterCountConfig
from rlsys.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "field", "text"),
    [
        ({"optimiser": {}}, "optimiser", "unknown key"),
        ({"train__group_sise": 8}, "train.group_sise", "unknown key"),
        ({"warm_start__optimizer__lr": 1e-4}, "warm_start.optimizer.lr", "unknown key"),
        ({"train__max_steps": "many"}, "train.max_steps", "'many'"),
        ({"train__max_steps": 2.5}, "train.max_steps", "2.5"),
        ({"run__seed": True}, "run.seed", "found true"),
        ({"run__dir": 5}, "run.dir", "found 5"),
        ({"evaluation__greedy": "perhaps"}, "evaluation.greedy", "'perhaps'"),
        ({"train__group_size": 1}, "train.group_size", "at least 2, found 1"),
        ({"sampling__top_p": 0}, "sampling.top_p", "more than 0, found 0"),
        # The limits of vLLM's SamplingParams; it would replace a lower temperature by 0.01 without an error.
        ({"sampling__temperature": 3}, "sampling.temperature", "at most 2, found 3"),
        ({"sampling__temperature": 0.001}, "sampling.temperature", "at least 0.01, found 0.001"),
        ({"search__temperature": 2.5}, "search.temperature", "at most 2, found 2.5"),
        ({"search__temperature": 0}, "search.temperature", "at least 0.01, found 0"),
        ({"actors__kv_cache_gib": float("inf")}, "actors.kv_cache_gib", "finite"),
        ({"warm_start__optimizer__learning_rate": float("nan")}, "optimizer.learning_rate", "nan"),
        ({"learner__zero_stage": 4}, "learner.zero_stage", "found 4"),
        (
            {"task": {"type": "parity"}},
            "task",
            "one of letter_count, blocksworld, countdown, sums, guess, dataset",
        ),
        ({"task": {"form": "simple"}}, "task.type", "missing"),
        ({"task": {"type": "dataset"}}, "task.path", "missing"),
        ({"task": {"type": "letter_count", "chunk": 0}}, "task.chunk", "found 0"),
        ({"task": 5}, "task", "found 5"),
        ({"run": None}, "run", "nothing (null)"),
        ({"stages": ["online", "sleep"]}, "stages.1", "'sleep'"),
        ({"stages": []}, "stages", "at least one entry"),
        ({"stages": ["sft", "online", "online"]}, "stages", "expected each stage once, found online 2 times"),
        ({"model": {}}, "model", "exactly one of model.path and model.from_scratch"),
        ({"model__from_scratch": {}}, "model", "exactly one"),
        (
            {"model": {"from_scratch": {"hidden_size": 96, "heads": 2}}},
            "model.from_scratch",
            "multiple of 32 * heads (64)",
        ),
        ({"task": {"type": "letter_count", "max_length": 4}}, "task", "max_length 4 is below min_length 5"),
        ({"task": {"type": "blocksworld", "min_blocks": 4}}, "task", "max_blocks 3 is below min_blocks 4"),
        ({"task": {"type": "blocksworld", "alphabet": "aabc"}}, "task", "letters, all different"),
        ({"task": {"type": "countdown", "min_numbers": 5}}, "task", "max_numbers 4 is below min_numbers 5"),
        ({"task": {"type": "countdown", "max_result": 9}}, "task", "is below max_number 9 or min_target 20"),
        ({"task": {"type": "sums", "min_terms": 5}}, "task", "max_terms 4 is below min_terms 5"),
        ({"task": {"type": "sums", "min_digits": 3}}, "task", "max_digits 2 is below min_digits 3"),
        (
            {"task": {"type": "letter_count", "demonstrations": {"chunk": 2}}},
            "task.demonstrations.chunk",
            "unknown key",
        ),
        (
            {"task": {"type": "letter_count", "demonstrations": {"max_length": 4}}},
            "task",
            "demonstrations: max_length 4 is below min_length 5",
        ),
        (
            {"task": {"type": "blocksworld", "demonstrations": {"max_blocks": 9}}},
            "task",
            "demonstrations.max_blocks: expected at most 5",
        ),
        (
            {"task": {"type": "sums", "demonstrations": {"max_terms": True}}},
            "task.demonstrations.max_terms",
            "found true",
        ),
        ({"task": {"type": "dataset", "path": "p", "prompt_template": "q"}}, "task", "must contain {question}"),
        ({"train": {"groups_per_step": 2, "updates_per_step": 3}}, "train", "updates_per_step"),
        ({"run__dir": ""}, "run.dir: ", "a text that is not empty, found ''"),
        ({"model__path": ""}, "model.path: ", "a text that is not empty, found ''"),
        ({"sft__path": ""}, "sft.path: ", "a text that is not empty, found ''"),
        ({"preference__path": ""}, "preference.path: ", "a text that is not empty, found ''"),
        ({"task__questions_path": ""}, "task.questions_path: ", "a text that is not empty, found ''"),
        ({"task": {"type": "blocksworld", "problems_path": ""}}, "task.problems_path: ", "a text that is not empty"),
        ({"task": {"type": "dataset", "path": ""}}, "task.path: ", "a text that is not empty, found ''"),
        (
            {"task": {"type": "dataset", "path": "p", "held_out_path": ""}},
            "task.held_out_path: ",
            "a text that is not empty",
        ),
    ],
)
def test_a_mistake_is_one_line_with_the_field_and_what_was_found(
    changes: dict[str, Any], field: str, text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(minimal(**changes), "c.yaml")
    message = caught.value.message
    assert "\n" not in message
    assert message.startswith("c.yaml: ")
    assert field in message
    assert text in message


def sections() -> list[type[Section]]:
    return sorted(_subclasses(Section), key=lambda section: section.__name__)


def _subclasses(parent: type[Section]) -> Iterator[type[Section]]:
    for child in parent.__subclasses__():
        yield child
        yield from _subclasses(child)


def fields() -> list[Any]:
    return [
        pytest.param(section, name, field, id=f"{section.__name__}.{name}")
        for section in sections()
        for name, field in section.model_fields.items()
    ]


@pytest.mark.parametrize(("section", "name", "field"), fields())
def test_every_field_has_help_and_every_number_a_bound(section: type[BaseModel], name: str, field: FieldInfo) -> None:
    if name != "type":  # the discriminator of a union needs no help
        assert field.description
        assert field.description.strip()[-1] in ".:)"
    kinds = set(get_args(field.annotation)) or {field.annotation}
    if kinds & {int, float}:
        bounds = (annotated_types.Gt, annotated_types.Ge, annotated_types.Lt, annotated_types.Le)
        assert any(isinstance(item, bounds) for item in field.metadata), f"{section.__name__}.{name}"


def test_the_sections_are_found() -> None:
    assert {Config, LetterCountConfig, DatasetConfig} <= set(sections())


def test_instances_do_not_change() -> None:
    config = parse_config(minimal(), "c.yaml")
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 3
