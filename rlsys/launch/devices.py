"""Check that this machine has the GPUs that a config asks for. torch is not imported."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from importlib import metadata

from rlsys.config.engine_roles import section_of
from rlsys.config.schema import Config
from rlsys.trees import Role

DRIVER = "libnvidia-ml.so.1"
VISIBLE = "CUDA_VISIBLE_DEVICES"
_REMEDY = "set run.device to cpu, or run this config on a machine with GPUs"


def missing_devices(config: Config, gpus: int, *, learner: bool, others: Sequence[Role] = ()) -> str | None:
    """Return what this machine lacks for run.device cuda, or None. On a cluster, Ray knows the GPUs of its nodes.

    Args:
        config: the config of the command.
        gpus: GPUs of all processes; see `rlsys.launch.resources.count_gpus`.
        learner: whether the command starts the learner.
        others: roles of the engines of other models.
    """
    if config.run.device != "cuda" or config.run.address != "local":
        return None
    count, limit = visible_gpus()
    if not count:
        return f"run.device cuda: expected {gpus} GPUs on this machine, found none{limit}; {_REMEDY}"
    if count < gpus:
        fields = [f"{section_of(role)}.count" for role in others]
        if learner and config.placement == "colocated":
            fields.append("actors.count together with learner.ranks")
        else:
            fields += ["actors.count", "actors.tensor_parallel_size", *(["learner.ranks"] if learner else [])]
        remedy = ", or set placement to colocated" if learner and config.placement == "spread" else ""
        return (
            f"run.device cuda: the processes need {gpus} GPUs, this machine has {count}{limit}; "
            f"lower {' or '.join(fields)}{remedy}"
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
    names = {name.strip() for name in visible.split(",")} - {"", "-1"}
    return min(len(names), installed), f" ({VISIBLE}={visible})"


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
