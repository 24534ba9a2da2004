"""Trees with replies of an environment: their shape, their masks and bounds, and the episodes of their chains."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from played_trees import (
    CALL,
    CHILDREN,
    JUDGES,
    SEARCHES,
    STOP,
    EpisodeGoesOnError,
    answered,
    environment,
    play_again,
    played,
    players,
    verdict_of,
)
from search_engines import call_of
from search_world import Grown, Script, codec, prompt, search_config, search_model, table

from actors.engine import Completion, CompletionRequest
from actors.rollouts.multi_turn import with_replies
from actors.search.group import build_searched_group
from actors.search.requests import Call, SearchModel
from actors.search.requests import Judge as Asked
from actors.search.scheduler import TreeScheduler
from actors.search.starting import RoleEngine, SchedulerSettings
from rlsys.config.search import ExtractConfig
from rlsys.interfaces import Reply
from rlsys.search.codec import Stop
from rlsys.search.extract import pick_chain
from rlsys.search.outline import node_facts
from rlsys.search.tree_json import parse_line, tree_line
from rlsys.trees import ENVIRONMENT, ThoughtNode, Tree, TreeFailure
from rlsys.types import Problem, RolloutFailure, Trajectory, TrajectoryGroup, Verdict

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


def grown(world: Scripted, simulations: int, stop: Mapping[str, Any] = {}, **fields: Any) -> Grown:
    searched = {"expansion": "chain", "stop": {"simulations": simulations, **stop}}
    return played(world, searched=searched, **fields)


def group_of(grown: Grown) -> TrajectoryGroup | RolloutFailure:
    return build_searched_group(grown.tree, prompt(), codec(), ExtractConfig())


def trajectories(grown: Grown) -> Sequence[Trajectory]:
    group = group_of(grown)
    assert isinstance(group, TrajectoryGroup)
    return group.trajectories


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
    ("fields", "turns"),
    [
        ({"max_chain_tokens": 6}, 2),  # two turns of three tokens; replies do not count
        ({"models": {"policy": search_model(max_model_len=len(search_model().prompt_ids) + 3 + 4)}}, 1),
    ],
)
def test_a_reply_that_leaves_no_room_cuts_the_chain_off(fields: dict[str, Any], turns: int) -> None:
    reply = answered("ab")
    proposals = {"": [A], A + reply: [A], A + reply + A + reply: [A]}
    world = chains(proposals, a=Reply(text=reply, reward=0.25))
    result = grown(world, 1, **fields)
    last = result.tree.nodes[-1]
    assert (last.type, last.defect, last.finish_reason, last.scored) == (CALL, "truncated", "length", -1)
    assert len(world.turns) == turns and result.tree.counts["truncated"] == 1
    assert [(event.completion, event.finished) for event in result.events if isinstance(event, Asked)] == [
        (A * turns, False)
    ]
    [trajectory] = trajectories(result)
    assert (trajectory.finish_reason, trajectory.outcome, trajectory.reward) == ("length", "wrong", 0.25 * turns)


def test_a_chain_that_used_up_its_turns_is_whole_and_judged() -> None:
    reply = answered("ab")
    world = chains({"": [A], A + reply: ["<thinking>1</thinking>" + B]}, a=Reply(text=reply, reward=0.25))
    world.judge = JUDGES["no reference"]  # type: ignore[method-assign]
    result = grown(world, 9, bounds={"max_turns": 2}, stop={"correct": [{"count": 1}]})
    last = result.tree.nodes[-1]
    assert (last.type, last.defect, last.finish_reason, last.scored, last.correct) == (CALL, None, "turns", 0, True)
    assert "truncated" not in result.tree.counts and result.tree.stop == "correct"
    assert "last turn" in node_facts(last) and parse_line(tree_line(result.tree)).nodes[-1].finish_reason == "turns"
    [trajectory] = trajectories(result)
    assert (trajectory.finish_reason, trajectory.reward, trajectory.parts) == ("turns", 0.25, {"environment": 0.25})
    assert result.tree.most_frequent is None, "a call is no answer"
    chain = pick_chain(result.tree, "shortest", codec())
    assert chain is not None and chain.number == len(result.tree.nodes) - 1 and chain.reward == 0.25


def test_a_last_turn_agrees_with_no_answer() -> None:
    reply = answered("ab")
    world = chains({"": [A] * 3, A + reply: [B, RIGHT, WRONG]}, b=Reply(solved=True, reward=0.5))
    searched = {"expansion": "chain", "value": {"type": "agreement"}, "stop": {"simulations": 3}}
    result = played(world, searched=searched, bounds={"max_turns": 2})
    ends = {node.text: (node.finish_reason, node.total, node.scored) for node in result.tree.nodes[3:]}
    assert ends == {B: ("turns", 0.0, 0), RIGHT: ("stop", 0.5, 1), WRONG: ("stop", 0.5, 2)}
    assert result.search._stop.votes == {"1": 1, "0": 1} and result.tree.nodes[0].visits == 3


def test_the_end_token_of_a_failed_chain_ends_a_turn() -> None:
    """The environment replies to it, as in an episode, and its failure costs the chain alone."""
    thought = "<thinking>a</thinking>"
    world = chains({"": [thought, A, thought, "<thinking>b</thinking>"], A + answered("ab"): [RIGHT]})
    world.replies[thought] = Reply(reward=-0.5)
    world.replies["<thinking>b</thinking>"] = Verdict(outcome="error", reward=0.0, answered=False, detail="it raised")
    result = grown(world, 4)
    assert world.turns[:2] == [(thought,), (A,)] and world.turns.count((thought,)) == 1
    first, failed = (node for node in result.tree.nodes if node.type == "thinking")
    assert (first.defect, first.visits, first.total, first.samples) == ("unanswered", 2, -1.0, 2)
    assert (failed.visits, failed.verdict and failed.verdict.outcome) == (0, "error")
    assert [(t.outcome, t.reward) for t in trajectories(result)] == [("wrong", -0.5), ("ok", 1.0)]


@pytest.mark.parametrize(("room", "is_over"), [(500, False), (9, True)])
def test_a_malformed_turn_is_judged_if_its_episode_ends_there(room: int, is_over: bool) -> None:
    """An episode would go on after a call behind an answer, unless there is no room for more than these 9 tokens."""
    text = "<thinking>a</thinking>" + RIGHT + A
    world = chains({"": [text]})
    world.replies[text] = Reply(text=answered("a"), reward=0.25)
    result = grown(world, 1, max_chain_tokens=room)
    asked = [(event.completion, event.finished) for event in result.events if isinstance(event, Asked)]
    assert asked == ([(text, False)] if is_over else []) and result.tree.counts == {"malformed": 1}
    [trajectory] = trajectories(result)
    end = "length" if is_over else "stop"
    assert (trajectory.outcome, trajectory.reward, trajectory.finish_reason) == ("wrong", 0.25, end)


def test_failed_children_are_judged_before_a_simulation_enters_them() -> None:
    """Two draws of one child count twice; the turn of a child that a stop at a tag has ended is none."""
    bad, other = f"<{CALL}>", f"<{CALL}></thinking>"
    world = Scripted({"": []}, {bad: Reply(reward=0.5), other: Reply(reward=0.25)})
    world.left = {bad: deque(["", "", "</thinking>"])}
    world.pattern = table({**CHILDREN, "start": {CALL: 3}})
    tree = played(world, searched={"expansion": "node", "stop": {"simulations": 1}}).tree
    outlines = [(node.text, node.defect, node.samples, node.visits, node.total) for node in tree.nodes[1:]]
    assert outlines == [(bad, "unclosed", 2, 2, 1.0), (other, "malformed", 1, 1, 0.0)]
    assert world.turns == [(bad,)] and tree.nodes[0].visits == 3


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


LIMITS: Sequence[dict[str, int]] = ({}, {"max_turns": 2}, {"max_tokens": 12}, {"max_turns": 3, "max_tokens": 22})


@pytest.mark.parametrize("kind", SEARCHES)
@pytest.mark.parametrize("judging", [None, *JUDGES])
def test_a_chain_of_a_tree_is_an_episode(kind: str, judging: str | None) -> None:
    world = players(defects=0.1, judging=judging)
    searched = {**SEARCHES[kind], "parallel_simulations": 3, "max_depth": 12, "stop": {"simulations": 20}}
    ends = Counter[str]()
    for seed, limits in enumerate(LIMITS):
        bounds = {name: value for name, value in limits.items() if name == "max_turns"}
        tokens = limits.get("max_tokens", 500)
        result = played(world, searched=searched, seed=seed, bounds=bounds, max_chain_tokens=tokens)
        tree = result.tree
        check_replies(tree)
        if "backtracking" in kind and not limits:
            assert any(node.backtrack for node in tree.nodes)
        for chain in trajectories(result):
            node = tree.nodes[chain.steps[-1].node]
            failed = Verdict(outcome="wrong", reward=0.0, answered=False, detail="malformed")
            if is_ended_by_the_search(node):
                assert verdict_of(chain) == with_replies(failed, replies_of(world, tree, chain)[:-1])
                continue
            try:
                episode = play_again(world, chain, max_tokens=tokens, **bounds)
            except EpisodeGoesOnError:
                assert node.defect == "malformed" and node.text.endswith(STOP)
                assert verdict_of(chain) == with_replies(failed, replies_of(world, tree, chain))
                continue
            ends[chain.finish_reason] += 1
            assert episode.token_ids[: len(chain.token_ids)].tolist() == chain.token_ids.tolist()
            assert verdict_of(chain) == verdict_of(episode) and chain.finish_reason == episode.finish_reason
            assert not (chain.loss_mask & ~episode.loss_mask[: len(chain.token_ids)]).any()
    assert set(ends) == {"stop", "length", "turns"}


def replies_of(world: Any, tree: Tree, chain: Trajectory) -> list[Reply]:
    """Return the replies of all turns, of a last one that has not ended too."""
    turns = [""]
    for step in chain.steps:
        turns = [*turns, ""] if step.type == ENVIRONMENT else [*turns[:-1], turns[-1] + tree.nodes[step.node].text]
    return [world.reply(turns[:count]) for count in range(1, len(turns) + 1)]


def check_replies(tree: Tree) -> None:
    replies = [node for node in tree.nodes if node.type == ENVIRONMENT]
    assert replies and tree.answers()
    for node in replies:
        assert [child.type for child in tree.nodes if child.parent == node.parent] == [ENVIRONMENT]
        assert tree.nodes[node.parent].type == CALL


def is_ended_by_the_search(node: ThoughtNode) -> bool:
    """Return whether the search has ended a chain in the middle of a turn, at a tag that may not stand there."""
    ended = node.finish_reason == "length" or int(node.token_ids[-1]) in codec().end_token_ids
    return node.defect == "malformed" and not ended and not node.text.endswith(STOP)


@pytest.mark.parametrize("kind", SEARCHES)
def test_the_order_of_arrival_does_not_change_a_tree(kind: str) -> None:
    searched = {**SEARCHES[kind], "parallel_simulations": 4, "max_depth": 12, "stop": {"simulations": 24}}
    limits = {"bounds": {"max_turns": 2}, "max_chain_tokens": 22}
    orders = [None, *map(random.Random, range(1, 4))]
    grown = [played(players(defects=0.1), searched=searched, arrivals=order, **limits) for order in orders]
    assert len({tree_line(each.tree) for each in grown}) == 1


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
        verdicts = [self.world.judge(text, finished) for _, text, finished in items]
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
