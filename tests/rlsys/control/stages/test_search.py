"""The work of the stage `search` over a fake pool: trees, data, interruptions and changed inputs."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file
from tree_samples import answer, ids, node, tree

from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.control.stages.search import TreeSearchStage
from rlsys.control.stop_request import StopRequest
from rlsys.data.rows import Reader
from rlsys.display import Display
from rlsys.errors import ConfigError, DataError, InterruptedRunError, TooManyFailuresError
from rlsys.interfaces import EngineStats
from rlsys.models.folder import ModelFolder, weights_digest
from rlsys.models.scratch import build_from_scratch
from rlsys.search import export as extraction
from rlsys.search.codec import TagCodec
from rlsys.search.tree_json import read_trees
from rlsys.tasks import build_task
from rlsys.trees import Tree, TreeFailure
from rlsys.types import Prompt

COUNT = 5
QUESTION = "a in aba"
TINY = {"hidden_size": 32, "layers": 1, "heads": 1, "intermediate_size": 16, "max_positions": 512}


def config(**sections: Any) -> Config:
    values: dict[str, Any] = {
        "run": {"dir": "unused"},
        "stages": ["search", "sft"],
        "model": {"from_scratch": TINY},
        "task": {"type": "letter_count"},
        "search": {"prompts": COUNT, "shard_size": 2},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return parse_config(values, "test")


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two model folders with the same tokenizer and different weights."""
    folders = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp("policy")
        scratch = config().model.from_scratch
        assert scratch
        build_from_scratch(scratch, build_task(config().task, 0).vocabulary(), seed, folder)
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def codec(policies: list[Path]) -> TagCodec:
    return extraction.source_of(config(), Path(), ModelFolder(policies[0])).codec


def grown(codec: TagCodec, prompt: Prompt) -> Tree:
    """Return a tree with a right and a wrong answer. The number of the prompt decides the words."""
    below = (
        node(0, f"<thinking>{'ab' * (1 + int(prompt.answer))}</thinking>"),
        answer(1, "<answer>2</answer>", "ok"),
        answer(1, "<answer>3</answer>", "wrong", samples=3),
    )
    encoded = [replace(n, token_ids=(own := ids("", *codec.encode(n.text))), logprobs=np.zeros(len(own), np.float32))
               for n in below]  # fmt: skip
    first = {"policy": ids("", *codec.prompt(QUESTION))}
    return tree(
        *encoded,
        prompt_id=prompt.prompt_id,
        question=QUESTION,
        tokenizers={"policy": codec.digest},
        models={"policy": "as the engine was started", "reviewer": "another"},
        prompt_token_ids=first,
    )


class Pool:
    """Actors that grow scripted trees.

    Args:
        before: called with the number of calls so far, before each tree; may raise.
    """

    count = 2

    def __init__(
        self, tree_of: Callable[[Prompt], Tree | TreeFailure], before: Callable[[int], object] = lambda _asked: None
    ) -> None:
        self._tree_of, self._before = tree_of, before
        self.calls: list[str] = []

    async def grow(self, actor: int, prompt: Prompt) -> Tree | TreeFailure:
        self.calls.append(prompt.prompt_id)
        self._before(len(self.calls))
        await asyncio.sleep(0)
        return self._tree_of(prompt)

    async def reset_engine_stats(self) -> None:
        await self.engine_stats()

    async def engine_stats(self) -> Sequence[EngineStats]:
        return []


class Stage:
    """The stage in a folder, over its own pool."""

    def __init__(
        self, folder: Path, policies: list[Path], codec: TagCodec, settings: Config | None = None, **changes: Any
    ) -> None:
        self.settings = settings or config()
        self.output = io.StringIO()
        prompts = [
            Prompt(prompt_id=f"p{n}", token_ids=np.zeros(0, np.int32), answer=f"{n}")
            for n in range(self.settings.search.prompts)
        ]
        self.pool = Pool(lambda prompt: grown(codec, prompt))
        self.stage = TreeSearchStage(
            **{
                "config": self.settings,
                "folder": folder,
                "model": ModelFolder(policies[0]),
                "prompts": prompts,
                "inputs": {"task.path": "digest"},
                "pool": self.pool,
                "display": Display(Console(file=self.output), interval_s=0),
                **changes,
            }
        )

    def run(self, policy: Path, signal_at: int = 0) -> dict[str, float]:
        async def work() -> dict[str, float]:
            stop = StopRequest()
            if signal_at:
                self.pool._before = lambda asked: asked == signal_at and stop.request("SIGTERM")
            self.stage.is_complete(policy)
            return dict(await self.stage.run(policy, stop))

        return asyncio.run(work())


