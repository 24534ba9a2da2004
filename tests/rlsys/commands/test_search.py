"""The search command over a pool that only pretends: scheduling, signals, failures, and what decides a tree."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from signal import SIGINT, raise_signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import NumberTask
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from rlsys import cli
from rlsys.commands import search as search_command
from rlsys.commands.search import conclude, grow_missing, open_search
from rlsys.config.files import load_config
from rlsys.config.schema import Config
from rlsys.control import tree_search
from rlsys.control.tree_search import Search, deciding_fields, find_prompts
from rlsys.data.prompts import PromptBuilder
from rlsys.display import SEARCH_FIGURES, Display
from rlsys.errors import (
    AbortedRunError,
    ConfigError,
    EngineError,
    InterruptedRunError,
    TooManyFailuresError,
)
from rlsys.interfaces import EngineStats
from rlsys.launch import session as launch
from rlsys.launch.signals import StopSignals
from rlsys.trees import ThoughtNode, Tree, TreeFailure
from rlsys.types import Outcome, Prompt, Verdict

CONFIG = Path(__file__).parents[3] / "configs" / "search_letter_count.yaml"
NONE = np.zeros(0, np.int32)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(prompt_id=f"p{n}", token_ids=NONE, answer=f"{n}", question=f"q{n}") for n in range(count)]


def node(outcome: Outcome | None = None, scored: int = -1) -> ThoughtNode:
    verdict = Verdict(outcome=outcome, reward=float(outcome == "ok"), answered=True, detail="why") if outcome else None
    return ThoughtNode(
        parent=-1 if outcome is None else 0,
        type="start" if outcome is None else "answer",
        text="",
        token_ids=NONE,
        forced=0,
        logprobs=NONE.astype(np.float32),
        verdict=verdict,
        scored=scored,
    )


def tree(prompt: Prompt, outcome: Outcome = "ok") -> Tree:
    return Tree(
        prompt_id=prompt.prompt_id,
        question=prompt.question,
        answer=prompt.answer,
        pattern="chain",
        tokenizers={},
        models={},
        prompt_token_ids={},
        nodes=(node(), node(outcome, 0 if outcome in ("ok", "wrong") else -1)),
        stop="correct",
        simulations=1,
        calls=1,
        tokens=3,
        counts={},
    )


def failure(prompt: Prompt) -> TreeFailure:
    return TreeFailure(prompt_id=prompt.prompt_id, question=prompt.question, answer=prompt.answer, reason="too long")


class Pool:
    """Grows a tree in a few turns of the event loop, in an order of its own.

    before: called with the number of calls so far; may raise.
    """

    def __init__(
        self,
        count: int = 2,
        grown: Callable[[Prompt], Tree | TreeFailure] = tree,
        before: Callable[[int], object] = lambda _calls: None,
    ) -> None:
        self.count = count
        self._grown, self._before = grown, before
        self._random = random.Random(0)
        self.calls: list[tuple[int, str]] = []
        self.finished = 0
        self.under_way: Counter[int] = Counter()
        self.most: Counter[int] = Counter()
        self.asked = 0

    async def grow(self, actor: int, prompt: Prompt) -> Tree | TreeFailure:
        self.calls.append((actor, prompt.prompt_id))
        self._before(len(self.calls))
        self.under_way[actor] += 1
        self.most[actor] = max(self.most[actor], self.under_way[actor])
        try:
            for _ in range(self._random.randrange(1, 6)):
                await asyncio.sleep(0)
            found = self._grown(prompt)
        finally:
            self.under_way[actor] -= 1
        self.finished += 1
        return found

    async def reset_engine_stats(self) -> None:
        await self.engine_stats()

    async def engine_stats(self) -> Sequence[EngineStats]:
        self.asked += 1
        return [
            EngineStats(
                model="policy",
                engine=actor,
                busy_s=1.0,
                wall_s=2.0,
                generated_tokens=10,
                prompt_tokens=8,
                cached_tokens=2,
                in_flight_mean=3.0,
            )
            for actor in range(self.count)
        ]


def opened(run_dir: Path, count: int = 10, *, share: float = 0.1, ahead: int = 3) -> Search:
    run_dir.mkdir(exist_ok=True)
    return Search(run_dir, prompts(count), shard_size=4, share=share, ahead=ahead)


def display(output: io.StringIO | None = None, **settings: Any) -> Display:
    console = Console(file=output or io.StringIO(), force_terminal=False)
    return Display(console, figures=SEARCH_FIGURES, **settings)


def run(search: Search, pool: Pool) -> None:
    asyncio.run(search.run(pool, display()))


def files(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir / "trees"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def undisturbed(tmp_path: Path) -> dict[str, bytes]:
    run(opened(tmp_path / "undisturbed"), Pool())
    return files(tmp_path / "undisturbed")


@settings(deadline=None, max_examples=20)
@given(actors=st.integers(1, 4), ahead=st.integers(1, 5), count=st.integers(1, 14))
def test_every_tree_is_grown_once_on_its_own_actor(
    tmp_path_factory: pytest.TempPathFactory, actors: int, ahead: int, count: int
) -> None:
    run_dir, pool = tmp_path_factory.mktemp("run"), Pool(actors)
    search = opened(run_dir, count, ahead=ahead)
    run(search, pool)
    assert search.missing() == [] and search.grown == count
    assert sorted(pool.calls) == sorted((number % actors, f"p{number}") for number in range(count))
    for actor in range(actors):  # as many at once as it may hold, and never more
        assert pool.most[actor] == min(ahead, len(range(actor, count, actors)))
    lines = [json.loads(line)["prompt_id"] for text in files(run_dir).values() for line in text.splitlines()]
    assert lines == [f"p{number}" for number in range(count)]


def test_the_number_of_actors_does_not_show(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    for actors in (1, 3):
        run(opened(tmp_path / f"{actors}"), Pool(actors))
        assert files(tmp_path / f"{actors}") == undisturbed


def test_only_what_is_missing_is_grown(tmp_path: Path) -> None:
    run(opened(tmp_path, 6), Pool())
    pool = Pool()
    search = opened(tmp_path, 10)
    assert search.trees.report()["trees"] == 6
    run(search, pool)
    assert sorted(name for _, name in pool.calls) == ["p6", "p7", "p8", "p9"]
    assert search.trees.report()["trees"] == 10 and search.grown == 4


def test_the_time_before_the_first_tree_counts_for_nobody(tmp_path: Path) -> None:
    pool = Pool(1)
    search = opened(tmp_path)
    run(search, pool)
    # Asked at the beginning, which is thrown away, and at the end: 10 tokens of one engine.
    assert pool.asked == 2
    assert search.engines.report(1.0, 10)["tokens_per_s"] == 10.0


def test_rates_are_asked_for_while_trees_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_search, "STATS_INTERVAL_S", 0.0)
    pool, output = Pool(1), io.StringIO()
    search = opened(tmp_path, ahead=1)
    asyncio.run(search.run(pool, display(output, interval_s=0.0)))
    # An interval of one engine: 10 tokens in 2 s, 2 of 8 prompt tokens cached.
    last = output.getvalue().splitlines()[-1]
    assert last == "trees 10/10  solved 1.000  tokens/s 5  prefix-cache hits 0.250  failed trees 0"
    assert search.engines.usages["policy", 0].generated_tokens == 10 * (pool.asked - 1)


def work_of(search: Search, pool: Pool) -> None:
    with StopSignals() as stop:
        stop.run(grow_missing(search)(pool, stop))


def test_the_first_signal_finishes_what_is_under_way(
    tmp_path: Path, undisturbed: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    pool = Pool(2, before=lambda calls: raise_signal(SIGINT) if calls == 6 else None)
    run_dir = tmp_path / "run"
    search = opened(run_dir, ahead=2)
    with pytest.raises(InterruptedRunError) as caught:
        work_of(search, pool)
    kept = 10 - len(search.missing())
    assert 6 <= kept < 10 and kept == pool.finished == len(pool.calls)
    assert caught.value.message == f"SIGINT; {kept} of 10 trees are kept, the same command continues"
    said = "SIGINT: the trees that the actors hold are finished and kept, no others are begun; once more to abort"
    assert said in capsys.readouterr().out
    run(opened(run_dir), Pool())
    assert files(run_dir) == undisturbed


def test_the_second_signal_aborts(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    class Stuck(Pool):
        async def grow(self, actor: int, prompt: Prompt) -> Tree | TreeFailure:
            if prompt.prompt_id in ("p4", "p5"):
                loop = asyncio.get_running_loop()
                loop.call_later(0.01, raise_signal, SIGINT)
                await asyncio.sleep(30)
            return await super().grow(actor, prompt)

    run_dir = tmp_path / "run"
    with pytest.raises(AbortedRunError, match="^SIGINT for the second time; the trees under way are lost, the same"):
        work_of(opened(run_dir, ahead=2), Stuck(2))
    again = opened(run_dir)
    assert again.missing()[:2] == [4, 5] and 0 not in again.missing()
    run(again, Pool())
    assert files(run_dir) == undisturbed


def test_a_signal_after_the_last_tree_has_begun_changes_nothing(tmp_path: Path) -> None:
    pool = Pool(2, before=lambda calls: raise_signal(SIGINT) if calls == 10 else None)
    search = opened(tmp_path)
    work_of(search, pool)
    assert search.missing() == []


def test_a_broken_actor_is_an_error_of_its_own_and_loses_nothing(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    def broken(calls: int) -> None:
        if calls == 7:
            raise EngineError("actor 1 died: why")

    pool, run_dir = Pool(2, before=broken), tmp_path / "run"
    with pytest.raises(EngineError, match="^actor 1 died: why$"):
        run(opened(run_dir, ahead=1), pool)
    again = opened(run_dir)
    assert len(again.missing()) == 10 - pool.finished and pool.finished >= 5
    run(again, Pool())
    assert files(run_dir) == undisturbed


def failing(*numbers: int) -> Callable[[Prompt], Tree | TreeFailure]:
    return lambda prompt: failure(prompt) if int(prompt.answer) in numbers else tree(prompt)


def test_failed_trees_up_to_the_share_are_kept_in_their_places(tmp_path: Path) -> None:
    search = opened(tmp_path, share=0.2)
    output = io.StringIO()
    asyncio.run(search.run(Pool(2, failing(1, 8)), display(output)))
    assert search.missing() == [] and search.trees.failed == 2
    assert "no tree of p8: too long" in output.getvalue()
    assert json.loads(files(tmp_path)["00000.jsonl"].splitlines()[1])["reason"] == "too long"


def test_more_failed_trees_are_an_error_once_they_are_kept(tmp_path: Path) -> None:
    message = r"3 of 10 trees failed, more than search\.max_failed_trees = 0\.2; the first: p\d: too long"
    pool = Pool(2, failing(1, 2, 8))
    with pytest.raises(TooManyFailuresError, match=message):
        run(opened(tmp_path, share=0.2), pool)
    with pytest.raises(TooManyFailuresError, match=message):  # before anything is started
        opened(tmp_path, share=0.2)
    again = opened(tmp_path, share=0.3)
    assert again.trees.failed == 3
    run(again, Pool(2, failing(1, 2, 8)))


@pytest.mark.parametrize("outcome", ["error", "timeout"])
def test_failed_verifications_are_limited_too(tmp_path: Path, outcome: Outcome) -> None:
    message = r"2 of 10 verifications failed, more than search\.max_failed_trees = 0\.1; the first: p\d: why"
    pool = Pool(2, lambda prompt: tree(prompt, outcome if int(prompt.answer) < 2 else "wrong"))
    with pytest.raises(TooManyFailuresError, match=message):
        run(opened(tmp_path, share=0.1), pool)
    assert pool.finished == 10
    with pytest.raises(TooManyFailuresError, match=message):  # the same again, before anything is started
        opened(tmp_path, share=0.1)
    assert opened(tmp_path, share=0.2).missing() == []


def verified(prompt: Prompt, failed: int, of: int) -> Tree:
    outcomes: list[Outcome] = ["timeout"] * failed + ["wrong"] * (of - failed)
    return replace(tree(prompt), nodes=(node(), *(node(outcome) for outcome in outcomes)))


@settings(deadline=None, max_examples=20)
@given(order=st.permutations(range(10)), cut=st.integers(0, 10))
def test_the_order_of_failed_verifications_decides_nothing(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], cut: int
) -> None:
    # 2 of the 10 verifications of p0 fail: more than 0.1 of its own, less of the 100 of all trees.
    run_dir, asked = tmp_path_factory.mktemp("run"), prompts(10)
    search = opened(run_dir, share=0.1)
    for number in order[:cut]:
        search._store.add(number, verified(asked[number], 2 * (number == 0), 10))
    again = opened(run_dir, share=0.1)
    run(again, Pool(1, lambda prompt: verified(prompt, 2 * (prompt.answer == "0"), 10)))
    assert again.missing() == []


def test_a_verifier_that_is_broken_ends_the_search_once_enough_is_known(tmp_path: Path) -> None:
    pool = Pool(1, lambda prompt: verified(prompt, 100, 100))
    with pytest.raises(TooManyFailuresError, match=r"500 of 500 verifications failed"):
        run(opened(tmp_path, ahead=1), pool)
    assert pool.finished == 5
    assert len(opened(tmp_path).missing()) == 5  # nothing is said of a search that is not at its end


def shipped(*overrides: str) -> Config:
    return load_config(CONFIG, overrides)


def test_the_shipped_config_says_where_its_model_comes_from() -> None:
    line = next(line for line in CONFIG.read_text().splitlines() if line.strip().startswith("path:"))
    assert "runs/quickstart/stages/warm_start" in line and "`make quickstart`" in line


MODEL, REVIEWER = "search.model={path: a}", "search.reviewer={path: a}"


@pytest.mark.parametrize(
    "override",
    [
        "run.dir=elsewhere",
        "run.address=auto",
        "actors.count=1",
        "actors.max_num_seqs=8",
        "actors.threads=2",
        "actors.kv_cache_gib=2",
        "actors.rollout_timeout_s=900",
        "rewards.workers=2",
        "search.prompts=600",
        "search.fraction=0.5",
        "search.max_failed_trees=0.5",
        "search.nodes.unused={tag: unused}",
        "search.tables.unused={children: {start: {answer: 1}}}",
        "extract.pairs_per_tree=2",
        "train.max_steps=3",
        "model.path=moved",
    ],
)
def test_what_does_not_decide_a_tree_may_differ(override: str) -> None:
    assert shipped(override) != shipped()
    assert deciding_fields(shipped(override)) == deciding_fields(shipped())


@pytest.mark.parametrize("override", ["count=2", "max_num_seqs=8", "kv_cache_gib=2", "path=b"])
@pytest.mark.parametrize("section", ["model", "reviewer"])
def test_engines_of_other_models_may_differ_in_number_and_size(section: str, override: str) -> None:
    before = shipped(MODEL, REVIEWER)
    after = shipped(MODEL, REVIEWER, f"search.{section}.{override}")
    assert deciding_fields(after) == deciding_fields(before)


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1",
        "run.device=cuda",
        "task.error_rate=0.2",
        "actors.dtype=bf16",
        "actors.max_model_len=200",
        "actors.block_size=64",
        "actors.enforce_eager=false",
        "sampling.max_tokens=100",
        "rewards.timeout_s=1",
        "rewards.memory_mib=512",
        "sampling.temperature=0.7",
        "sampling.top_p=0.9",
        "search.temperature=0.7",
        "search.split=held_out",
        "search.shard_size=8",
        "search.expansion=node",
        "search.selection={type: puct}",
        "search.parallel_simulations=2",
        "search.backtracking=false",
        "search.max_depth=12",
        "search.max_node_tokens=9",
        "search.stop.simulations=9",
        "search.stop.correct=[{count: 2}]",
        "search.nodes.thinking.max_tokens=9",
        "search.tables.chain.children.thinking.answer=2",
        "search.tables.chain.after_wrong={}",
        "search.patterns=[a]",
        "search.patterns=[chain, a]",
        MODEL,
        REVIEWER,
    ],
)
def test_what_decides_a_tree_is_compared(override: str) -> None:
    assert deciding_fields(shipped(override)) != deciding_fields(shipped())


def test_the_order_of_a_row_decides_too() -> None:
    one = shipped("search.tables.chain.children.start={thinking: 4, sub_task: 2}", "search.patterns=[chain]")
    other = shipped("search.tables.chain.children.start={sub_task: 2, thinking: 4}", "search.patterns=[chain]")
    assert deciding_fields(one) != deciding_fields(other)


def test_a_sampling_setting_that_the_search_replaces_may_differ() -> None:
    before = shipped("search.temperature=0.7", "search.top_p=0.9")
    after = shipped("search.temperature=0.7", "search.top_p=0.9", "sampling.temperature=0.5", "sampling.top_p=0.5")
    assert deciding_fields(after) == deciding_fields(before)


def test_the_deciding_fields_survive_json() -> None:
    found = deciding_fields(shipped(REVIEWER))
    assert json.loads(json.dumps(found)) == found


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
    scratch = "model.from_scratch={hidden_size: 32, layers: 1, heads: 1, intermediate_size: 32}"
    run_dir = tmp_path / "run"
    config = shipped(f"run.dir={run_dir}", "model.path=null", scratch, "search.prompts=6", "search.shard_size=4")
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
    assert set(origin["inputs"]) == {"model.from_scratch", "task.questions_path", "the tokenizer of model.path"}

    idle = Pool(1)
    without_ray(monkeypatch, idle)
    assert search_command.run(config).startswith("already complete (6 trees)\n")
    assert idle.calls == []
