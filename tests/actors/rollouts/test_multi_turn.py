"""Episodes over a scripted engine: order of calls, tokens, masks, bounds and failures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from actors.engine import Completion, CompletionRequest
from actors.rollouts.multi_turn import Episodes, with_replies
from rlsys.config.environment import EnvironmentConfig
from rlsys.errors import RolloutError
from rlsys.interfaces import Reply
from rlsys.types import (
    FinishReason,
    Problem,
    Prompt,
    RolloutFailure,
    SamplingSettings,
    Trajectory,
    TrajectoryGroup,
    Verdict,
    VersionSpan,
)

END, OTHER_END = 1, ord("%")
SETTINGS = SamplingSettings(samples=1, temperature=1.0, top_p=1.0, max_tokens=12, seed=5)
WRONG = Verdict(outcome="error", reward=0.0, answered=False, detail="it raised")


class Letters:
    """A tokenizer of letters, whose id 1 is the end token."""

    eos_token = "$"  # noqa: S105 - it is no password
    chat_template = "yes"

    def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
        return {"input_ids": [END if letter == "$" else ord(letter) for letter in text]}

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join("$" if token == END else chr(token) for token in token_ids)

    def apply_chat_template(self, messages: Sequence[dict[str, str]], **_options: Any) -> str:
        turns = "".join(f"{m['role'][0]}:{m['content']}$\n" for m in messages)
        return f"{turns}a:"


TOKENS = Letters()


class Engine:
    """An engine whose completions the test gives, one by one."""

    def __init__(self, script: Callable[[CompletionRequest], Completion | Exception | None]) -> None:
        self.script = script
        self.calls: list[list[CompletionRequest]] = []
        self.open: dict[str, Future[Completion]] = {}

    def submit(self, requests: Sequence[CompletionRequest]) -> list[Future[Completion]]:
        self.calls.append(list(requests))
        futures = []
        for request in requests:
            future: Future[Completion] = Future()
            outcome = self.script(request)
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            elif outcome is not None:
                future.set_result(outcome)
            else:
                self.open[request.request_id] = future
            futures.append(future)
        return futures


class Judges:
    """A verifier that pays a tenth for each letter, and a scripted environment."""

    def __init__(self, reply: Callable[[Sequence[str]], Reply | Verdict]) -> None:
        self.reply = reply
        self.asked: list[tuple[str, ...]] = []
        self.verified: list[tuple[str, bool]] = []

    async def replies(self, items: Sequence[tuple[Problem, Sequence[str]]]) -> list[Reply | Verdict]:
        self.asked += [tuple(turns) for _, turns in items if turns]
        return [self.reply(turns) for _, turns in items]

    async def verify(self, items: Sequence[tuple[Problem, str, bool]]) -> list[Verdict]:
        self.verified += [(text, finished) for _, text, finished in items]
        return [Verdict(outcome="ok", reward=len(text) / 10, answered=True) for _, text, _ in items]


def drawn(text: str, finish: FinishReason = "stop", version: int = 3) -> Completion:
    token_ids = np.array(TOKENS(text)["input_ids"], dtype=np.int32)
    logprobs = -np.arange(1, len(text) + 1, dtype=np.float32)
    span = VersionSpan(start=0, version=version)
    return Completion(token_ids=token_ids, logprobs=logprobs, finish_reason=finish, versions=(span,))


def prompt(name: str = "p") -> Prompt:
    return Prompt(prompt_id=name, token_ids=np.array(TOKENS("Q")["input_ids"], dtype=np.int32), answer="3")


def in_turn(*texts: str | Completion) -> Callable[[CompletionRequest], Completion]:
    """Return a script that gives the completions in order."""
    waiting = [drawn(each) if isinstance(each, str) else each for each in texts]
    return lambda _request: waiting.pop(0)


def play(
    engine: Engine, judges: Judges, prompts: Sequence[Prompt] | None = None, settings: Any = SETTINGS, **config: Any
) -> list[TrajectoryGroup | RolloutFailure]:
    values = {"fn": "a:b", "stop": (";",), **config}
    max_model_len = values.pop("max_model_len", 40)
    episodes = Episodes(engine, judges, TOKENS, [END, OTHER_END], EnvironmentConfig(**values), max_model_len)

    async def run() -> list[TrajectoryGroup | RolloutFailure]:
        return list(await asyncio.gather(*await episodes.start(prompts or [prompt()], settings)))

    return asyncio.run(run())


def one(engine: Engine, judges: Judges, **config: Any) -> Trajectory:
    [group] = play(engine, judges, **config)
    assert isinstance(group, TrajectoryGroup)
    [trajectory] = group.trajectories
    return trajectory


def hint(turns: Sequence[str]) -> Reply:
    return Reply(text=f"[{len(turns)}]" if turns else "")


def test_the_next_prompt_has_the_exact_tokens_and_those_of_the_reply() -> None:
    engine, judges = Engine(in_turn("ab;", "c;", "d$")), Judges(hint)
    trajectory = one(engine, judges)
    prompts = [TOKENS.decode(request.token_ids) for [request] in engine.calls]
    assert prompts == ["Q", "Qab;[1]", "Qab;[1]c;[2]"]
    assert judges.asked == [("ab;",), ("ab;", "c;"), ("ab;", "c;", "d")]
    assert TOKENS.decode(trajectory.token_ids.tolist()) == "Qab;[1]c;[2]d$"
    own = "".join("x" if flag else "." for flag in trajectory.loss_mask)
    assert own == ".xxx...xx...xx"
    assert trajectory.behavior_logprobs.tolist() == [0, -1, -2, -3, 0, 0, 0, -1, -2, 0, 0, 0, -1, -2]
    assert [(span.start, span.version) for span in trajectory.versions] == [(1, 3), (7, 3), (12, 3)]
    assert (trajectory.turns, trajectory.finish_reason, trajectory.completion_length) == (3, "stop", 7)
    # The verifier sees what the policy wrote, without the environment's texts and the end token.
    assert judges.verified == [("ab;c;d", True)]
    assert trajectory.reward == pytest.approx(0.6)


def test_seeds_differ_by_turn_and_the_token_bound_is_that_of_the_episode() -> None:
    engine = Engine(in_turn("ab;", "c;", "d$"))
    one(engine, Judges(hint))
    requests = [request for [request] in engine.calls]
    assert len({request.seed for request in requests}) == 3
    assert len({request.request_id for request in requests}) == 3
    assert [request.max_tokens for request in requests] == [12, 9, 7]
    assert {request.stop_strings for request in requests} == {(";",)}


def test_an_episode_goes_on_while_others_wait() -> None:
    def script(request: CompletionRequest) -> Completion | None:
        if request.request_id.startswith("slow"):
            return None
        return drawn("b$") if len(request.token_ids) > 1 else drawn("a;")

    engine, judges = Engine(script), Judges(hint)
    episodes = Episodes(engine, judges, TOKENS, [END, OTHER_END], EnvironmentConfig(fn="a:b", stop=(";",)), 40)

    async def run() -> list[Any]:
        slow, quick = await episodes.start([prompt("slow"), prompt("quick")], SETTINGS)
        waiting = asyncio.ensure_future(slow)
        first = await quick  # needs a second turn, while the slow prompt has not even its first
        assert not waiting.done()
        [future] = engine.open.values()
        future.set_result(drawn("c$"))
        return [first, await waiting]

    groups = asyncio.run(run())
    assert [[t.turns for t in group.trajectories] for group in groups] == [[2], [1]]
    assert [len(call) for call in engine.calls] == [2, 1]  # all first turns in one call


def test_a_text_before_the_first_turn_is_forced() -> None:
    engine = Engine(in_turn("a$"))
    trajectory = one(engine, Judges(lambda turns: Reply(text="" if turns else "room;")))
    assert TOKENS.decode(trajectory.token_ids.tolist()) == "Qroom;a$"
    assert trajectory.loss_mask.tolist() == [False] * 6 + [True] * 2


def test_messages_get_the_tokens_of_the_chat_template() -> None:
    engine, judges = Engine(in_turn("ab$", "c$", "d%")), Judges(hint)
    trajectory = one(engine, judges, role="user", stop=())
    assert TOKENS.decode(trajectory.token_ids.tolist()) == "Qab$\nu:[1]$\na:c$\nu:[2]$\na:d%"
    # A turn that ends with another token than that of the template has no room for a message.
    assert (trajectory.turns, trajectory.finish_reason) == (3, "stop")
    assert judges.verified == [("ab\nc\nd", True)]


@pytest.mark.parametrize(
    ("reply", "texts", "config", "turns", "finish"),
    [
        (lambda turns: Reply(text="x", done=len(turns) == 2), ("a;", "b;"), {}, 2, "stop"),  # the environment ends it
        (hint, ("a;", "b;"), {"max_turns": 2}, 2, "turns"),
        (hint, ("aaaaaaaaaaa;",), {}, 1, "length"),  # sampling.max_tokens
        (lambda turns: Reply(text="y" * 30 if turns else ""), ("aaaaaaaaaa;",), {}, 1, "length"),  # max_model_len
        (hint, (drawn("abc", "length"),), {}, 1, "length"),  # cut off within a turn
    ],
)
def test_bounds_of_an_episode(
    reply: Any, texts: Sequence[Any], config: dict[str, Any], turns: int, finish: str
) -> None:
    judges = Judges(reply)
    trajectory = one(Engine(in_turn(*texts)), judges, **config)
    assert (trajectory.turns, trajectory.finish_reason) == (turns, finish)
    assert trajectory.loss_mask[-1], "a text that nothing follows is left out"
    assert judges.verified[0][1] == (finish != "length")
    assert len(judges.asked) == sum(isinstance(text, str) for text in texts), "a part of a turn has no reply"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_of_the_environment_is_an_outcome_of_its_episode(
    failing: int, caplog: pytest.LogCaptureFixture
) -> None:
    judges = Judges(lambda turns: WRONG if len(turns) == failing else Reply())
    trajectory = one(Engine(in_turn("a;", "b$")), judges)
    assert (trajectory.outcome, trajectory.reward, trajectory.environment_failed) == ("error", 0.0, True)
    assert trajectory.detail == "environment: it raised" + ("; the completion ends with 'a;'" if failing else "")
    assert trajectory.turns == failing and not judges.verified
    assert "prompt p: 1 of 1 episodes failed: environment: it raised" in caplog.text


@pytest.mark.parametrize(
    ("config", "text", "reason"),
    [({"role": "user"}, "hi", "needs environment.role null"), ({}, "y" * 39, "too many for actors.max_model_len 40")],
)
def test_a_first_text_that_cannot_be_given_is_a_failure(config: dict[str, Any], text: str, reason: str) -> None:
    engine = Engine(in_turn())
    trajectory = one(engine, Judges(lambda _turns: Reply(text=text)), **config)
    assert trajectory.environment_failed and reason in trajectory.detail
    assert engine.calls == [[]] and trajectory.versions == ()


def test_a_refused_request_fails_its_prompt_alone() -> None:
    def script(request: CompletionRequest) -> Completion | Exception:
        refused = request.request_id.startswith("bad") and len(request.token_ids) > 1
        return RolloutError("it was refused") if refused else drawn("a;" if len(request.token_ids) == 1 else "b$")

    bad, good = play(Engine(script), Judges(hint), [prompt("bad"), prompt("good")])
    assert isinstance(bad, RolloutFailure) and (bad.reason, bad.tokens) == ("it was refused", 2)
    assert isinstance(good, TrajectoryGroup) and good.trajectories[0].turns == 2


RIGHT = Verdict(outcome="ok", reward=1.0, answered=True)
NO_ANSWER = Verdict(outcome="wrong", reward=0.0, answered=False, detail="no answer")


UNJUDGED = Verdict(outcome="ok", reward=0.0, answered=True)  # of a task without reference answers


@pytest.mark.parametrize(
    ("verdict", "replies", "expected"),
    [
        (RIGHT, [Reply(), Reply()], RIGHT),
        (WRONG, [Reply(reward=1.0, solved=True)], WRONG),
        (
            RIGHT,
            [Reply(reward=0.5), Reply(reward=-0.25, detail="slow")],
            Verdict(outcome="ok", reward=1.25, answered=True, detail="slow", parts={"task": 1.0, "environment": 0.25}),
        ),
        (
            NO_ANSWER,
            [Reply(solved=False), Reply(reward=2.0, solved=True), Reply()],
            Verdict(
                outcome="ok", reward=2.0, answered=True, detail="no answer", parts={"task": 0.0, "environment": 2.0}
            ),
        ),
        (
            RIGHT,
            [Reply(solved=False)],
            Verdict(outcome="wrong", reward=1.0, answered=True, parts={"task": 1.0, "environment": 0.0}),
        ),
        (UNJUDGED, [Reply(reward=1.0)], Verdict(outcome="ok", reward=1.0, answered=True, parts={"environment": 1.0})),
        (
            UNJUDGED,
            [Reply(reward=-1.0)],
            Verdict(outcome="wrong", reward=-1.0, answered=True, parts={"environment": -1.0}),
        ),
    ],
)
def test_rewards_of_turns_are_added(verdict: Verdict, replies: list[Reply], expected: Verdict) -> None:
    assert with_replies(verdict, replies) == expected
    assert with_replies(verdict, replies).correct == (expected.outcome == "ok")
