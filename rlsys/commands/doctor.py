"""`rlsys doctor`: whether this machine can run rlsys, and what to do if not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlsys.display import printable
from rlsys.launch.machine_checks import Check, engine_device, machine_checks
from rlsys.launch.self_test import PARTS

STYLES = {"ok": "green", "warning": "yellow", "failure": "red"}
SELF_TEST_S = 300.0  # on a busy machine; an idle one needs about ten seconds


def run(run_dir: Path, console: Console, *, self_test: bool) -> bool:
    """Print all checks, and return whether none is a failure."""
    checks = machine_checks(run_dir)
    _print(checks, console)
    if self_test and not any(check.mark == "failure" for check in checks):
        print("self-test: about ten seconds on an idle machine", file=sys.stderr)
        tested = list(try_parts(engine_device()))
        _print(tested, console)
        checks += tested
    failures, warnings = (sum(check.mark == mark for check in checks) for mark in ("failure", "warning"))
    console.print(Text(f"failures: {failures}, warnings: {warnings}"))
    return not failures


def try_parts(device: str) -> Iterator[Check]:
    """Run the self-test in a process of its own, and yield a check for each of its parts."""
    folder = Path(tempfile.mkdtemp(prefix="rlsys-doctor-"))
    command = [sys.executable, "-m", "rlsys.launch.self_test", device, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SELF_TEST_S, check=False)
        output, errors, end = done.stdout, done.stderr, f"ended with code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, errors = (_text(each) for each in (error.stdout, error.stderr))
        end = f"did not end within {SELF_TEST_S:g} s"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results = {line["part"]: line for line in map(json.loads, output.splitlines())}
    for part in PARTS:
        if part in results:
            seconds = results[part]["seconds"]
            yield Check(name=part, mark="ok", observed=f"{results[part]['detail']} ({seconds:.1f} s)")
            continue
        last = next((line for line in reversed(errors.splitlines()) if line.strip()), "it printed nothing")
        remedy = f"see the whole error: python -m rlsys.launch.self_test {device} $(mktemp -d)"
        yield Check(name=part, mark="failure", observed=f"the test {end}: {last[:300]}", remedy=remedy)
        return


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _print(checks: list[Check], console: Console) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, min_width=7)
    table.add_column(style="bold", no_wrap=True, min_width=12)
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(Text(check.mark, style=STYLES[check.mark]), check.name, printable(check.observed))
        if check.remedy:
            table.add_row("", "", Text(f"-> {check.remedy}", style="italic"))
    console.print(table)
