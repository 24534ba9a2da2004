"""A resume with another config, other data, another model or tokenizer ends with one line and changes nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_runs import TINY, write_config

from rlsys.config.files import dump_config, load_config
from rlsys.config.schema import FromScratchConfig
from rlsys.data.inputs import Inputs, prepare_model
from rlsys.errors import ConfigError
from rlsys.files import write_json
from rlsys.launch import session as launch
from rlsys.models.scratch import build_from_scratch
from rlsys.run.checkpoints import CheckpointStore
from rlsys.run.state import state_to_json
from rlsys.types import RunState

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SIZE = FromScratchConfig(hidden_size=32, layers=1, heads=1, intermediate_size=16, max_positions=128)
GOOD = {"question": "1+1?", "answer": "2"}
TEXTS = {"sft": {"prompt": "a", "completion": "b"}, "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"}}
ACCEPTED = "Ray would be started"


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step after all checks is the start of Ray."""

    def ray_cluster(*_: Any) -> None:
        raise ConfigError(ACCEPTED)

    monkeypatch.setattr(launch, "ray_cluster", ray_cluster)


def begun(folder: Path, **sections: Any) -> str:
    """The config of a run that has saved its second training step; nothing was trained for it."""
    config = write_config(folder, {**TINY, "stages": ["online"], **sections})
    loaded, run = load_config(config), folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(loaded))
    store = CheckpointStore(run / "checkpoints", 1)
    temporary = store.begin("step_000002")
    stage = len(loaded.stages) - 1
    state = RunState(stage=stage, step=2 - stage, weight_version=2, cursor=16, in_flight=())
    write_json(temporary / "state.json", state_to_json(state))
    inputs = Inputs(loaded, prepare_model(loaded, run)).fingerprint()
    store.commit(temporary, "step_000002", {"weight_version": 2, "inputs": inputs})
    return config


@pytest.fixture
def refused_resume(refused) -> Callable[..., str]:
    """Return the error of a refused resume. Assert that `check` finds it too, and that nothing changed."""

    def run(config: str, *overrides: str) -> str:
        before = contents(Path(config).with_name("run"))
        message: str = refused("train", config, *overrides)
        assert refused("check", config, *overrides) == message
        assert contents(Path(config).with_name("run")) == before
        return message

    return run


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file but the lock, which every command takes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_from_scratch(SIZE, [], 0, folder)
    return folder


def with_files(folder: Path, model: Path) -> str:
    """A run that reads a model, a data set and both kinds of training files, all of them in `folder`."""
    shutil.copytree(model, folder / "model")
    rows = [{**GOOD, "question": f"{i}+1?"} for i in range(20)]
    task = {
        "type": "dataset",
        "path": write_lines(folder / "data.jsonl", rows),
        "held_out_path": write_lines(folder / "held.jsonl", [GOOD] * 3),
    }
    return begun(
        folder,
        model={"path": str(folder / "model")},
        task=task,
        stages=["sft", "online"],
        sft={"path": write_lines(folder / "sft.jsonl", [TEXTS["sft"]])},
        preference={"path": write_lines(folder / "pairs.jsonl", [TEXTS["pairs"]])},
        objective={"preference": {"weight": 1.0, "source": "file"}},
    )


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def append(path: Path, row: dict[str, Any]) -> None:
    path.write_text(path.read_text() + json.dumps(row) + "\n")


def turn_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def reordered(path: Path) -> None:
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))


