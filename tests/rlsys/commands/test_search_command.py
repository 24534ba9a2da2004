"""The search command: its prompts, an earlier search in the folder, its end, and the whole of it without Ray."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from signal import SIGINT, raise_signal
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import NumberTask
from pretended_search import CONFIG, Pool, opened, run, shipped
from rich.console import Console

from rlsys import cli
from rlsys.commands import search as search_command
from rlsys.commands.search import conclude, open_search
from rlsys.config.files import load_config
from rlsys.config.schema import Config, FromScratchConfig
from rlsys.config.tasks import LetterCountConfig
from rlsys.control import tree_search
from rlsys.control.tree_search import find_prompts
from rlsys.data.prompts import PromptBuilder
from rlsys.errors import (
    ConfigError,
    InterruptedRunError,
)
from rlsys.launch import session as launch
from rlsys.models.scratch import build_from_scratch
from rlsys.tasks import build_task


def inputs(train: int | None = 6) -> Any:
    """What is used of rlsys.data.inputs.Inputs. A question of the fake task is three letters long."""
    builder = PromptBuilder(NumberTask(train), lambda text: [1] * len(text), max_model_len=192, max_tokens=120)
    return SimpleNamespace(builder=builder, fingerprint=lambda: {"model.path": "d1"}, notes=[])


def test_prompts_are_the_first_of_the_split() -> None:
    found = find_prompts(shipped("search.prompts=3"), inputs())
    assert [prompt.prompt_id for prompt in found] == ["train-0", "train-1", "train-2"]
    assert len(find_prompts(shipped("search.prompts=9"), inputs())) == 6  # there are no more
    assert len(find_prompts(shipped("search.prompts=9"), inputs(train=None))) == 9
    held_out = find_prompts(shipped("search.prompts=9", "search.split=held_out"), inputs())
    assert [prompt.prompt_id for prompt in held_out] == [f"held_out-{number}" for number in range(4)]


def test_a_search_is_opened_where_there_is_none_and_again(tmp_path: Path) -> None:
    config = shipped(f"run.dir={tmp_path}", "search.shard_size=4")
    search = open_search(config, tmp_path, inputs(), {})
    assert len(search.missing()) == 6
    assert load_config(tmp_path / "config.yaml") == config
    origin = (tmp_path / "search.json").read_text()
    run(search, Pool())
    changed = shipped(f"run.dir={tmp_path}", "search.shard_size=4", "actors.count=1")
    assert open_search(changed, tmp_path, inputs(), {}).missing() == []
    assert (tmp_path / "search.json").read_text() == origin
    assert load_config(tmp_path / "config.yaml") == changed


def test_another_search_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    run(open_search(shipped(), tmp_path, inputs(), {}), Pool())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match=r"^run\.seed differs from the search to be continued"):
        open_search(shipped("run.seed=1"), tmp_path, inputs(), {})
    other = inputs()
    other.fingerprint = lambda: {"model.path": "d2"}
    with pytest.raises(ConfigError, match=r"^model\.path: the contents differ"):
        open_search(shipped(), tmp_path, other, {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_training_run_is_not_searched_in(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"^run\.dir: .* holds a training run; choose another one for the search"):
        open_search(shipped(), tmp_path, inputs(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_the_end_is_a_table_and_a_summary(tmp_path: Path) -> None:
    search, config, output = opened(tmp_path), shipped("run.dir=runs/x"), io.StringIO()
    run(search, Pool())
    said = conclude(search, config, tmp_path, Console(file=output, width=120))
    assert said == "run directory: runs/x\nextract: rlsys extract runs/x"
    assert "10 trees" in output.getvalue() and "policy engine 1" in output.getvalue()
    text = (tmp_path / "summary.json").read_text()
    summary = json.loads(text)
    assert summary["trees"] == search.trees.report() and summary["trees"]["solved"]["mean"] == 1.0
    assert summary["last_command"]["grown"] == 10 and summary["last_command"]["prefix_cache_hit_rate"] == 0.25

    again, output = opened(tmp_path), io.StringIO()
    said = conclude(again, config, tmp_path, Console(file=output, width=120))
    assert said.startswith("already complete (10 trees)\n")
    assert "engine" not in output.getvalue()
    assert (tmp_path / "summary.json").read_text() == text  # with the rates of the command that grew the trees


@pytest.mark.parametrize("left", [None, "{", "[]", '{"trees": {}}'])
def test_a_summary_that_is_not_of_these_trees_is_written_anew(tmp_path: Path, left: str | None) -> None:
    run(opened(tmp_path), Pool())
    if left is not None:
        (tmp_path / "summary.json").write_text(left)
    again = opened(tmp_path)
    conclude(again, shipped(), tmp_path, Console(file=io.StringIO()))
    assert json.loads((tmp_path / "summary.json").read_text()) == {"trees": again.trees.report(), "last_command": None}


def test_the_command_line_hands_the_config_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Config] = []

    def run(config: Config) -> str:
        given.append(config)
        return "said"

    monkeypatch.setattr(search_command, "run", run)
    monkeypatch.setattr(sys, "argv", ["rlsys", "search", str(CONFIG), "search.prompts=3"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert (stopped.value.code, capsys.readouterr().out) == (0, "said\n")
    assert given == [shipped("search.prompts=3")]


def without_ray(monkeypatch: pytest.MonkeyPatch, pool: Pool) -> None:
    """Everything of the command but the processes."""

    @contextlib.contextmanager
    def cluster(*_: object) -> Iterator[None]:
        yield

    @contextlib.asynccontextmanager
    async def started(*_: object) -> AsyncIterator[Pool]:
        yield pool

    monkeypatch.setattr(launch, "ray_cluster", cluster)
    monkeypatch.setattr(launch, "rollout_pool", started)


def test_the_whole_command_over_a_pretended_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, model = tmp_path / "run", tmp_path / "model"
    size = FromScratchConfig(hidden_size=32, layers=1, heads=1, intermediate_size=32)
    build_from_scratch(size, build_task(LetterCountConfig(type="letter_count"), 0).vocabulary(), 0, model)
    config = shipped(f"run.dir={run_dir}", f"model.path={model}", "search.prompts=6", "search.shard_size=4")
    monkeypatch.setattr(tree_search, "trees_ahead", lambda _config: 1)
    pool = Pool(2, before=lambda calls: raise_signal(SIGINT) if calls == 3 else None)
    without_ray(monkeypatch, pool)
    with pytest.raises(InterruptedRunError, match=r"^SIGINT; [34] of 6 trees are kept, the same command continues$"):
        search_command.run(config)
    assert not (run_dir / "summary.json").exists()

    rest = Pool(1)
    without_ray(monkeypatch, rest)
    said = search_command.run(config)
    assert said.startswith(f"run directory: {run_dir}\n")
    assert sorted(name for _, name in pool.calls + rest.calls) == [f"train-{number}" for number in range(6)]
    assert sorted(path.name for path in (run_dir / "trees").iterdir()) == ["00000.jsonl", "00001.jsonl"]
    origin = json.loads((run_dir / "search.json").read_text())
    assert set(origin["inputs"]) == {"model.path", "task.questions_path", "the tokenizer of model.path"}

    idle = Pool(1)
    without_ray(monkeypatch, idle)
    assert search_command.run(config).startswith("already complete (6 trees)\n")
    assert idle.calls == []


def test_a_search_with_untrained_weights_is_refused_before_it_occupies_the_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = shipped(
        f"run.dir={run_dir}", "model.path=null", "model.from_scratch={hidden_size: 32, layers: 1, heads: 1}"
    )
    with pytest.raises(ConfigError, match="is made from scratch and untrained: train it first, or set model.path$"):
        search_command.run(config)
    assert not run_dir.exists()
    (run_dir / "stages" / "online").mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"model={{path: {run_dir}/stages/online}} run.dir=runs/NEW takes"):
        search_command.run(config)
