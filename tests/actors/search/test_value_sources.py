"""Sources of values: the check of steps, rollouts and the judge, against numbers derived by hand."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from search_world import QUESTION, THINK, completion, prompt, search_model

from actors.engine import CompletionRequest
from actors.search.build import check_tags
from actors.search.requests import Call, PlannedCall, Thoughts, Value, Values
from actors.search.values.deadline import TimedValuer
from actors.search.values.judge import JudgeValuer, answer_tokens
from actors.search.values.rollouts import RolloutValuer
from actors.search.values.steps import StepValuer
from actors.verifiers.steps import as_verdict
from rlsys.config.search import SearchConfig
from rlsys.config.search_values import ModelValueConfig
from rlsys.errors import ConfigError, EngineError, RolloutError
from rlsys.search.codec import Stop
from rlsys.types import Message, Problem, Prompt, StepVerdict, Verdict

MODEL = search_model()
RIGHT, FAILED = Verdict(outcome="ok", reward=1.0, answered=True), Verdict(outcome="error", reward=0.0, answered=False)


def ask(valuer: Any, *lines: Thoughts, of: Prompt | None = None) -> Values:
    return asyncio.run(valuer.values(of or prompt(), Value(7, lines), 3))


class Checker:
    def __init__(self, *verdicts: Verdict) -> None:
        self.verdicts, self.items = list(verdicts), list[tuple[str, str]]()

    async def check_steps(self, items: Sequence[tuple[str, str]]) -> list[Verdict]:
        self.items += items
        return [self.verdicts.pop(0) for _ in items]


@pytest.mark.parametrize(
    ("judgement", "expected"),
    [
        (StepVerdict(), (1.0, 1.0, 1.0)),
        (StepVerdict(wrong_node=2), (0.0, None, None)),  # two nodes are before the new ones
        (StepVerdict(wrong_node=3), (1.0, 0.0, None)),
        (StepVerdict(wrong_node=4), (1.0, 1.0, 0.0)),
        (StepVerdict(wrong_node=1), (0.0, None, None)),  # the first new node did not take it back
        (None, (None, None, None)),
    ],
)
def test_the_first_wrong_node_has_the_value_0(
    judgement: StepVerdict | None, expected: tuple[float | None, ...]
) -> None:
    checker = Checker(as_verdict(judgement))
    line = Thoughts(before=("p", "q"), texts=("a", "b", "c"))
    assert ask(StepValuer(checker), line) == Values(values=(expected,))
    assert checker.items == [(QUESTION, "pqabc")]


def test_a_failed_check_counts_for_each_of_its_nodes() -> None:
    timeout = Verdict(outcome="timeout", reward=0.0, answered=False)
    lines = [Thoughts(before=(), texts=texts) for texts in (("a", "b"), ("c",), ("d",))]
    found = ask(StepValuer(Checker(timeout, as_verdict(StepVerdict()), FAILED)), *lines)
    assert found == Values(values=((None, None), (1.0,), (None,)), failed={"timeout": 2, "error": 1})


def test_steps_of_a_conversation_are_not_checked() -> None:
    checker = Checker()
    talk = Prompt(
        prompt_id="p", token_ids=prompt().token_ids, answer="1", question=(Message(role="user", content="q"),)
    )
    assert ask(StepValuer(checker), Thoughts(before=(), texts=("a",)), of=talk).values == ((None,),)
    assert checker.items == []


class Sampler:
    """An engine that speaks given texts, and raises given errors."""

    def __init__(self, *outcomes: str | Exception) -> None:
        self.outcomes, self.requests, self.affinities = list(outcomes), list[CompletionRequest](), set[int]()

    def submit(self, requests: Sequence[CompletionRequest], affinity: int = 0) -> list[Future[Any]]:
        self.requests += requests
        self.affinities.add(affinity)
        return [self._future(request) for request in requests]

    def _future(self, request: CompletionRequest) -> Future[Any]:
        future: Future[Any] = Future()
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            call = Call(role="policy", token_ids=list(request.token_ids), seed=0, max_tokens=9, stop=Stop())
            ids = [*MODEL.codec.encode(outcome.removesuffix("~")), *([] if outcome.endswith("~") else [END])]
            future.set_result(completion(call, ids, "length" if outcome.endswith("~") else "stop"))
        return future


END = MODEL.codec.end_token_id


class Judge:
    def __init__(self, rewards: dict[str, Verdict]) -> None:
        self.rewards, self.items = rewards, list[tuple[Problem, str, bool]]()

    async def verify(self, items: Sequence[tuple[Problem, str, bool]]) -> list[Verdict]:
        self.items += items
        return [self.rewards.get(text, Verdict(outcome="wrong", reward=0.0, answered=True)) for _, text, _ in items]


def planned(seed: int) -> PlannedCall:
    call = Call(role="policy", token_ids=[1, 2], seed=seed, max_tokens=9, stop=Stop())
    return PlannedCall(type=None, role="policy", forced=[], spill="", backtrack=False, limited_by_type=False, call=call)


def rollouts(sampler: Sampler, judge: Judge, *lines: Thoughts) -> Values:
    valuer = RolloutValuer(engine=sampler, verifier=judge, codec=MODEL.codec, temperature=0.5, top_p=0.75)
    return ask(valuer, *lines)


def test_the_value_of_a_node_is_the_mean_reward_of_its_rollouts() -> None:
    good, bad = "<answer>1</answer>", "<answer>0</answer>"
    sampler, judge = Sampler(good, bad, good, f"{THINK}~"), Judge({f"xy{good}": RIGHT, f"xyz{good}": RIGHT})
    line = Thoughts(before=("x",), texts=("y", "z"), rollouts=((planned(1), planned(2)), (planned(3), planned(4))))
    other = Thoughts(before=(), texts=("w",), rollouts=((),))  # the context had no room
    found = rollouts(sampler, judge, line, other)
    # Right and wrong after y, right and cut off after z. The tokens are three and the end, three times; then three.
    assert found == Values(values=((0.5, 0.5), (None,)), failed={}, tokens=15)
    assert judge.items == [
        (prompt().problem, f"xy{good}", True),
        (prompt().problem, f"xy{bad}", True),
        (prompt().problem, f"xyz{good}", True),
        (prompt().problem, f"xyz{THINK}", False),
    ]
    assert [(r.seed, r.temperature, r.top_p, r.max_tokens) for r in sampler.requests] == [
        (seed, 0.5, 0.75, 9) for seed in (1, 2, 3, 4)
    ]
    assert len({r.request_id for r in sampler.requests}) == 4 and sampler.affinities == {3}


def test_failed_rollouts_do_not_count() -> None:
    good = "<answer>1</answer>"
    refused = RolloutError("refused")
    sampler, judge = Sampler(refused, good, refused, good), Judge({f"y{good}": RIGHT, f"yz{good}": FAILED})
    line = Thoughts(before=(), texts=("y", "z"), rollouts=((planned(1), planned(2)), (planned(3), planned(4))))
    assert rollouts(sampler, judge, line) == Values(values=((1.0, None),), failed={"error": 1}, tokens=8)


class Broken:
    async def values(self, prompt: Prompt, request: Value, affinity: int) -> Values:
        raise TimeoutError("of the source")


def test_values_that_take_too_long_have_failed_and_their_requests_are_cancelled() -> None:
    class Silent(Sampler):
        def submit(self, requests: Sequence[CompletionRequest], affinity: int = 0) -> list[Future[Any]]:
            self.futures: list[Future[Any]] = [Future() for _ in requests]
            return self.futures

    sampler, line = Silent(), Thoughts(before=(), texts=("y", "z"), rollouts=((planned(1),), (planned(2),)))
    valuer = RolloutValuer(engine=sampler, verifier=Judge({}), codec=MODEL.codec, temperature=0.5, top_p=0.75)
    found = ask(TimedValuer(valuer, 0.01), line)
    assert found == Values(values=((None, None),), failed={"timeout": 2})
    assert all(future.cancelled() for future in sampler.futures)
    own = TimedValuer(Broken(), 60.0)
    with pytest.raises(TimeoutError, match="of the source"):
        ask(own, line)
    quick = TimedValuer(
        RolloutValuer(engine=Sampler(f"{THINK}~"), verifier=Judge({}), codec=MODEL.codec, temperature=0.5, top_p=0.75),
        60.0,
    )
    assert ask(quick, Thoughts(before=(), texts=("y",), rollouts=((planned(1),),))).values == ((0.0,),)


def test_a_broken_engine_is_an_error_of_the_tree() -> None:
    line = Thoughts(before=(), texts=("y",), rollouts=((planned(1),),))
    with pytest.raises(EngineError, match="broke"):
        rollouts(Sampler(EngineError("broke")), Judge({}), line)


class Scorer:
    """A judge whose log-probability of the last token of a row is that of its number in `scores`."""

    def __init__(self, scores: dict[int, float | Exception]) -> None:
        self.scores, self.rows = scores, list[list[int]]()

    def score(self, token_ids: Sequence[int], tokens: int | None, affinity: int) -> Future[Any]:
        assert (tokens, affinity) == (None, 3)
        self.rows.append(list(token_ids))
        future: Future[Any] = Future()
        outcome = self.scores[token_ids[-1]]
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result((np.zeros((2, 1)), np.array([[-9.0], [outcome]], dtype=np.float32)))
        return future


class Letters:
    """A tokenizer with one token for each character, without a chat template."""

    chat_template = None
    name_or_path = "letters"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def convert_ids_to_tokens(self, token: int) -> str:
        return chr(token)


FOLDER: Any = SimpleNamespace(tokenizer=Letters(), vocabulary=256, path="judge")


def judge_config(**fields: Any) -> ModelValueConfig:
    template = "{question}|{chain}?"
    return ModelValueConfig.model_validate(
        {"type": "model", "path": "judge", "template": template, "right": "+", "wrong": "-", **fields}
    )


def test_a_judge_compares_the_probabilities_of_two_words() -> None:
    scorer = Scorer({ord("+"): math.log(0.3), ord("-"): math.log(0.1)})
    line = Thoughts(before=("{question}",), texts=("y", "z"))
    found = ask(JudgeValuer(scorer, FOLDER, judge_config()), line)
    assert found.values == ((pytest.approx(0.75), pytest.approx(0.75)),) and found.failed == {}
    assert ["".join(map(chr, row)) for row in scorer.rows] == [
        f"{QUESTION}|{{question}}{chain}?{word}" for chain in ("y", "yz") for word in "+-"
    ]


@pytest.mark.parametrize(
    ("yes", "no", "expected"), [(0.0, -800.0, 1.0), (-800.0, 0.0, 0.0), (-math.inf, -math.inf, None)]
)
def test_extreme_scores_have_values(yes: float, no: float, expected: float | None) -> None:
    valuer = JudgeValuer(Scorer({ord("+"): yes, ord("-"): no}), FOLDER, judge_config())
    assert ask(valuer, Thoughts(before=(), texts=("y",))).values == ((expected,),)


def test_a_chain_that_the_judge_refuses_has_no_value() -> None:
    valuer = JudgeValuer(Scorer({ord("+"): 0.0, ord("-"): RolloutError("too long")}), FOLDER, judge_config())
    assert ask(valuer, Thoughts(before=(), texts=("y",))) == Values(values=((None,),), failed={"error": 1})


@pytest.mark.parametrize(("yes", "no"), [("right", "rubbish"), ("", "no")])
def test_answers_that_begin_alike_are_refused(yes: str, no: str) -> None:
    assert answer_tokens(FOLDER, judge_config()) == (ord("+"), ord("-"))
    with pytest.raises(ConfigError, match="expected texts that begin with different tokens of judge"):
        answer_tokens(FOLDER, judge_config(right=yes, wrong=no))


@pytest.mark.parametrize("template", ["{chain}", "{question}"])
def test_a_template_without_a_place_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="template must contain"):
        judge_config(template=template)


def test_steps_need_the_tags_of_the_tasks() -> None:
    def config(tag: str) -> SearchConfig:
        nodes = {"plan": {"tag": tag}, "answer": {"tag": "answer", "terminal": True}}
        tables = {"own": {"children": {"start": {"plan": 1}, "plan": {"answer": 1}}}}
        fields = {"nodes": nodes, "tables": tables, "patterns": ["own"], "value": {"type": "steps"}}
        return SearchConfig.model_validate(fields)

    check_tags(config("thinking"), {})
    with pytest.raises(ConfigError, match=r"found <plan>; change the tag in search\.nodes, or choose"):
        check_tags(config("plan"), {})
