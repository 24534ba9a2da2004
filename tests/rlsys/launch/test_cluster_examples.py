"""The examples for Kubernetes and Slurm give rlsys what it asks a cluster for."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from rlsys.config.keys import all_keys
from rlsys.launch.access import CLUSTER, MODE

FOLDER = Path(__file__).resolve().parents[3] / "docs" / "cluster"
JOB = yaml.safe_load((FOLDER / "rayjob.yaml").read_text(encoding="utf-8"))
SLURM = (FOLDER / "slurm.sh").read_text(encoding="utf-8")


def overrides(command: str) -> dict[str, str]:
    found = dict(word.split("=", 1) for word in command.split() if re.match(r"[a-z_]+\.[a-z_.]+=", word))
    assert set(found) <= {key.name for key in all_keys()}
    return found


def pods() -> list[dict[str, Any]]:
    cluster = JOB["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_the_job_of_kubernetes() -> None:
    cluster = JOB["spec"]["rayClusterSpec"]
    assert JOB["spec"]["entrypoint"].startswith("rlsys train /shared/")
    given = overrides(JOB["spec"]["entrypoint"])
    assert given["run.address"] == "auto" and given["run.dir"].startswith("/shared/")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == version("ray")
    for pod in pods():
        (container,) = pod["containers"]
        environment = {each["name"]: each["value"] for each in container["env"]}
        assert environment[CLUSTER] == "1"
        assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) <= pod["terminationGracePeriodSeconds"]
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/shared", "/dev/shm"}
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_script_for_slurm() -> None:
    subprocess.run(["bash", "-n", FOLDER / "slurm.sh"], check=True)
    assert f"export {MODE}=token" in SLURM and f"export {CLUSTER}=1" in SLURM
    (command,) = re.findall(r"^rlsys train.*$", SLURM, re.MULTILINE)
    assert set(overrides(command)) == {"run.dir", "run.address", "run.time_limit"}
    (hours,) = re.findall(r"--time=(\d+):00:00", SLURM)
    (limit,) = re.findall(r"^limit=(\d+)", SLURM, re.MULTILINE)
    assert int(limit) < int(hours) * 3600
