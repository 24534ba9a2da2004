"""The config: every mistake gets one line that names the field; what is valid survives a dump."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import annotated_types
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlsys.config.files import apply_override, dump_config, fixed_fields, load_config, parse_config, parse_yaml
from rlsys.config.schema import Config, DatasetConfig, LetterCountConfig, Section
from rlsys.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
MINIMAL: dict[str, Any] = {
    "run": {"dir": "runs/x"},
    "model": {"path": "some/model"},
    "task": {"type": "letter_count"},
}


def minimal(**changes: Any) -> dict[str, Any]:
    """The smallest config with `section__key=value` changed."""
    values = copy.deepcopy(MINIMAL)
    for path, value in changes.items():
        *sections, key = path.split("__")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[key] = value
    return values


def problem(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "c.yaml")
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("changes", "field", "found"),
    [
        ({"optimiser": {}}, "optimiser", "unknown key"),
        ({"train__group_sise": 8}, "train.group_sise", "unknown key"),
        ({"warm_start__optimizer__lr": 1e-4}, "warm_start.optimizer.lr", "unknown key"),
        ({"train__max_steps": "many"}, "train.max_steps", "'many'"),
        ({"train__max_steps": 2.5}, "train.max_steps", "2.5"),
        ({"run__seed": True}, "run: seed", "truth value"),
        ({"run__dir": 5}, "run.dir", "found 5"),
        ({"evaluation__greedy": "perhaps"}, "evaluation.greedy", "'perhaps'"),
        ({"train__group_size": 1}, "train.group_size", "greater than or equal to 2, found 1"),
        ({"sampling__top_p": 0}, "sampling.top_p", "greater than 0, found 0"),
        ({"actors__kv_cache_gib": float("inf")}, "actors.kv_cache_gib", "finite"),
        ({"warm_start__optimizer__learning_rate": float("nan")}, "optimizer.learning_rate", "nan"),
        ({"learner__zero_stage": 4}, "learner.zero_stage", "found 4"),
        ({"task": {"type": "sums"}}, "task", "'letter_count', 'blocksworld', 'dataset'"),
        ({"task": {"form": "simple"}}, "task", "'type'"),
        ({"task": {"type": "dataset"}}, "task.path", "required"),
        ({"task": {"type": "letter_count", "chunk": 0}}, "task.chunk", "found 0"),
        ({"task": 5}, "task", "found 5"),
        ({"run": None}, "run", "None"),
        ({"stages": ["online", "sleep"]}, "stages.1", "'sleep'"),
        ({"stages": []}, "stages", "at least 1"),
        ({"stages": ["online", "online"]}, "stages", "twice"),
        ({"model": {}}, "model", "exactly one of model.path and model.from_scratch"),
        ({"model__from_scratch": {}}, "model", "exactly one"),
        ({"sampling__max_tokens": 256}, "sampling.max_tokens", "actors.max_model_len 256"),
        ({"actors__tensor_parallel_size": 2}, "actors.tensor_parallel_size", "cuda"),
        ({"learner": {"optimizer_offload": True, "zero_stage": 0}}, "learner.optimizer_offload", "zero_stage"),
        ({"learner": {"dtype": "bf16", "zero_stage": 0}}, "learner.dtype", "zero_stage"),
        ({"train": {"groups_per_step": 2, "updates_per_step": 3}}, "train", "updates_per_step"),
        ({"run__dir": ""}, "run.dir: ", "at least 1 character, found ''"),
        ({"model__path": ""}, "model.path: ", "at least 1 character, found ''"),
        ({"sft__path": ""}, "sft.path: ", "at least 1 character, found ''"),
        ({"preference__path": ""}, "preference.path: ", "at least 1 character, found ''"),
        ({"task__questions_path": ""}, "task.questions_path: ", "at least 1 character, found ''"),
        ({"task": {"type": "blocksworld", "problems_path": ""}}, "task.problems_path: ", "at least 1 character"),
        ({"task": {"type": "dataset", "path": ""}}, "task.path: ", "at least 1 character, found ''"),
        (
            {"task": {"type": "dataset", "path": "p", "held_out_path": ""}},
            "task.held_out_path: ",
            "at least 1 character",
        ),
    ],
)
def test_a_mistake_is_one_line_with_the_field_and_what_was_found(
    changes: dict[str, Any], field: str, found: str
) -> None:
    message = problem(minimal(**changes))
    assert message.startswith("c.yaml: ")
    assert field in message
    assert found in message


def test_a_searched_group_is_trained_by_the_token() -> None:
    def values(fraction: float) -> dict[str, Any]:
        return minimal(search={"fraction": fraction}, objective={"policy": {"aggregation": "sequence_mean"}})

    message = problem(values(0.25))
    assert "search.fraction 0.25 needs objective.policy.aggregation token_mean, found sequence_mean" in message
    assert parse_config(values(0.0), "test").objective.policy.aggregation == "sequence_mean"


@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_what_the_learner_trains_is_searched_as_it_is_sampled(name: str) -> None:
    def values(fraction: float, **search: Any) -> dict[str, Any]:
        return minimal(sampling={name: 0.5}, search={"fraction": fraction, **search})

    message = problem(values(0.5, **{name: 0.7}))
    assert f"search.{name} 0.7 differs from sampling.{name} 0.5" in message
    for fine in (values(0.5), values(0.5, **{name: 0.5}), values(0.0, **{name: 0.7})):
        parse_config(fine, "c.yaml")
    # What another model writes is never trained by its probabilities.
    parse_config(values(0.5, model={"path": "large"}, **{name: 0.7}), "c.yaml")


def test_a_model_must_reach_max_model_len() -> None:
    values = minimal(model={"from_scratch": {"max_positions": 128}})
    assert "max_model_len 256 exceeds model.from_scratch.max_positions 128" in problem(values)
    parse_config(minimal(model={"from_scratch": {"max_positions": 256}}), "c.yaml")


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("run: {dir: a}\nrun: {dir: b}", 2, "duplicate key 'run'"),
        ("run:\n  dir: a\n  dir: b", 3, "duplicate key 'dir'"),
        ("a: &shared {b: 1}\nc: *shared", 2, "aliases"),
        ("a: !!python/object/apply:os.system ['true']", 1, "constructor"),
        ("{[1, 2]: 3}", 1, "key"),
        ("a: [1, 2", 1, "expected"),
    ],
)
def test_unusable_yaml_names_the_line(text: str, line: int, found: str) -> None:
    with pytest.raises(ConfigError, match=found) as caught:
        parse_yaml(text, "c.yaml")
    assert caught.value.message.startswith(f"c.yaml:{line}: ")


@pytest.mark.parametrize("text", ["a: 2026-13-45", "a: \x00", "[" * 5000])
def test_text_that_the_yaml_library_chokes_on_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^c\.yaml: ") as caught:
        parse_yaml(text, "c.yaml")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", ["", "- a", "5"])
def test_a_file_must_hold_sections(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match="expected a mapping of sections"):
        load_config(tmp_path / "c.yaml")


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.optimizer.learning_rate=1e-4", 1e-4),
        ("train.optimizer.learning_rate=+2E5", 2e5),
        ("train.optimizer.learning_rate=1.e-3", 1e-3),
        ("train.optimizer.learning_rate=3", 3),
        ("stages=[online]", ["online"]),
        ("model.from_scratch={layers: 2}", {"layers": 2}),
        ("run.dir=runs/a=b", "runs/a=b"),
        ("run.dir='1e-4'", "1e-4"),
        ("task.questions_path=null", None),
        ("evaluation.greedy=false", False),
    ],
)
def test_overrides_are_read_as_yaml(override: str, expected: Any) -> None:
    values = minimal(train={"max_steps": 3})
    apply_override(values, override)
    node: Any = values
    for key in override.split("=")[0].split("."):
        node = node[key]
    assert node == expected
    assert type(node) is type(expected)
    if "train" in override:
        assert values["train"]["max_steps"] == 3  # its neighbours stay


@pytest.mark.parametrize("override", ["train.max_steps", "=3", ".a=3", "train..x=1", "run.dir.x=1", "a=[1"])
def test_a_bad_override_is_named(override: str) -> None:
    with pytest.raises(ConfigError, match="override") as caught:
        apply_override(minimal(), override)
    assert repr(override) in caught.value.message


def test_an_override_wins_over_the_file_and_is_checked_like_it(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run: {dir: a}\nmodel: {path: b}\ntask: {type: letter_count}\n")
    config = load_config(tmp_path / "c.yaml", ["run.dir=c", "run.dir=d", "train.optimizer.learning_rate=1e-6"])
    assert config.run.dir == "d"
    assert config.train.optimizer.learning_rate == 1e-6
    with pytest.raises(ConfigError, match=r"train\.stepps: unknown key"):
        load_config(tmp_path / "c.yaml", ["train.stepps=3"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_is_valid_and_its_dump_reloads_equal(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLSYS_DATA", str(tmp_path))
    config = load_config(path)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert path.read_text().startswith("# "), "the first line says what the config shows"


def test_there_are_shipped_configs() -> None:
    assert "quickstart.yaml" in [path.name for path in CONFIGS]


@settings(deadline=None, max_examples=40)
@given(name=st.text(min_size=1), rate=st.floats(1e-12, 1.0), seed=st.integers(0, 2**31 - 1))
def test_a_dump_reloads_equal(name: str, rate: float, seed: int) -> None:
    values = minimal(run={"dir": name, "seed": seed}, train__optimizer__learning_rate=rate)
    config = parse_config(values, "c.yaml")
    assert parse_config(parse_yaml(dump_config(config), "dump"), "dump") == config


@pytest.mark.parametrize("name", ["1e-4", "yes", "null", "007", "2026-01-01", "~", "<<", "*a", "a: b", "12e03"])
def test_text_that_looks_like_something_else_stays_text(name: str) -> None:
    config = parse_config(minimal(run__dir=name), "c.yaml")
    assert parse_config(parse_yaml(dump_config(config), "dump"), "dump").run.dir == name


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
    if name != "type":  # the discriminator of a union says itself what it is
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


def test_max_steps_of_a_stage() -> None:
    config = parse_config(minimal(train__max_steps=7, warm_start__max_steps=5), "c.yaml")
    assert (config.max_steps("warm_start"), config.max_steps("online")) == (5, 7)


def test_fixed_fields_are_seed_stages_model_and_task_alone() -> None:
    before = fixed_fields(parse_config(minimal(), "c.yaml"))
    free = minimal(train__max_steps=999, run__dir="elsewhere", learner__ranks=1, learner__zero_stage=0)
    assert fixed_fields(parse_config(free, "c.yaml")) == before
    for change, name in [
        ({"run__seed": 1}, "run.seed"),
        ({"stages": ["online"]}, "stages"),
        ({"model__path": "other"}, "model.path"),
        ({"task__shares": {"reflection": 0.5}}, "task.shares.reflection"),
    ]:
        after = fixed_fields(parse_config(minimal(**change), "c.yaml"))
        assert [key for key in after if after[key] != before[key]] == [name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards__timeout_s": 200}, "rewards.timeout_s 200 exceeds actors.hang_timeout_s 120"),
        ({"actors__rollout_timeout_s": 60}, "actors.hang_timeout_s 120 exceeds actors.rollout_timeout_s 60"),
        ({"learner__timeout_s": 60}, "learner.hang_timeout_s 300 exceeds learner.timeout_s 60"),
    ],
)
def test_a_living_process_can_keep_every_deadline(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(minimal(**changes), "c.yaml")
