"""What Ray says in the driver goes to a file, and the terminal stays free for rlsys."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray._private.worker as ray_worker

from rlsys.launch.ray_log import output_to, ray_logging_to

DEATH = "A worker died or was killed while executing a task by an unexpected system error."


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "ray.log"


def test_records_of_ray_go_to_the_file(log_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("ray")
    handlers = logger.handlers
    with ray_logging_to(log_file):
        logging.getLogger("ray._private.authentication").warning("Token authentication is enabled")
    assert log_file.read_text().endswith("WARNING Token authentication is enabled\n")
    assert logger.handlers is handlers
    assert capfd.readouterr() == ("", "")


def test_errors_of_services_go_to_the_file(log_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Ray's own listener runs here, so that the test fails if Ray renames the function that prints."""
    stopped = threading.Event()
    job = SimpleNamespace(binary=lambda: b"job")

    def poll() -> tuple[None, dict[str, Any]]:
        stopped.set()
        return None, {"job_id": b"job", "error_message": DEATH}

    subscriber = SimpleNamespace(subscribe=lambda: None, poll=poll)
    worker: Any = SimpleNamespace(gcs_error_subscriber=subscriber, current_job_id=job)
    ray_worker.listen_error_messages(worker, stopped)
    assert DEATH in capfd.readouterr().out
    stopped.clear()
    with ray_logging_to(log_file):
        ray_worker.listen_error_messages(worker, stopped)
    assert log_file.read_text().endswith(f"ray.services ERROR {DEATH}\n")
    assert capfd.readouterr() == ("", "")


def test_native_output_goes_to_the_file(log_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log_file.parent.mkdir()
    with pytest.raises(ValueError, match="broken"), output_to(log_file):
        os.write(1, b"one\n")
        os.write(2, b"two\n")
        raise ValueError("broken")
    print("three")
    assert log_file.read_text() == "one\ntwo\n"
    assert capfd.readouterr() == ("three\n", "")