TOKENIZER = "the tokenizer of model.path"
# What is done to a file, by what it is: the fields that the refusal names.
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a special token": (lambda folder: replace(folder / "model/tokenizer.json", '"<user>"', '"<human>"'), TOKENIZER),
    "the chat template": (lambda folder: replace(folder / "model/chat_template.jinja", "<user>", "<eos>"), TOKENIZER),
    "the end token": (
        lambda folder: replace(folder / "model/tokenizer_config.json", '"eos_token": "<eos>"', '"eos_token": "<pad>"'),
        TOKENIZER,
    ),
    "a weight": (lambda folder: turn_bit(folder / "model/model.safetensors"), "model.path"),
    "the architecture": (lambda folder: replace(folder / "model/config.json", "100.0", "200.0"), "model.path"),
    "an answer": (lambda folder: replace(folder / "data.jsonl", '"2"', '"3"'), "task.path"),
    "a row more": (lambda folder: append(folder / "data.jsonl", {**GOOD, "question": "7?"}), "task.path"),
    "the order of rows": (lambda folder: reordered(folder / "data.jsonl"), "task.path"),
    "a held-out question": (lambda folder: replace(folder / "held.jsonl", "1+1?", "1+2?"), "task.path"),
    "a chain": (lambda folder: replace(folder / "sft.jsonl", '"b"', '"c"'), "sft.path"),
    "a pair": (lambda folder: replace(folder / "pairs.jsonl", '"c"', '"d"'), "preference.path"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_resumed_run_reads_must_be_what_it_read(
    refused_resume, tmp_path: Path, model: Path, change: str
) -> None:
    config = with_files(tmp_path, model)
    alter, named = CHANGES[change]
    alter(tmp_path)
    message = refused_resume(config)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000002"
    assert message.startswith(f"error: {named}")
    assert f": the contents differ from those that {checkpoint} was trained with (expected sha256 " in message
    assert message.endswith("; put them back, or start a new run.dir")


def test_what_is_unchanged_is_accepted(refused, tmp_path: Path, model: Path) -> None:
    assert refused("train", with_files(tmp_path, model)) == f"error: {ACCEPTED}"


QUESTIONS = [{"id": i, "problem": f"count a in {'a' * (i + 1)}", "solution": i + 1} for i in range(3)]


def test_questions_of_a_file_that_changed(refused_resume, tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(QUESTIONS))
    config = begun(tmp_path, task={**TINY["task"], "questions_path": str(path)})
    path.write_text(json.dumps(QUESTIONS[:2]))
    assert refused_resume(config).startswith("error: task.questions_path: the contents differ from those that ")


def test_a_model_of_the_run_directory_that_was_edited(refused_resume, tmp_path: Path) -> None:
    config = begun(tmp_path)
    turn_bit(tmp_path / "run" / "model" / "model.safetensors")
    assert refused_resume(config).startswith("error: model.from_scratch: the contents differ from those that ")


FIXED = [
    ("run.seed=4", "run.seed", "expected 3, found 4"),
    ("learner.dtype=bf16", "learner.dtype", "expected fp32, found bf16"),
    ("stages=[warm_start, online]", "stages", "expected ['online'], found ['warm_start', 'online']"),
    ("task.max_length=5", "task.max_length", "expected 4, found 5"),
    ("model.from_scratch.layers=3", "model.from_scratch.layers", "expected 2, found 3"),
]


@pytest.mark.parametrize(("override", "field", "expected"), FIXED, ids=[each[1] for each in FIXED])
def test_a_fixed_field(refused_resume, tmp_path: Path, override: str, field: str, expected: str) -> None:
    """All of them: tests/rlsys/config/test_compare.py."""
    message = refused_resume(begun(tmp_path), override)
    where = f"the run to be resumed ({tmp_path / 'run' / 'config.yaml'})"
    assert (
        message
        == f"error: {field} differs from {where}: {expected}; set it back, or start another run with run.dir=runs/NEW"
    )


def test_rows_of_a_step_within_a_stage(refused_resume, tmp_path: Path, model: Path) -> None:
    config = with_files(tmp_path, model)
    assert "preference.pairs_per_step differs from the run to be resumed" in refused_resume(
        config, "preference.pairs_per_step=7"
    )


@pytest.mark.parametrize(
    ("resume", "found"),
    [
        ("{tmp}/none", "found no such folder"),
        ("always", "found no such folder"),
        ("{tmp}/config.yaml", "found a file"),
        ("{tmp}/run", "found a folder without MANIFEST.json; did you mean {tmp}/run/checkpoints/step_000002?"),
    ],
)
def test_a_checkpoint_to_begin_with_that_is_none(
    refused_resume, tmp_path: Path, model: Path, resume: str, found: str
) -> None:
    config = begun(tmp_path)
    message = refused_resume(config, f"run.resume={resume.format(tmp=tmp_path)}", f"run.dir={tmp_path / 'new'}")
    wanted = "expected auto, never or the folder of a checkpoint, RUN_DIR/checkpoints/step_N"
    assert message.endswith(f": {wanted}, {found.format(tmp=tmp_path)}")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"lock"}


def test_checkpoints_of_another_program(refused_resume, tmp_path: Path) -> None:
    config = write_config(tmp_path, TINY)
    folder = tmp_path / "run" / "checkpoints" / "checkpoint-500"
    folder.mkdir(parents=True)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = refused_resume(config)
    assert "found the folder checkpoint-500 without a MANIFEST.json; move it away, or choose another run.dir" in message
