"""Rules that no part may break: nothing foreign is unpickled or run, and what no verifier judged trains nothing."""

from __future__ import annotations

import ast
import asyncio
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from actors.engine import Completion
from actors.rollouts.single_turn import build_group
from actors.verifiers.pool import RewardPool
from learners.samples.batching import collate
from learners.samples.build import StepTerms, build_samples
from rlsys import cli
from rlsys.config.files import parse_yaml
from rlsys.config.objective import ObjectiveConfig
from rlsys.config.schema import FromScratchConfig, RewardsConfig
from rlsys.config.tasks import LetterCountConfig
from rlsys.errors import CheckpointError, ConfigError, DataError
from rlsys.models import scratch as models
from rlsys.models.folder import given_model
from rlsys.run.checkpoints import CheckpointStore
from rlsys.search.tree_json import read_trees
from rlsys.types import Prompt, TrainingBatch, VersionSpan

ROOT = Path(__file__).parents[1]
SOURCES = [file for package in ("rlsys", "actors", "learners") for file in sorted((ROOT / package).rglob("*.py"))]

# --- the code itself ---

MODULES = {"pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve", "pandas"}
CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {("torch", "load"), ("os", "system"), ("os", "popen"), ("yaml", "unsafe_load"), ("yaml", "full_load")}
KEYWORDS = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False}
SAFE_LOADERS = {"SafeLoader", "_UniqueKeyLoader"}  # the second is a SafeLoader of rlsys.config.files


def breaches(source: str) -> list[str]:
    """What in a module could run or unpickle what it is given."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"import {name}" for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            place = (node.value.id, node.attr)
            found += [".".join(place)] if place in ATTRIBUTES else []
        if isinstance(node, ast.Call):
            found += _call_breaches(node)
        if isinstance(node, ast.Dict):  # arguments that are collected first
            pairs = zip(node.keys, node.values, strict=True)
            found += [
                f"{key.value}={value.value}"
                for key, value in pairs
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and _bad(key.value, value.value)
            ]
    return found


def _call_breaches(node: ast.Call) -> list[str]:
    found = []
    if isinstance(node.func, ast.Name) and node.func.id in CALLS:
        found.append(node.func.id)
    for keyword in node.keywords:
        if isinstance(keyword.value, ast.Constant) and _bad(keyword.arg, keyword.value.value):
            found.append(f"{keyword.arg}={keyword.value.value}")
    if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) in ("yaml.load", "yaml.load_all"):
        loaders = [ast.unparse(argument).split(".")[-1] for argument in node.args[1:]]
        loaders += [ast.unparse(keyword.value).split(".")[-1] for keyword in node.keywords if keyword.arg == "Loader"]
        if not loaders or not set(loaders) <= SAFE_LOADERS:
            found.append("yaml.load")
    return found


def _bad(name: Any, value: Any) -> bool:
    return name in KEYWORDS and value is KEYWORDS[name]


def test_no_module_can_run_or_unpickle_what_it_is_given() -> None:
    found = {path.relative_to(ROOT).as_posix(): breaches(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {path: lines for path, lines in found.items() if lines} == {}


FORBIDDEN = """
import pickle
from pickle import loads
import joblib.numpy_pickle
torch.load(path)
torch.load(path, weights_only=False)
yaml.load(text)
yaml.load(text, Loader=yaml.Loader)
yaml.unsafe_load(text)
eval(text)
exec(text)
compile(text, "", "exec")
__import__(name)
os.system(command)
subprocess.run(command, shell=True)
from_pretrained(path, trust_remote_code=True)
arguments = {"trust_remote_code": True}
numpy.load(path, allow_pickle=True)
""".strip().splitlines()


@pytest.mark.parametrize("line", FORBIDDEN)
def test_the_search_for_breaches_finds_each(line: str) -> None:
    assert breaches(line) != []
    assert breaches(f"def function():\n    if True:\n        {line}") != []


def test_the_search_for_breaches_lets_pass_what_is_safe() -> None:
    for line in ("yaml.load(text, Loader=yaml.SafeLoader)", "model.eval()", "re.compile(p)", "run(c, shell=False)"):
        assert breaches(line) == [], line
    assert len(SOURCES) > 100


@pytest.mark.parametrize(("package", "oldest"), [("ray", (2, 56)), ("torch", (2, 10)), ("vllm", (0, 32))])
def test_known_holes_are_mended_in_the_libraries(package: str, oldest: tuple[int, int]) -> None:
    """CVE-2026-57516 (Ray before 2.56), CVE-2026-24747 (torch before 2.10), CVE-2026-115918 (vLLM before 0.32)."""
    try:
        found = version(package)
    except PackageNotFoundError:
        found = version(f"{package}-cpu")
    assert tuple(map(int, re.findall(r"\d+", found)[:2])) >= oldest


def test_files_of_a_run_are_its_owners_alone(tmp_path: Path) -> None:
    """The composition root sets the umask, which Ray's processes inherit."""
    code = "import os, sys; os.umask(0); from rlsys.launch import session; os.chdir(sys.argv[1])"
    code += "; open('file', 'w'); os.mkdir('folder')"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, timeout=120)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {"file": 0o600, "folder": 0o700}