@pytest.fixture
def stage(tmp_path: Path, policies: list[Path], codec: TagCodec) -> Callable[..., Stage]:
    return lambda settings=None, name="search", **changes: Stage(tmp_path / name, policies, codec, settings, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_trees_and_their_data(
    stage: Callable[..., Stage], policies: list[Path], tmp_path: Path, codec: TagCodec
) -> None:
    made = stage()
    figures = made.run(policies[0])
    assert sorted(made.pool.calls) == [f"p{n}" for n in range(COUNT)]
    # A tree has a right and a wrong answer, and one chain and one pair are taken of it.
    assert figures == {
        "search/trees": 5,
        "search/solved": 1,
        **sums(codec),
        "search/pairs": 5,
        "search/step_preferences": 0,
        "search/demonstrations": 5,
    }
    assert "trees 5/5  solved trees 1.000" in made.output.getvalue()
    reader = Reader(None, 9999, 512)
    rows = reader.supervised(str(tmp_path / "search" / "data" / "supervised.parquet"), "x")
    pairs = reader.pairs(str(tmp_path / "search" / "data" / "preferences.parquet"), "x")
    assert (len(rows), len(pairs)) == (5, 5)
    assert {(pair.chosen_visits, pair.rejected_visits) for pair in map(pairs.row, range(5))} == {(1, 3)}


def sums(codec: TagCodec) -> dict[str, float]:
    prompts = [Prompt(prompt_id="p", token_ids=np.zeros(0, np.int32), answer=f"{n}") for n in range(COUNT)]
    trees = [grown(codec, prompt) for prompt in prompts]
    totals = {name: sum(getattr(one, name) for one in trees) for name in ("simulations", "calls", "tokens")}
    return {f"search/{name}": float(value) for name, value in {**totals, "scored": 10, "correct": 5}.items()}


def test_trees_name_the_policy_that_the_stage_begins_with(stage: Callable[..., Stage], policies: list[Path]) -> None:
    made = stage()
    made.run(policies[1])
    trees = [each for path in sorted((made.stage.folder / "trees").glob("*.jsonl")) for each in read_trees(path)]
    named = {tuple(sorted(each.models.items())) for each in trees if isinstance(each, Tree)}
    assert named == {(("policy", weights_digest(policies[1])), ("reviewer", "another"))}


def test_a_finished_stage_does_nothing_again(stage: Callable[..., Stage], policies: list[Path]) -> None:
    first = stage()
    assert not first.stage.is_complete(policies[0])
    figures = first.run(policies[0])
    before = contents(first.stage.folder)
    again = stage()
    assert again.stage.is_complete(policies[0])
    assert again.run(policies[0]) == figures
    assert again.pool.calls == [] and contents(first.stage.folder) == before


def test_a_signal_keeps_the_finished_trees_and_the_rest_is_grown_later(
    stage: Callable[..., Stage], policies: list[Path]
) -> None:
    undisturbed = stage(name="a")
    figures = undisturbed.run(policies[0])
    first = stage(name="b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlsys.control.tree_search.trees_ahead", lambda _config: 1)
        with pytest.raises(InterruptedRunError, match="^SIGTERM$"):
            first.run(policies[0], signal_at=2)
    kept = len(first.pool.calls)  # what had begun is finished
    assert 2 <= kept < COUNT and f"{kept} of 5 trees are kept" in first.output.getvalue()
    assert not (first.stage.folder / "stage.json").exists()
    second = stage(name="b")
    assert second.run(policies[0]) == figures
    assert sorted(first.pool.calls + second.pool.calls) == [f"p{n}" for n in range(COUNT)]
    assert contents(second.stage.folder) == contents(undisturbed.stage.folder)


def test_a_kill_before_the_data_grows_nothing_again(stage: Callable[..., Stage], policies: list[Path]) -> None:
    first = stage()
    figures = first.run(policies[0])
    (first.stage.folder / "stage.json").unlink()
    (first.stage.folder / "data" / "report.json").unlink()
    again = stage()
    assert not again.stage.is_complete(policies[0])
    assert again.run(policies[0]) == figures and again.pool.calls == []


def test_other_rules_of_extraction_make_other_data_of_the_same_trees(
    stage: Callable[..., Stage], policies: list[Path]
) -> None:
    stage().run(policies[0])
    other = stage(config(extract={"chosen": "none"}))
    assert not other.stage.is_complete(policies[0])
    assert other.run(policies[0])["search/pairs"] == 0 and other.pool.calls == []


def test_more_prompts_add_trees(stage: Callable[..., Stage], policies: list[Path]) -> None:
    stage().run(policies[0])
    more = stage(config(search={"prompts": 7}))
    assert more.run(policies[0])["search/trees"] == 7 and sorted(more.pool.calls) == ["p5", "p6"]


def test_trees_of_another_policy_config_or_data_are_refused(stage: Callable[..., Stage], policies: list[Path]) -> None:
    stage().run(policies[0])
    with pytest.raises(ConfigError, match="^the policy that the stage search begins with: the contents differ"):
        stage().stage.is_complete(policies[1])
    with pytest.raises(ConfigError, match=r"^task\.path: the contents differ"):
        stage(inputs={"task.path": "other"}).stage.is_complete(policies[0])
    with pytest.raises(ConfigError, match=r"^search\.max_depth differs"):
        stage(config(search={"max_depth": 3})).stage.is_complete(policies[0])


def test_a_policy_that_differs_in_the_middle_of_its_weights_is_another_one(
    stage: Callable[..., Stage], policies: list[Path], tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    for number, folder in enumerate(folders):
        shutil.copytree(policies[0], folder)
        values = np.zeros(3 * 2**20, dtype=np.uint8)  # MiB 1 and 3 are equal
        values[len(values) // 2] = number
        save_file({"weight": values}, folder / "model.safetensors")
    stage().run(folders[0])
    assert stage().stage.is_complete(folders[0])
    with pytest.raises(ConfigError, match="^the policy that the stage search begins with: the contents differ"):
        stage().stage.is_complete(folders[1])


def test_too_many_failed_trees_end_the_run(stage: Callable[..., Stage], policies: list[Path]) -> None:
    made = stage()
    made.pool._tree_of = lambda prompt: TreeFailure(
        prompt_id=prompt.prompt_id, question=QUESTION, answer="2", reason="too long"
    )
    with pytest.raises(TooManyFailuresError, match=r"search\.max_failed_trees"):
        made.run(policies[0])


def test_a_damaged_record_is_named(stage: Callable[..., Stage], policies: list[Path]) -> None:
    made = stage()
    made.run(policies[0])
    for text in ("{", "[]", json.dumps({"asked": 1, "figures": {"search/trees": "many"}})):
        (made.stage.folder / "stage.json").write_text(text)
        with pytest.raises(DataError, match=r"stage\.json: damaged; remove it"):
            stage().stage.is_complete(policies[0])
