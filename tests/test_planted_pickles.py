"""Nothing foreign is unpickled: pickles as weights, data, rows, problems, checkpoints, trees and YAML."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rlsys import cli
from rlsys.config.files import parse_yaml
from rlsys.config.schema import FromScratchConfig
from rlsys.errors import CheckpointError, ConfigError, DataError
from rlsys.models import scratch as models
from rlsys.models.folder import given_model
from rlsys.run.checkpoints import CheckpointStore
from rlsys.search.tree_json import read_trees


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (open, (str(self.path), "w"))


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[bytes]:
    """A pickle; nobody has unpickled it when the test ends."""
    path = tmp_path / "unpickled"
    planted = pickle.dumps(Canary(path))
    pickle.loads(planted)
    assert path.exists(), "it would be seen"
    path.unlink()
    yield planted
    assert not path.exists(), "a planted pickle was unpickled"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    sizes = FromScratchConfig(hidden_size=32, layers=1, heads=1, intermediate_size=32, max_positions=64)
    models.build_from_scratch(sizes, "ab", 0, folder)
    return folder


SMALL: dict[str, Any] = {"actors": {"max_model_len": 64}, "sampling": {"max_tokens": 16}}


def refused(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], at: Path
) -> str:
    """The one line that `rlsys check` refuses a config with."""
    (at / "config.yaml").write_text(yaml.safe_dump({"run": {"dir": str(at / "run")}, **config}))
    monkeypatch.setattr(sys, "argv", ["rlsys", "check", str(at / "config.yaml")])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    errors = capfd.readouterr().err
    assert stopped.value.code == 2 and errors.count("\n") == 1 and errors.startswith("error: "), errors
    return errors


PICKLED_WEIGHTS = ("pytorch_model.bin", "model.pt", "model.pth", "training_args.bin", "optimizer.pt", "model.ckpt")


def test_pickles_beside_the_weights_are_not_read(model: Path, canary: bytes) -> None:
    from learners.deepspeed.critic import load_critic
    from learners.deepspeed.model import load_model

    for name in PICKLED_WEIGHTS:
        (model / name).write_bytes(canary)
    assert given_model(str(model), "model.path").path == model
    assert load_model(model, "fp32", "cpu").num_parameters() > 0
    assert list(load_critic(model, "fp32", "cpu").parameters())


def test_an_index_does_not_lead_the_learner_to_pickles(model: Path, canary: bytes) -> None:
    """Not even in a checkpoint of another run, whose policy no command has looked at."""
    from learners.deepspeed.critic import load_critic
    from learners.deepspeed.model import load_model

    (model / "model.safetensors").rename(model / "other.safetensors")
    (model / "pytorch_model.bin").write_bytes(canary)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    for load in (load_model, load_critic):
        with pytest.raises(ConfigError, match=r"^model folder .*names 'pytorch_model\.bin'; expected \*\.safetensors"):
            load(model, "fp32", "cpu")


@pytest.mark.parametrize("name", PICKLED_WEIGHTS)
def test_pickles_instead_of_the_weights(
    model: Path, canary: bytes, tmp_path: Path, name: str, capfd: Any, monkeypatch: Any
) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(canary)
    config = {"model": {"path": str(model)}, "task": {"type": "letter_count"}}
    assert "expected *.safetensors, found none" in refused(capfd, monkeypatch, config, tmp_path)


def test_a_pickle_that_calls_itself_safetensors(
    model: Path, canary: bytes, tmp_path: Path, capfd: Any, monkeypatch: Any
) -> None:
    (model / "model.safetensors").write_bytes(canary)
    config = {"model": {"path": str(model)}, "task": {"type": "letter_count"}}
    assert "model.safetensors is not a complete safetensors file" in refused(capfd, monkeypatch, config, tmp_path)


def planted_data(kind: str, folder: Path, canary: bytes) -> Path:
    """A data set in which the canary stands."""
    if kind in ("data.pkl", "data.jsonl", "data.parquet"):
        (folder / kind).write_bytes(canary)
        return folder / kind
    data = folder / "data"
    data.mkdir()
    if kind == "folder":
        for name in ("train.pkl", "train.pickle", "train.pt"):
            (data / name).write_bytes(canary)
    if kind == "script":
        (data / "data.py").write_text(f"open({str(folder / 'unpickled')!r}, 'w')")
    if kind == "saved":
        (data / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "a"}))
        (data / "dataset_info.json").write_text("{}")
        (data / "data.arrow").write_bytes(canary)
    if kind == "archive":
        with tarfile.open(data / "train.tar", "w") as archive:
            for name in ("0.pkl", "0.pickle", "0.pth"):
                entry = tarfile.TarInfo(name)
                entry.size = len(canary)
                archive.addfile(entry, io.BytesIO(canary))
    return data


@pytest.mark.parametrize("kind", ["data.pkl", "data.jsonl", "data.parquet", "folder", "script", "saved", "archive"])
def test_pickles_as_data_set(
    model: Path, canary: bytes, tmp_path: Path, kind: str, capfd: Any, monkeypatch: Any
) -> None:
    path = planted_data(kind, tmp_path, canary)
    config = {**SMALL, "model": {"path": str(model)}, "task": {"type": "dataset", "path": str(path)}}
    assert f"task.path {path}: " in refused(capfd, monkeypatch, config, tmp_path)


def parquet_with_objects(path: Path, canary: bytes) -> None:
    """Old versions of pyarrow unpickled the type of such a column (CVE-2023-47248)."""
    names = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": canary}
    texts = [f"{number}?" for number in range(20)]
    fields = [pa.field("question", pa.string(), metadata=names), pa.field("answer", pa.string(), metadata=names)]
    schema = pa.schema(fields, metadata={b"pandas": b'{"columns": [{"numpy_type": "object"}]}'})
    pq.write_table(pa.table([texts, texts], schema=schema), path)


@pytest.mark.filterwarnings("ignore:pyarrow.PyExtensionType:RuntimeWarning")
def test_types_of_a_parquet_file_are_not_unpickled(canary: bytes, tmp_path: Path) -> None:
    from rlsys.tables.sources import read_source

    parquet_with_objects(tmp_path / "data.parquet", canary)
    rows = read_source(str(tmp_path / "data.parquet"), "train", "task.path").rows
    assert [row.values for row in rows][:1] == [{"question": "0?", "answer": "0?"}]


@pytest.mark.parametrize("stage", ["sft", "preference"])
@pytest.mark.parametrize("name", ["rows.pkl", "rows.jsonl", "rows.parquet"])
def test_pickles_as_training_rows(
    model: Path, canary: bytes, tmp_path: Path, stage: str, name: str, capfd: Any, monkeypatch: Any
) -> None:
    (tmp_path / name).write_bytes(canary)
    config = {
        "model": {"path": str(model)},
        "task": {"type": "letter_count"},
        "stages": [stage],
        "actors": {"max_model_len": 64},
        "sampling": {"max_tokens": 16},
        "objective": {"preference": {"weight": 1.0}} if stage == "preference" else {},
        stage: {"path": str(tmp_path / name)},
    }
    assert f"{stage}.path {tmp_path / name}" in refused(capfd, monkeypatch, config, tmp_path)


@pytest.mark.parametrize("kind", ["letter_count", "blocksworld"])
def test_pickles_as_problems(
    model: Path, canary: bytes, tmp_path: Path, kind: str, capfd: Any, monkeypatch: Any
) -> None:
    field = {"letter_count": "questions_path", "blocksworld": "problems_path"}[kind]
    path = tmp_path / "problems"
    if kind == "blocksworld":
        path.mkdir()
    (path / "one.pddl" if kind == "blocksworld" else path).write_bytes(canary)
    config = {**SMALL, "model": {"path": str(model)}, "task": {"type": kind, field: str(path)}}
    assert f"task.{field}" in refused(capfd, monkeypatch, config, tmp_path)


def test_pickles_in_a_checkpoint(canary: bytes, tmp_path: Path) -> None:
    """Put there by accident it does not fit the manifest; with a manifest of its own it is still no safetensors."""
    from learners.deepspeed.tensor_files import read_tensors

    store = CheckpointStore(tmp_path / "checkpoints", 2)

    def commit(number: int, content: bytes) -> Path:
        folder = store.begin(f"step_{number:06d}")
        (folder / "learner").mkdir()
        (folder / "learner" / "exp_avg.safetensors").write_bytes(content)
        return store.commit(folder, f"step_{number:06d}", {"weight_version": number})

    good = commit(1, b"good")
    replaced = commit(2, b"good")
    (replaced / "learner" / "exp_avg.safetensors").write_bytes(canary)
    assert store.latest() == good
    shutil.rmtree(good)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is valid"):
        store.latest()
    sealed = commit(3, canary)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        list(read_tensors(sealed / "learner", "exp_avg"))


def test_pickles_as_trees_and_scores(canary: bytes, tmp_path: Path) -> None:
    from rlsys.files import read_json

    path = tmp_path / "00000.jsonl"
    for content in (canary, canary + b"\n"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=str(path)):
            list(read_trees(path))
        with pytest.raises(CheckpointError, match=str(path)):
            read_json(path)  # what scores of a reference policy, run states and manifests are read with


YAML = [
    "a: !!python/object/apply:os.system ['touch {}']",
    "a: !!python/object/new:os.system ['touch {}']",
    "a: !!python/name:os.system",
    "!!python/object/apply:os.system ['touch {}']: a",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
]


@pytest.mark.parametrize("text", YAML)
def test_yaml_makes_no_objects(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^config:\d+: ") as caught:
        parse_yaml(text.replace("{}", str(tmp_path / "ran")), "config")
    assert "\n" not in caught.value.message
    assert list(tmp_path.iterdir()) == []
