"""Check that this machine has the GPUs that a config asks for. torch is not imported."""

from __future__ import annotations

import ctypes
import os
from importlib import metadata

from rlsys.config.schema import Config

DRIVER = "libnvidia-ml.so.1"
VISIBLE = "CUDA_VISIBLE_DEVICES"
_REMEDY = "set run.device to cpu, or run this config on a machine with GPUs"


def missing_devices(config: Config, *, learner: bool) -> str | None:
    """Return what this machine lacks for run.device cuda, or None. On a cluster, Ray knows the GPUs of its nodes.

    Args:
        config: the config of the command.
        learner: whether the command starts the learner.
    """
    if config.run.device != "cuda" or config.run.address != "local":
        return None
    gpus = config.actors.count * config.actors.tensor_parallel_size
    gpus += config.learner.ranks if learner and config.placement == "spread" else 0
    count, limit = visible_gpus()
    if not count:
        return f"run.device cuda: expected {gpus} GPUs on this machine, found none{limit}; {_REMEDY}"
    if count < gpus:
        return (
            f"run.device cuda: the processes need {gpus} GPUs, this machine has {count}{limit}; lower actors.count, "
            "actors.tensor_parallel_size or learner.ranks, or set placement to colocated"
        )
    for package in ("torch", "vllm"):
        if not _is_for_gpus(package):
            return (
                f"run.device cuda: the installed {package} is the one for CPUs; run `pip install --no-deps -r "
                "requirements-gpu.lock -e .`, or set run.device to cpu"
            )
    return None


def visible_gpus() -> tuple[int, str]:
    """Return the number of GPUs that a process here can use, and a remark if the environment hides some."""
    installed, visible = _installed_gpus(), os.environ.get(VISIBLE)
    if not installed:
        return 0, ""
    if visible is None:
        return installed, ""
    names = [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    return len(names), f" ({VISIBLE}={visible})"


def _installed_gpus() -> int:
    """Return the number of GPUs that the driver knows; 0 without a driver."""
    try:
        library = ctypes.CDLL(DRIVER)
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    if library.nvmlInit_v2() != 0:
        return 0
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    library.nvmlShutdown()
    return count.value


def _is_for_gpus(package: str) -> bool:
    """Return whether an installed package can use GPUs: vLLM for CPUs has another name, and torch says it."""
    try:
        return "+cpu" not in metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
