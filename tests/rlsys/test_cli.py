"""The command line without a run: exit codes, messages, and the closing lines of a finished run."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from learners.settings import learner_environment
from rlsys import cli
from rlsys.commands import check_summary
from rlsys.config.engine_roles import ModelEngines, engine_settings
from rlsys.config.files import dump_config, parse_config
from rlsys.config.keys import all_keys
from rlsys.config.schema import Config, FromScratchConfig, LearnerConfig
from rlsys.errors import (
    AbortedRunError,
    CheckpointError,
    ConfigError,
    DamagedFileError,
    EngineError,
    InterruptedRunError,
    RlsysError,
)
from rlsys.launch import ray_cluster as cluster
from rlsys.launch import session as launch
from rlsys.launch.resources import ResourcePlan
from rlsys.models.folder import load_tokenizer
from rlsys.models.scratch import build_from_scratch
from rlsys.run import report
from rlsys.run.resume import Start, checkpoint_store
from rlsys.tasks import build_task
from rlsys.types import RunState


def config(run_dir: Path | str = "runs/x", **run: Any) -> Config:
    values: dict[str, Any] = {
        "run": {"dir": str(run_dir), **run},
        "model": {"from_scratch": {}},
        "task": {"type": "letter_count"},
    }
    return parse_config(values, "test")


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("train.max_steps: wrong"), 2, "error: train.max_steps: wrong"),
        (DamagedFileError("a: cannot be read; restore it"), 2, "error: a: cannot be read; restore it"),
        (CheckpointError("no space left"), 1, "error: no space left"),
        (EngineError("actor 0 died: why"), 1, "error: actor 0 died: why"),
        (InterruptedRunError("SIGTERM; the state is saved"), 143, "stopped by SIGTERM; the state is saved"),
        (AbortedRunError("SIGINT before anything was trained"), 130, "stopped by SIGINT before anything was trained"),
        (AbortedRunError("SIGTERM"), 143, "stopped by SIGTERM"),
        (
            InterruptedRunError("run.time_limit; the state is saved"),
            75,
            "stopped by run.time_limit; the state is saved",
        ),
        (AbortedRunError("run.time_limit before it began"), 75, "stopped by run.time_limit before it began"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "error: x: No space left on device"),
        (PermissionError(13, "denied", "x"), 2, "error: x: denied; change the permissions, or choose another path"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
        (SystemExit(130), 130, "stopped by SIGINT"),
    ],
    ids=repr,
)
def test_expected_errors_are_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli._exit_with(raising(error))
    assert (stopped.value.code, capsys.readouterr().err) == (code, line + "\n")


def test_an_unknown_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        cli._exit_with(raising(ZeroDivisionError()))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return a function that runs a command in this process: (exit code, stdout, stderr)."""

    def command(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["rlsys", *arguments])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return (stopped.value.code, *capsys.readouterr())

    return command


def test_version(run) -> None:
    assert run("--version") == (0, "rlsys 0.1.0\n", "")


def test_keys(run) -> None:
    code, output, _ = run("keys", "rewards")
    assert code == 0
    rewards = [key for key in all_keys() if key.name.startswith("rewards.")]
    assert len(rewards) == 9
    assert output.splitlines() == [
        line for key in rewards for line in (f"{key.name}  {key.type}  {key.default}", f"    {key.meaning}")
    ]
    assert "train.optimizer.learning_rate" in run("keys")[1]


def test_keys_of_a_reader_that_has_gone(tmp_path: Path) -> None:
    command = f"{sys.executable} -m rlsys.cli keys 2>{tmp_path / 'errors'} | head -n 1; echo ${{PIPESTATUS[0]}}"
    shown = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert shown.splitlines() == ["run.dir  text  required", "0"]
    assert (tmp_path / "errors").read_text() == ""


def test_help_imports_nothing_that_only_commands_need() -> None:
    heavy = {"pydantic", "yaml", "numpy", "asyncio", "ray", "torch", "rlsys.config.schema", "rlsys.display"}
    code = f"import sys, rlsys.cli; print(sorted({heavy} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert shown == "[]\n"


def test_keys_of_a_section_that_is_not_there(run) -> None:
    code, _, errors = run("keys", "trains")
    expected = "error: trains: no such section or key; did you mean train? `rlsys keys` shows all; the sections "
    assert code == 2 and errors.startswith(expected)
    code, _, errors = run("keys", "optimizer")
    assert code == 2 and "did you mean preference.optimizer or sft.optimizer or train.optimizer" in errors


