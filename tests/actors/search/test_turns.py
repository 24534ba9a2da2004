"""Trees with replies of an environment: their shape, their masks and bounds, and the episodes of their chains."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from played_trees import CALL, CHILDREN, SEARCHES, STOP, answered, environment, play_again, played, players
from search_engines import call_of
from search_world import Grown, Script, codec, prompt, search_config, search_model, table

from actors.engine import Completion, CompletionRequest
from actors.search.group import build_searched_group
from actors.search.requests import Call, SearchModel
from actors.search.scheduler import TreeScheduler
from actors.search.starting import RoleEngine, SchedulerSettings
from rlsys.config.search import ExtractConfig
from rlsys.interfaces import Reply
from rlsys.search.codec import Stop
from rlsys.search.tree_json import tree_line
from rlsys.trees import ENVIRONMENT, Tree, TreeFailure
from rlsys.types import Problem, RolloutFailure, TrajectoryGroup, Verdict

A, B = (f"<{CALL}>{letter}{STOP}" for letter in "ab")
RIGHT, WRONG = "<answer>1</answer>", "<answer>0</answer>"


class Scripted(Script):
    """A script whose replies the test gives by the last turn."""

    def __init__(self, proposals: dict[str, list[str]], replies: dict[str, Reply | Verdict]) -> None:
        super().__init__(table(CHILDREN), proposals)
        self.replies, self.turns = replies, list[tuple[str, ...]]()

    def reply(self, turns: tuple[str, ...]) -> Reply | Verdict:
        self.turns.append(turns)
        return self.replies.get(turns[-1], Reply(text=answered("ab") if STOP in turns[-1] else ""))


def chains(proposals: dict[str, list[str]], **replies: Reply | Verdict) -> Scripted:
    """Return a script. The names of `replies` are the letters of calls."""
    return Scripted(proposals, {f"<{CALL}>{letter}{STOP}": reply for letter, reply in replies.items()})


def grown(world: Scripted, simulations: int, **fields: Any) -> Grown:
    searched = {"expansion": "chain", "stop": {"simulations": simulations}}
    return played(world, searched=searched, **fields)


def group_of(grown: Grown) -> TrajectoryGroup | RolloutFailure:
    return build_searched_group(grown.tree, prompt(), codec(), ExtractConfig())


def test_a_reply_is_the_only_child_of_its_turn_and_the_policy_goes_on_below_it() -> None:
    reply = answered("ab")
    world = chains({"": [A, A, B], A + reply: [RIGHT, WRONG], B + reply: [RIGHT]})
    tree = grown(world, 3).tree
    outlines = [(node.parent, node.type, node.text, node.samples) for node in tree.nodes[1:]]
    assert outlines == [
        (0, CALL, A, 2),
        (1, ENVIRONMENT, reply, 1),
        (2, "answer", RIGHT, 1),
        (2, "answer", WRONG, 1),
        (0, CALL, B, 1),
        (5, ENVIRONMENT, reply, 1),
        (6, "answer", RIGHT, 1),
    ]
    # The turn is answered once, and so is each answer.
    assert world.turns == [(A,), (A, RIGHT), (A, WRONG), (B,), (B, RIGHT)]
    drawn = sum(node.generated for node in tree.nodes)
    assert tree.tokens == drawn + len(codec().encode(A))  # the second draw of A; replies do not count
    assert [tree.nodes[n].correct for n in tree.answers()] == [True, False, True]


def test_the_tokens_of_a_reply_are_forced_and_no_loss_sees_them() -> None:
    reply = answered("ab")
    world = chains({"": [A, B], A + reply: [RIGHT], B + reply: [WRONG]})
    result = grown(world, 2)
    node = result.tree.nodes[2]
    assert (node.forced, node.generated, node.versions) == (len(node.token_ids), 0, ()) and not node.logprobs.any()
    group = group_of(result)
    assert isinstance(group, TrajectoryGroup)
    ids = codec().encode(reply)
    for trajectory in group.trajectories:
        start = trajectory.steps[1].start
        span = slice(start, start + len(ids))
        assert trajectory.token_ids[span].tolist() == ids and trajectory.steps[1].type == ENVIRONMENT
        assert not trajectory.loss_mask[span].any() and not trajectory.behavior_logprobs[span].any()
        assert trajectory.loss_mask.sum() == len(trajectory.token_ids) - len(prompt().token_ids) - len(ids)
    [demonstration], [pair] = group.demonstrations, group.pairs
    sides = [(demonstration.token_ids, demonstration.loss_mask), (pair.chosen_ids, pair.chosen_mask)]
    for token_ids, mask in [*sides, (pair.rejected_ids, pair.rejected_mask)]:
        start = len(prompt().token_ids) + len(codec().encode(A))
        assert mask is not None and token_ids[start : start + len(ids)].tolist() == ids
        unmasked = np.flatnonzero(~mask[len(prompt().token_ids) :]) + len(prompt().token_ids)
        assert unmasked.tolist() == list(range(start, start + len(ids)))


def test_a_reply_that_is_done_ends_the_chain_at_the_turn() -> None:
    world = chains({"": [A, A]}, a=Reply(text="x", done=True, solved=True, reward=0.5))
    tree = grown(world, 2).tree
    assert [node.type for node in tree.nodes] == ["start", CALL]
    verdict = tree.nodes[1].verdict
    assert verdict is not None and (verdict.outcome, verdict.reward) == ("ok", 0.5)
    assert (tree.nodes[1].visits, tree.nodes[1].total, tree.nodes[1].scored) == (2, 1.0, 0)
    assert world.turns == [(A,)], "the same turn is answered once"


@pytest.mark.parametrize(
    ("bounds", "fields", "turns"),
    [
        ({"max_turns": 2}, {}, 2),
        ({}, {"max_chain_tokens": 6}, 2),  # two turns of three tokens; replies do not count
        ({}, {"models": {"policy": search_model(max_model_len=len(search_model().prompt_ids) + 3 + 4)}}, 1),
    ],
)
def test_bounds_of_an_episode_end_the_chain_as_cut_off(
    bounds: dict[str, int], fields: dict[str, Any], turns: int
) -> None:
    reply = answered("ab")
    proposals = {"": [A], A + reply: [A], A + reply + A + reply: [A]}
    world = chains(proposals, a=Reply(text=reply, reward=0.25))
    result = grown(world, 1, bounds=bounds, **fields)
    last = result.tree.nodes[-1]
    assert (last.type, last.defect, last.finish_reason) == (CALL, "truncated", "length")
    assert len(world.turns) == turns and result.tree.counts["truncated"] == 1
    group = group_of(result)
    assert isinstance(group, TrajectoryGroup)
    [trajectory] = group.trajectories
    assert (trajectory.finish_reason, trajectory.outcome, trajectory.reward) == ("length", "wrong", 0.25 * turns)


def test_a_failed_environment_ends_its_chain_alone() -> None:
    failure = Verdict(outcome="timeout", reward=0.0, answered=False, detail="no verdict after 1 s")
    world = chains({"": [A, B, A], B + answered("ab"): [RIGHT]}, a=failure)
    result = grown(world, 3)
    verdict = result.tree.nodes[1].verdict
    assert verdict is not None and (verdict.outcome, verdict.detail) == ("timeout", "environment: no verdict after 1 s")
    assert (result.tree.nodes[1].visits, result.tree.nodes[1].samples) == (0, 2)
    group = group_of(result)
    assert isinstance(group, TrajectoryGroup)
    [trajectory] = group.trajectories
    assert trajectory.correct
    assert (group.metrics["environment_errors"], group.metrics["verifier_errors"]) == (1.0, 1.0)


class Unstopped(Scripted):
    """An engine that does not see the stop string of its first call, because kept tokens hold the beginning of it."""

    def complete(self, call: Call, model: SearchModel) -> Completion:
        seen = len(call.token_ids) > len(model.prompt_ids)
        return super().complete(call if seen else replace(call, stop=Stop()), model)


def test_text_that_was_drawn_without_the_reply_is_dropped() -> None:
    world = Unstopped({"": [A + RIGHT], A + answered("ab"): [WRONG]}, {})
    tree = grown(world, 1).tree
    assert [node.text for node in tree.nodes[1:]] == [A, answered("ab"), WRONG]
    assert tree.counts["dropped_tokens"] == len(codec().encode(RIGHT)) + 1  # with the end token


@pytest.mark.parametrize("kind", SEARCHES)
@pytest.mark.parametrize("seed", range(2))
def test_a_chain_of_a_tree_is_an_episode(kind: str, seed: int) -> None:
    world = players(defects=0.05)
    searched = {**SEARCHES[kind], "parallel_simulations": 3, "max_depth": 12, "stop": {"simulations": 24}}
    result = played(world, searched=searched, seed=seed)
    tree = result.tree
    replies = [node for node in tree.nodes if node.type == ENVIRONMENT]
    assert replies and tree.answers()
    if "backtracking" in kind:
        assert any(node.backtrack for node in tree.nodes)
    for node in replies:
        assert [child.type for child in tree.nodes if child.parent == node.parent] == [ENVIRONMENT]
        assert tree.nodes[node.parent].type == CALL
    for number in tree.answers():
        trajectory = next(t for t in group_of(result).trajectories if t.steps[-1].node == number)
        spans = [(step.start, step.stop) for step in trajectory.steps if step.type == ENVIRONMENT]
        episode = play_again(world, trajectory.token_ids.tolist(), spans)
        assert episode.token_ids[: len(trajectory.token_ids)].tolist() == trajectory.token_ids.tolist()
        assert (episode.reward, episode.outcome, episode.correct) == (
            trajectory.reward,
            trajectory.outcome,
            trajectory.correct,
        )
        assert not (trajectory.loss_mask & ~episode.loss_mask[: len(trajectory.token_ids)]).any()


@pytest.mark.parametrize("kind", SEARCHES)
def test_the_order_of_arrival_does_not_change_a_tree(kind: str) -> None:
    searched = {**SEARCHES[kind], "parallel_simulations": 4, "max_depth": 12, "stop": {"simulations": 24}}
    lines = {
        tree_line(played(players(), searched=searched, arrivals=random.Random(seed) if seed else None).tree)
        for seed in range(4)
    }
    assert len(lines) == 1


class Instant:
    """An engine that answers at once, and judges that answer after other tasks have run."""

    def __init__(self, opening: Reply | Verdict) -> None:
        self.world, self.opening = players(), opening

    def submit(self, requests: Sequence[CompletionRequest], affinity: int = 0) -> list[Future[Completion]]:
        futures = []
        for request in requests:
            future: Future[Completion] = Future()
            future.set_result(self.world.complete(call_of(request), search_model()))
            futures.append(future)
        return futures

    async def verify(self, items: Any, on_verdicts: Any) -> list[Verdict]:
        await asyncio.sleep(0)
        verdicts = [self.world.judge(text) for _, text in items]
        on_verdicts(list(enumerate(verdicts)))
        return verdicts

    async def replies(self, items: Sequence[tuple[Problem, Sequence[str]]]) -> list[Reply | Verdict]:
        await asyncio.sleep(0)
        return [self.world.reply(turns) if turns else self.opening for _, turns in items]


def scheduled(opening: Reply | Verdict, searched: dict[str, Any], names: list[str]) -> list[Tree | TreeFailure]:
    world: Any = Instant(opening)
    model = search_model()
    settings = SchedulerSettings(
        config=search_config(backtracking=False, patterns=("own",), **searched),
        patterns={"own": world.world.pattern},
        seed=0,
        temperature=1.0,
        top_p=1.0,
        max_chain_tokens=500,
        in_flight=4,
        environment=environment(),
    )
    engine = RoleEngine(engine=world, model=model.model, codec=model.codec, max_model_len=model.max_model_len)
    scheduler = TreeScheduler({"policy": engine}, world, settings)

    async def main() -> list[Tree | TreeFailure]:
        return await asyncio.gather(*(scheduler.grow(prompt(name)) for name in names))

    return asyncio.run(main())


SEARCHED = {"expansion": "chain", "parallel_simulations": 3, "max_depth": 12, "stop": {"simulations": 12}}


def test_the_scheduler_asks_for_replies_and_grows_the_same_trees() -> None:
    trees = scheduled(Reply(), SEARCHED, ["p", "q", "r"])
    alone = [played(players(), searched=SEARCHED, prompt_id=name).tree for name in ("p", "q", "r")]
    assert [tree_line(tree) for tree in trees] == [tree_line(tree) for tree in alone]


def test_a_text_before_the_first_turn_follows_the_prompt() -> None:
    [tree] = scheduled(Reply(text="<reclarify>a</reclarify>"), SEARCHED, ["p"])
    assert isinstance(tree, Tree)
    given = [*search_model().prompt_ids, *codec().encode("<reclarify>a</reclarify>")]
    assert tree.prompt_token_ids["policy"].tolist() == given


@pytest.mark.parametrize(
    ("opening", "reason"),
    [
        (Verdict(outcome="error", reward=0.0, answered=False, detail="it raised"), "environment: it raised"),
        (
            Reply(text="a" * 600),
            "environment: the text before the first turn has 600 tokens, too many for ",
        ),
    ],
)
def test_a_first_text_that_cannot_be_given_fails_the_tree(opening: Reply | Verdict, reason: str) -> None:
    [tree] = scheduled(opening, SEARCHED, ["p"])
    assert isinstance(tree, TreeFailure) and reason in tree.reason
