"""The search command over a pool that only pretends: scheduling, signals and failures."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from signal import SIGINT, raise_signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_search import Pool, display, failure, files, node, opened, prompts, run, tree

from rlsys.commands.search import grow_missing
from rlsys.control import tree_search
from rlsys.control.tree_search import Search
from rlsys.errors import (
    AbortedRunError,
    EngineError,
    InterruptedRunError,
    TooManyFailuresError,
)
from rlsys.launch.signals import StopSignals
from rlsys.trees import Tree, TreeFailure
from rlsys.types import Outcome, Prompt


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
    message = r"3 of 10 trees failed, more than search\.max_failed_trees = 0\.2; mend .*; the first: p\d: too long"
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
    message = r"2 of 10 verifications failed, more than search\.max_failed_trees = 0\.1; mend .*; the first: p\d: why"
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
