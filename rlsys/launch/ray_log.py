"""Send everything that Ray says in the driver to a file instead of the terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray._private.worker as ray_worker

FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"


@contextlib.contextmanager
def ray_logging_to(path: Path) -> Iterator[None]:
    """Write Ray's log records, and the errors that its services report, to a file while the block runs.

    Ray logs under the name `ray`. A thread in the driver prints the errors of Ray's services, such as the unexpected
    death of a worker, to standard output. No option of Ray turns that thread off, so its print function is replaced.

    Args:
        path: the log file. It is created if it does not exist, and appended to otherwise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT))
    logger = logging.getLogger("ray")
    services = logging.getLogger("ray.services")
    handlers, printer = logger.handlers, ray_worker.print_to_stdstream

    def log_errors(data: dict[str, Any], ignore_prefix: bool) -> None:
        for line in data["lines"]:
            services.error("%s", line)

    logger.handlers = [handler]
    ray_worker.print_to_stdstream = log_errors
    try:
        yield
    finally:
        ray_worker.print_to_stdstream = printer
        logger.handlers = handlers
        handler.close()


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Append what this process writes to file descriptors 1 and 2 to a file while the block runs.

    Ray's C++ code logs to the terminal until it is connected, and again after it has disconnected.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, original in enumerate(saved, start=1):
            os.dup2(original, number)
        for open_descriptor in (descriptor, *saved):
            os.close(open_descriptor)