# --- planted pickles ---


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
    from learners.deepspeed.model import load_critic, load_model

    for name in PICKLED_WEIGHTS:
        (model / name).write_bytes(canary)
    assert given_model(str(model), "model.path").path == model
    assert load_model(model, "fp32", "cpu").num_parameters() > 0
    assert load_critic(model, "fp32", "cpu").num_parameters() > 0


def test_an_index_does_not_lead_the_learner_to_pickles(model: Path, canary: bytes) -> None:
    """Not even in a checkpoint of another run, whose policy no command has looked at."""
    from learners.deepspeed.model import load_critic, load_model

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
    assert "no *.safetensors; other weight formats are not read" in refused(capfd, monkeypatch, config, tmp_path)


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
    config = {"model": {"path": str(model)}, "task": {"type": "dataset", "path": str(path)}}
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
    config = {"model": {"path": str(model)}, "task": {"type": kind, field: str(path)}}
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


# --- what no verifier judged ---


def test_an_error_or_timeout_of_a_verifier_trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the processes to the tensors of the learner: as if the two completions had never been sampled."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "actors" / "verifiers"))
    settings = RewardsConfig(timeout_s=2.0, memory_mib=1024)

    async def judged() -> list[Any]:
        pool = RewardPool(LetterCountConfig(), 0, settings, verifier="scripted_verifier:build")
        try:
            return await pool.verify([("3", said) for said in ("say 3", "raise", "say 4", "hang")])
        finally:
            await pool.close()

    verdicts = asyncio.run(judged())
    assert [verdict.outcome for verdict in verdicts] == ["ok", "error", "wrong", "timeout"]
    prompt = Prompt(prompt_id="p", token_ids=np.array([1, 2], dtype=np.int32), answer="3")
    completions = [
        Completion(
            token_ids=np.array([10 + number], dtype=np.int32),
            logprobs=np.array([-0.5], dtype=np.float32),
            finish_reason="stop",
            versions=(VersionSpan(start=0, version=0),),
        )
        for number in range(4)
    ]
    objective = ObjectiveConfig()
    both = []
    for kept in (range(4), (0, 2)):
        group = build_group(prompt, [completions[n] for n in kept], [verdicts[n] for n in kept])
        lists = build_samples(
            TrainingBatch(groups=(group,)), objective,
            StepTerms(weights={"policy": 1.0}, chosen_sft=False, kl_weight=0.0),
            max_tokens=8, scorer=None,  # type: ignore[arg-type] - asked for nothing
        )  # fmt: skip
        both.append(collate([item for items in lists[0] for item in items], pad_id=0))
    batch, without = both
    assert batch.input_ids.tolist() == without.input_ids.tolist() == [[1, 2, 10], [1, 2, 12]]
    assert batch.policy is not None and without.policy is not None
    assert batch.policy.advantages.tolist() == without.policy.advantages.tolist()
    # Rewards 1 and 0: mean 1/2, standard deviation sqrt(1/2). With zeros for the others the mean would be 1/4.
    assert batch.policy.advantages.tolist() == pytest.approx([2**-0.5, -(2**-0.5)], abs=1e-5)
    assert batch.targets == 2
