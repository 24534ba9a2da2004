"""What a module loads when it is imported, measured in a fresh interpreter.

import-linter (`make lint`) reads our own import statements; this also sees what libraries pull in.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
FRAMEWORKS = ("deepspeed", "ray", "vllm")
# The composition root with its callers, and the rooms where the frameworks live.
HEAVY = {
    "actors.weight_transfer",
    "rlsys.launch.ray_cluster",
    "rlsys.launch.ray_log",
    "rlsys.launch.session",
    "rlsys.launch.start",
    "rlsys.ray_errors",
    "rlsys.launch.colocated",
    "rlsys.launch.remote",
    "actors.engine",
    "actors.model_actor",
    "actors.rollout_actor",
    "actors.teacher",
    "learners.deepspeed.engine",
    "learners.learner_actor",
}
# Coordination handles numpy arrays and handles of tensors, never tensors; the search handles token ids; advantages
# are rewards compared.
WITHOUT_TORCH = (
    "rlsys.types",
    "rlsys.errors",
    "rlsys.interfaces",
    "rlsys.transfer.wire",
    "rlsys.transfer.object_store",
    "rlsys.tasks",
    "rlsys.trees",
    "rlsys.stats",
    "rlsys.directory",
    "actors.search.mcts",
    "actors.search.group",
    "actors.search.scheduler",
    "learners.objective.advantages",
    "learners.objective.tree_advantages",
)
# argv: JSON lists of the modules to import and the names to look for; prints {module: [names it brought]}.
PROBE = """
import importlib, json, sys
modules, names = map(json.loads, sys.argv[1:])
brought, seen = {}, set()
for module in modules:
    importlib.import_module(module)
    new = {name for name in names if name in sys.modules} - seen
    if new:
        brought[module] = sorted(new)
    seen |= new
print(json.dumps(brought))
"""


def all_modules() -> list[str]:
    files = (file for package in ("rlsys", "actors", "learners") for file in (ROOT / package).rglob("*.py"))
    names = (".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files)
    return sorted(name.removesuffix(".__init__") for name in names)


def brought(modules: Iterable[str], names: Iterable[str]) -> dict[str, list[str]]:
    """Import `modules` in order in a new process: which of `names` each was the first to load."""
    command = [sys.executable, "-c", PROBE, json.dumps(list(modules)), json.dumps(list(names))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_probe_sees_a_module_that_is_loaded() -> None:
    assert brought(["json", "wave", "csv"], ["wave", "ray"]) == {"wave": ["wave"]}


def test_light_modules_load_no_framework() -> None:
    light = [name for name in all_modules() if name not in HEAVY]
    assert {"rlsys.config.schema", "rlsys.control.controller", "learners.objective.losses"} <= set(light)
    assert brought(light, FRAMEWORKS) == {}


def test_coordination_loads_no_torch() -> None:
    assert brought(WITHOUT_TORCH, (*FRAMEWORKS, "torch", "transformers")) == {}


def test_rooms_without_torch() -> None:
    rooms = ("rlsys.config", "rlsys.control", "rlsys.data", "rlsys.run", "rlsys.search")
    modules = [name for name in all_modules() if name.startswith(rooms)]
    assert {"rlsys.control.fleet", "rlsys.control.stages.online", "rlsys.data.inputs"} <= set(modules)
    assert brought(modules, (*FRAMEWORKS, "torch", "transformers")) == {}


def test_every_heavy_module_exists() -> None:
    # A renamed module would otherwise leave a name here that excuses a future one.
    assert set(all_modules()) >= HEAVY
