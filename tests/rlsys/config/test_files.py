"""Config files: strict YAML, overrides, and a dump that reloads equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from minimal_config import minimal

from rlsys.config.files import LARGEST, apply_override, dump_config, fixed_fields, load_config, parse_config, parse_yaml
from rlsys.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [
        ("run: {dir: a}\nrun: {dir: b}", 2, "duplicate key 'run'"),
        ("run:\n  dir: a\n  dir: b", 3, "duplicate key 'dir'"),
        ("a: &shared {b: 1}\nc: *shared", 2, "aliases"),
        ("a: !!python/object/apply:os.system ['true']", 1, "constructor"),
        ("{[1, 2]: 3}", 1, "key"),
        ("a: [1, 2", 1, "expected"),
        ("a: [1, 2\n", 2, "expected"),
        ("a:\n  b: 1\n    c: 2\n", 3, "^c.yaml:3: no second colon can stand here; check the indentation of this line"),
        ("a:\n  b: 1\n c: 2\n", 3, "^c.yaml:3: this line does not fit those above it; check the indentation"),
        ("- a\nb: 1\n", 2, "check the indentation"),
        ("a:\n  b: 1\n  c\n  d: 3\n", 4, "found no colon; check the indentation, and the line above"),
    ],
)
def test_unusable_yaml_names_the_line(text: str, line: int, found: str) -> None:
    with pytest.raises(ConfigError, match=found) as caught:
        parse_yaml(text, "c.yaml")
    assert caught.value.message.startswith(f"c.yaml:{line}: ")


@pytest.mark.heavy
@pytest.mark.parametrize("text", ["a: 2026-13-45", "a: \x00", "[" * 5000])
def test_text_that_the_yaml_library_chokes_on_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^c\.yaml: ") as caught:
        parse_yaml(text, "c.yaml")
    assert "\n" not in caught.value.message


def test_other_files_in_the_place_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("run: {dir: a}\n")
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1?"}\n')
    (tmp_path / "binary.yaml").write_bytes(b"\x80\x04\x95")
    (tmp_path / "zeros.yaml").write_bytes(b"run:\0\0")
    (tmp_path / "foreign.yaml").write_text("version: 2\nservices: {}\n")
    (tmp_path / "large.yaml").write_bytes(b"#" * (LARGEST + 1))
    for name, found in {
        "run": f"found a folder; did you mean {tmp_path / 'run' / 'config.yaml'}?",
        "rows.jsonl": "found the data file rows.jsonl; in a config, task.path names a data file",
        "binary.yaml": "found bytes that are no text in UTF-8",
        "zeros.yaml": "found bytes that are no text",
        "foreign.yaml": "found none of run, stages, model, task, environment, placement, ... in it",
        "large.yaml": "found a file of 4,194,305 bytes",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / name)
        assert caught.value.message == f"{tmp_path / name}: expected a config, a YAML file with sections, {found}"
    with pytest.raises(ConfigError, match=r"there is no such file; did you mean .*binary\.yaml\?"):
        load_config(tmp_path / "binry.yaml")


@pytest.mark.parametrize("text", ["", "- a", "5"])
def test_a_file_must_hold_sections(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match="expected a mapping of sections"):
        load_config(tmp_path / "c.yaml")


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="found bytes that are no text in UTF-8"):
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
        ("task.questions_path=", None),
        ("run.dir=007", "007"),
        ("run.dir=yes", "yes"),
        ("run.dir={a}", "{a}"),
        ("run.dir=[a, b]", "[a, b]"),
        ("run.dir=2026-01-01", "2026-01-01"),
        ("run.dir= a # b ", "a # b"),
        ("run.dir='a # b'", "a # b"),
        ('run.dir="a\\nb"', "a\nb"),
        ("model.path=#x", "#x"),
        ("search.nodes.mine.tag=[x]", "[x]"),
        ("search.nodes.mine.prefixes=[x]", ["x"]),
        ("unknown.key={a: 1}", {"a": 1}),
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


@pytest.mark.heavy
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
    "text",
    ["{question}", "{question} Put {x}: here.", "#### {question}", "- {question}", "Q: {question}", "'{question}'"],
)
def test_a_text_on_the_command_line_is_taken_as_it_is(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text("run: {dir: a}\nmodel: {path: b}\ntask: {type: dataset, path: c}\n")
    config = load_config(tmp_path / "c.yaml", [f"task.prompt_template={text}", "task.answer_pattern=#### (.+)"])
    assert config.task.type == "dataset"
    assert config.task.prompt_template == text.strip("'")
    assert config.task.answer_pattern == "#### (.+)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"task": {"type": "dataset", "path": "c", "prompt_template": {"question": None}}},
            "c.yaml: task.prompt_template: expected a text, found a section with the keys question; put a text",
        ),
        (
            {"task": {"type": "dataset", "path": ""}},
            "c.yaml: task.path: expected a text that is not empty, found ''",
        ),
        ({"task": {"type": "dataset", "path": "c", "dataset": 1}}, "c.yaml: task.dataset: unknown key; "),
        (
            {"task": {"type": "letter_count", "shares": {"reflection": 2}}},
            "c.yaml: task.shares.reflection: expected at most 1, found 2",
        ),
        (
            {"task": {"type": "dataset", "path": "c", "prompt_template": "x"}},
            "c.yaml: task: prompt_template must contain {question}, which stands for the text of the column 'question'",
        ),
        (
            {"search": {"selection": {"type": "puct", "exploration": "x"}}},
            "c.yaml: search.selection.exploration: expected a number, found 'x'",
        ),
        (
            {"search": {"nodes": {"ucb": {"tag": 3}}}},
            "c.yaml: search.nodes.ucb.tag: expected a text, found 3",
        ),
    ],
)
def test_messages_name_a_key_of_the_schema(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(minimal(**changes), "c.yaml")
    assert caught.value.message.startswith(message)


def test_a_tab_and_a_script_in_the_place_of_a_config_are_named(tmp_path: Path) -> None:
    for text in ("run:\n\tdir: a\n", "run:\n  dir: a\n\tseed: 0\n"):
        with pytest.raises(ConfigError, match="indent with spaces"):
            parse_yaml(text, "c.yaml")
    with pytest.raises(ConfigError) as caught:
        parse_yaml("a: b: c", "c.yaml")
    assert "tab" not in caught.value.message
    (tmp_path / "make.py").write_text("def f(a: int) -> dict[str, int]:\n    return {'a': a}\n")
    with pytest.raises(ConfigError, match=r"make\.py: not a config; expected a YAML file with sections"):
        load_config(tmp_path / "make.py")


def test_a_fault_of_an_override_is_not_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "run: {dir: a}\nmodel: {path: b}\ntask: {type: letter_count}\ntrain: {group_siz: 2}\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml", ["train.max_stepz=3", "sampling={top: 1}"])
    message = caught.value.message
    assert f"{tmp_path / 'c.yaml'}: train.group_siz: unknown key" in message
    assert "on the command line: train.max_stepz: unknown key" in message
    assert "on the command line: sampling.top: unknown key" in message
