"""GPUs that a config asks for and this machine does not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from minimal_config import minimal

from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.launch import devices, prepare
from rlsys.launch.devices import missing_devices
from rlsys.launch.resources import ResourcePlan
from rlsys.models.folder import ModelFolder


def config(**changes: object) -> Config:
    return parse_config(minimal(run__device="cuda", actors={"count": 3, "tensor_parallel_size": 2}, **changes), "c")


def installed(monkeypatch: pytest.MonkeyPatch, gpus: int, visible: str | None = None, version: str = "1.0") -> None:
    monkeypatch.setattr(devices, "_installed_gpus", lambda: gpus)
    monkeypatch.setattr(devices.metadata, "version", lambda _: version)
    monkeypatch.delenv(devices.VISIBLE, raising=False)
    if visible is not None:
        monkeypatch.setenv(devices.VISIBLE, visible)


def test_enough_gpus_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, 8)
    assert missing_devices(config(), 8, learner=True) is None
    installed(monkeypatch, 6)
    assert missing_devices(config(), 6, learner=False) is None
    installed(monkeypatch, 0)
    assert missing_devices(parse_config(minimal(), "c"), 8, learner=True) is None, "device cpu"
    assert missing_devices(config(run__address="10.0.0.1:6379"), 8, learner=True) is None, (
        "Ray knows the GPUs of a cluster"
    )


@pytest.mark.parametrize(
    ("gpus", "visible", "version", "message"),
    [
        (
            0,
            None,
            "1.0",
            "run.device cuda: expected 8 GPUs on this machine, found none; set run.device to cpu, or run ",
        ),
        (8, "", "1.0", "found none (CUDA_VISIBLE_DEVICES=); set run.device to cpu"),
        (
            8,
            "2,3",
            "1.0",
            "the processes need 8 GPUs, this machine has 2 (CUDA_VISIBLE_DEVICES=2,3); lower actors.count",
        ),
        (1, "0,1,2,3", "1.0", "this machine has 1 (CUDA_VISIBLE_DEVICES=0,1,2,3); lower actors.count"),
        (8, "0,0", "1.0", "this machine has 1 (CUDA_VISIBLE_DEVICES=0,0); lower actors.count"),
        (7, None, "1.0", "the processes need 8 GPUs, this machine has 7; lower actors.count"),
        (
            8,
            None,
            "2.13.0+cpu",
            "the installed torch is the one for CPUs; run `pip install --no-deps -r requirements-gpu",
        ),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, gpus: int, visible: str | None, version: str, message: str
) -> None:
    installed(monkeypatch, gpus, visible, version)
    assert message in (missing_devices(config(), 8, learner=True) or "")


@pytest.mark.parametrize(
    ("placement", "learner", "others", "remedy"),
    [
        ("spread", True, [], "actors.count or actors.tensor_parallel_size or learner.ranks, or set placement to "),
        ("spread", True, ["teacher"], "teacher.model.count or actors.count or actors.tensor_parallel_size or learner"),
        ("spread", False, ["judge"], "search.value.count or actors.count or actors.tensor_parallel_size"),
        ("colocated", True, [], "actors.count together with learner.ranks"),
    ],
)
def test_the_fields_to_lower_are_those_in_use(
    monkeypatch: pytest.MonkeyPatch, placement: str, learner: bool, others: list[Any], remedy: str
) -> None:
    installed(monkeypatch, 1)
    changes = {"learner__ranks": 3, "actors__tensor_parallel_size": 1} if placement == "colocated" else {}
    message = missing_devices(config(placement=placement, **changes), 8, learner=learner, others=others) or ""
    assert f"this machine has 1; lower {remedy}" in message
    assert ("set placement to colocated" in message) is (learner and placement == "spread")


MODEL = {"path": "some/model", "count": 2, "tensor_parallel_size": 2}
JUDGE = {"type": "model", "count": 3, "path": "some/model"}


@pytest.mark.parametrize(
    ("purpose", "changes", "gpus"),
    [
        ("train", {}, 8),
        ("train", {"teacher__model": MODEL, "objective__distill": {"weight": 1.0}}, 12),
        ("train", {"search": {"fraction": 0.5, "value": JUDGE}}, 11),
        ("train", {"search": {"value": JUDGE}}, 8),
        ("search", {}, 6),
        ("search", {"search": {"model": MODEL, "value": JUDGE}}, 7),
        ("evaluate", {"search": {"value": JUDGE}}, 6),
    ],
)
def test_the_gpus_of_all_engines_are_counted(
    monkeypatch: pytest.MonkeyPatch, purpose: Any, changes: dict[str, Any], gpus: int
) -> None:
    """The same number as in the resource plan, which also knows the models."""
    installed(monkeypatch, 1)
    asked = config(**changes)
    with pytest.raises(ConfigError, match=f"the processes need {gpus} GPUs"):
        prepare.check_settings(asked, purpose)
    folder = ModelFolder(Path("some/model"))
    monkeypatch.setattr(prepare, "prepare_model", lambda *_, **__: folder)
    monkeypatch.setattr(prepare, "given_model", lambda *_, **__: folder)
    planned = []
    monkeypatch.setattr(prepare, "plan_resources", lambda *given, **others: planned.append((given, others)) or 1 / 0)
    monkeypatch.setattr(prepare, "check_models", lambda *_, **__: [])
    monkeypatch.setattr(prepare, "check_adapter", lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        prepare.prepare(asked, purpose)
    [((serving, _, searching), options)] = planned
    ranks = asked.learner.ranks if options["learner"] else 0
    plan = ResourcePlan(config=serving, auxiliary=searching.auxiliary if searching else (), ranks=ranks, needs=())
    assert plan.gpus == gpus


def test_a_machine_without_a_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "DRIVER", "libno-such-driver.so.1")
    assert devices._installed_gpus() == 0