def test_a_usage_line_names_its_arguments(run) -> None:
    for command, usage in {
        "train": "[OPTIONS] CONFIG [KEY=VALUE]...",
        "evaluate": "[OPTIONS] MODEL... [KEY=VALUE...]",
        "view": "[OPTIONS] RUN [RUN2]",
        "keys": "[OPTIONS] [SECTION]...",
    }.items():
        assert f"rlsys {command} {usage} " in run(command, "--help")[1]


@pytest.fixture(scope="module")
def model_without_a_bracket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a model whose tags are vocabulary entries, and whose tokenizer has no other token for "<"."""
    folder = tmp_path_factory.mktemp("model")
    sizes = FromScratchConfig(hidden_size=32, layers=1, heads=1, intermediate_size=32)
    build_from_scratch(sizes, build_task(config().task, 0).vocabulary(), 0, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    del tokenizer["model"]["vocab"]["<"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_the_plan_shows_all_engines_and_their_gpus() -> None:
    values = config(device="cuda").model_dump()
    reviewer = {"path": "r", "count": 3, "max_model_len": 1024, "tensor_parallel_size": 2}
    own = parse_config({**values, "actors": {"count": 4}, "search": {"reviewer": reviewer}}, "test")
    assert own.search.reviewer
    actors = engine_settings(own, "reviewer", own.search.reviewer)
    engines = ModelEngines(role="reviewer", path=Path("r"), actors=actors)
    shown = check_summary.processes(ResourcePlan(config=own, auxiliary=[engines], ranks=1, needs=[]))
    assert shown == "4 actors, 3 of search.reviewer, 1 learner rank, 11 GPUs"  # 4 + 3 * 2 + 1


LOST = ("search.nodes={guess: {tag: guess, terminal: true}}", "search.tables={mine: {children: {start: {guess: 1}}}}")


@pytest.mark.parametrize("search", [("search.patterns=[mine]",), ("search.patterns=[a,mine]", "search.fraction=0.5")])
def test_check_finds_a_tag_that_the_tokenizer_loses(
    run, model_without_a_bracket: Path, tmp_path: Path, search: tuple[str, ...]
) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config(tmp_path / "run")))
    given = ("check", str(tmp_path / "config.yaml"), "model.from_scratch=null", f"model.path={model_without_a_bracket}")
    code, _, errors = run(*given, *LOST, *search)
    assert code == 2
    assert errors.startswith("error: search.nodes: the tag guess is changed by this tokenizer: expected <guess>")
    assert errors.endswith(f"; the model is {model_without_a_bracket}\n")
    assert run(*given, "search.fraction=0.5")[0] == 0  # the shipped tags are not lost


def test_check_shows_a_prompt(run, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config(tmp_path / "run")))
    code, output, _ = run("check", str(tmp_path / "config.yaml"))
    shown = re.search(
        r"^first held-out prompt, \d+ tokens \(its question is in it\): '<user>.+<assistant>'$", output, re.M
    )
    assert code == 0 and shown


def test_check_refuses_tags_that_the_model_lacks(run, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config(tmp_path / "run")))
    folder = tmp_path / "model"
    build_from_scratch(FromScratchConfig(hidden_size=32, layers=1, heads=1, intermediate_size=32), (), 0, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<thinking>"])
    tokenizer.save_pretrained(folder)
    given = ("check", str(tmp_path / "config.yaml"), "model.from_scratch=null", f"model.path={folder}")
    assert run(*given, "stages=[online]")[0] == 0
    code, _, errors = run(*given, "stages=[online]", "search.fraction=0.5")
    assert code == 2 and "('<thinking>') is beyond the vocabulary of the model" in errors


def test_check_reads_the_data_files(run, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config(tmp_path / "run")))
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    given = ("check", str(tmp_path / "config.yaml"), "stages=[sft]", f"sft.path={rows}")
    code, output, _ = run(*given)
    assert code == 0 and "sft: 1 rows\n" in output
    rows.write_text(json.dumps({"prompt": "a", "completion": 3}) + "\n")
    assert run(*given)[::2] == (
        2,
        f"error: sft.path {rows}: 1 of 1 rows are unusable, more than sft.max_bad_rows 0.01; mend or remove them, "
        "or raise it; the first: row 1, column completion: expected text or messages, found int '3'\n",
    )
    relative = f"it is relative to the current folder {Path.cwd()}: change to its folder, or give an absolute path"
    assert run(*given[:3], "sft.path=rows.csv")[2] == f"error: sft.path rows.csv: no such file; {relative}\n"


def test_the_last_stage_names_the_section_to_continue_with(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    path = {"path": "rows.jsonl", "max_steps": 7}
    values = config(tmp_path).model_dump() | {"stages": ["sft"], "sft": path}
    assert report.finished(parse_config(values, "test")).endswith("config.yaml sft.max_steps=14")


def start_at(stage: int, step: int, checkpoint: Path | None) -> Start:
    return Start(RunState(stage=stage, step=step, weight_version=step, cursor=0), checkpoint)


def export_policy(run_dir: Path) -> None:
    (run_dir / "stages" / "online").mkdir(parents=True)
    (run_dir / "stages" / "online" / "config.json").write_text("{}")


def test_a_run_is_complete_only_at_the_end_of_its_last_stage(tmp_path: Path) -> None:
    export_policy(tmp_path)
    own = tmp_path / "checkpoints" / "step_000080"
    # The default config: 300 steps of the warm start, then 80 online.
    places = ((0, 0), (0, 300), (1, 79), (1, 80), (1, 90))
    complete = [launch.is_complete(config(), start_at(*at, own), tmp_path) for at in places]
    assert complete == [False, False, False, True, True]


def test_a_run_is_complete_only_if_its_own_policy_is_exported(tmp_path: Path) -> None:
    done = start_at(1, 80, tmp_path / "checkpoints" / "step_000080")
    assert not launch.is_complete(config(), done, tmp_path), "killed before the export"
    export_policy(tmp_path)
    assert launch.is_complete(config(), done, tmp_path)
    other = start_at(1, 80, tmp_path / "other" / "checkpoints" / "step_000080")
    assert not launch.is_complete(config(), other, tmp_path)


def test_the_end_of_a_run_says_what_to_do_next(tmp_path: Path) -> None:
    rows = [
        {"stage": "online", "step": 79, "weights/version": 379, "held_out/greedy_accuracy": 0.5},
        {"stage": "online", "step": 80, "weights/version": 380, "held_out/greedy_accuracy": 0.75,
         "held_out/pass_at_k": None},
        {"stage": "online", "step": 81, "weights/version": 381},
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.finished(config(tmp_path)).splitlines() == [
        f"run directory: {tmp_path}",
        "held-out: greedy accuracy 0.750 (weight version 380)",
        f"evaluate: rlsys evaluate {tmp_path}",
        f"export: rlsys export {tmp_path} --output FOLDER",
        f"continue: rlsys train {tmp_path}/config.yaml train.max_steps=160",
    ]
    assert report.complete(config(tmp_path), 80) == "already complete (80 of 80 online steps)\n"


def test_the_end_of_a_run_names_the_best_checkpoint_if_it_is_not_the_newest(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    scores: dict[int, float] = {70: 0.9, 75: 0.8, 80: 0.7, 85: 0.95}
    said = []
    for version, score in scores.items():
        store = checkpoint_store(config(tmp_path))
        folder = store.begin(f"step_{version:06d}")
        info = {"weight_version": version, "score": {"metric": "held_out/sampled_accuracy", "value": score}}
        store.commit(folder, f"step_{version:06d}", info)
        said.append([line for line in report.finished(config(tmp_path)).splitlines() if line.startswith("best")])
    best = f"{tmp_path}/checkpoints/step_000070"
    line = f"best held_out/sampled_accuracy: 0.900, {best} (also a target of rlsys evaluate and export)"
    assert said == [[], [line], [line], []]


def test_the_closing_lines_of_a_run_with_resume_never_tell_how_to_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    continued = report.finished(config(tmp_path, resume="never")).splitlines()[-1]
    assert continued == f"continue: rlsys train {tmp_path}/config.yaml train.max_steps=160 run.resume=auto"
    said = [report.interrupted(config(resume=resume), "the state is saved") for resume in ("auto", "never")]
    assert said[0] == "; the state is saved, the same command continues"
    assert said[1] == f"{said[0]} with run.resume=auto"


def test_a_finished_run_starts_nothing(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config(tmp_path)))
    export_policy(tmp_path)
    done = start_at(1, 80, tmp_path / "checkpoints" / "step_000380")
    monkeypatch.setattr(launch, "find_checked_start", lambda *_: done)
    monkeypatch.setattr(launch, "prepare", raising(AssertionError("must not be called")))
    monkeypatch.setattr(sys, "argv", ["rlsys"])
    said = launch.train(config(tmp_path))
    assert said.splitlines()[:2] == ["already complete (80 of 80 online steps)", f"run directory: {tmp_path}"]


def test_the_error_of_a_broken_engine_names_the_logs(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=f"actor 0 died \\(logs: {tmp_path}\\)"), launch.naming_logs(tmp_path):
        raise EngineError("actor 0 died")
    with pytest.raises(ConfigError, match="^bad$"), launch.naming_logs(tmp_path):
        raise ConfigError("bad")


BUNDLES = [{"CPU": 1.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}]


def test_a_cluster_that_is_too_small_is_refused_at_once() -> None:
    cluster.check_cluster(BUNDLES, {"CPU": 2.0, "GPU": 3.0, "memory": 1.0})
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: the run needs 3 GPUs, the cluster has 2"):
        cluster.check_cluster(BUNDLES, {"CPU": 2.0, "GPU": 2.0})
    with pytest.raises(ConfigError, match=r"learner\.ranks: the run needs 2 CPUs, the cluster has 1"):
        cluster.check_cluster(BUNDLES, {"CPU": 1.0, "GPU": 3.0})


@pytest.mark.parametrize(
    ("address", "error", "kind", "message"),
    [
        ("local", RuntimeError("no\n port"), RlsysError, "Ray did not start: no port"),
        ("local", Exception("timed out"), RlsysError, "Ray did not start: timed out"),  # raised on a busy machine
        ("local", AbortedRunError("SIGINT"), AbortedRunError, "SIGINT"),
        ("10.0.0.1:1", ConnectionError("refused"), ConfigError, "run.address 10.0.0.1:1: no Ray cluster can be joined"),
        ("local", SystemExit(15), AbortedRunError, "SIGTERM while Ray was starting"),
    ],
)
def test_ray_that_does_not_start(
    address: str, error: BaseException, kind: type[RlsysError], message: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(cluster.ray, "init", init)
    for name, value in (("RAY_AUTH_MODE", "token"), ("RAY_AUTH_TOKEN", "of the cluster")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0" if address == "local" else "1")
    with pytest.raises(RlsysError) as caught, launch.ray_cluster(config(address=address), tmp_path, [{"CPU": 1.0}]):
        pass
    assert type(caught.value) is kind
    assert caught.value.message.startswith(message)
    # The scratch folder's note is gone, and with it the folder.
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


@pytest.mark.parametrize("broken", ["shutdown", "kill_and_wait"])
def test_an_end_that_fails_leaves_nothing_behind(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("Ray is not there")

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    for name in ("_start_ray", "_reserve"):
        monkeypatch.setattr(cluster, name, lambda *_: None)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster.ray if broken == "shutdown" else cluster, broken, fail)
    left: list[psutil.Process] = []
    with pytest.raises(ValueError, match="Ray is not there"), launch.ray_cluster(config(), tmp_path, [{"CPU": 1.0}]):
        left.append(psutil.Popen(["sleep", "60"]))
        folder = Path((tmp_path / cluster.TEMPORARY_NOTE).read_text().strip())
        assert folder.is_dir()
    if broken == "shutdown":
        assert not left[0].is_running()
    else:
        left[0].kill()
        left[0].wait()
    assert not folder.exists() and [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_local_processes_speak_over_loopback_only(tmp_path: Path) -> None:
    local = cluster.Cluster(None, config(), tmp_path, tmp_path)
    environment = local.options(0, 1, {"RANK": "0"})["runtime_env"]["env_vars"]
    assert (environment["GLOO_SOCKET_IFNAME"], environment["NCCL_SOCKET_IFNAME"]) == ("lo", "lo")
    assert environment["RANK"] == "0"
    joined = cluster.Cluster(None, config(address="10.0.0.1:6379"), tmp_path, tmp_path)
    own = learner_environment(LearnerConfig(), "cpu", 0)
    assert "GLOO_SOCKET_IFNAME" not in joined.options(0, 1, own)["runtime_env"]["env_vars"]
