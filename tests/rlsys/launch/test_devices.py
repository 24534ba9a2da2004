"""GPUs that a config asks for and this machine does not have."""

from __future__ import annotations

import pytest
from minimal_config import minimal

from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.launch import devices
from rlsys.launch.devices import missing_devices


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
    assert missing_devices(config(), learner=True) is None
    installed(monkeypatch, 6)
    assert missing_devices(config(), learner=False) is None
    installed(monkeypatch, 0)
    assert missing_devices(parse_config(minimal(), "c"), learner=True) is None, "device cpu"
    assert missing_devices(config(run__address="10.0.0.1:6379"), learner=True) is None, (
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
    assert message in (missing_devices(config(), learner=True) or "")


def test_a_machine_without_a_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "DRIVER", "libno-such-driver.so.1")
    assert devices._installed_gpus() == 0
