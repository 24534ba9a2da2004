"""Rules that no part may break: no code is run or unpickled, and what no verifier judged trains nothing."""

from __future__ import annotations

import ast
import asyncio
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from problems import problem_of

from actors.engine import Completion
from actors.rollouts.single_turn import build_group
from actors.verifiers.pool import RewardPool
from learners.samples.batching import collate
from learners.samples.build import StepTerms, build_samples
from rlsys.config.objective import ObjectiveConfig
from rlsys.config.rewards import RewardsConfig
from rlsys.config.tasks import LetterCountConfig
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


# --- what no verifier judged ---


def test_an_error_or_timeout_of_a_verifier_trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the processes to the tensors of the learner: as if the two completions had never been sampled."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "actors" / "verifiers"))
    settings = RewardsConfig(timeout_s=2.0, memory_mib=1024)

    async def judged() -> list[Any]:
        pool = RewardPool(LetterCountConfig(), 0, settings, verifier="scripted_verifier:build")
        try:
            return await pool.verify([(problem_of("3"), said) for said in ("say 3", "raise", "say 4", "hang")])
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
    assert len(batch.targets) == 2
