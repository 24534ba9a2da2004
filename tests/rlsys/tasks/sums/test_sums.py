"""The task sums: problems, demonstrations, verdicts and steps."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import problem_of

from rlsys.config.tasks import SumsConfig, TagShares
from rlsys.tasks import build_task, calculator, tags
from rlsys.tasks.sums.chains import build_chain, without_carries
from rlsys.tasks.sums.task import SumsTask

NO_SHARES = TagShares(sub_task=0, hypothesis=0, double_check=0, reflection=0, reclarify=0)
ALL_SHARES = TagShares(sub_task=1, hypothesis=1, double_check=1, reflection=1, reclarify=1)
QUESTION = "add 37 58 19"


def make_task(seed: int = 0, **fields: object) -> SumsTask:
    task = build_task(SumsConfig.model_validate(fields), seed)
    assert isinstance(task, SumsTask)
    return task


def test_a_known_problem_stays_the_same_over_versions() -> None:
    # Runs are reproducible only if the generator does not change.
    assert make_task().problem("train", 0).question == "add 31 31 29 91"


@given(index=st.integers(0, 10**6))
@settings(max_examples=60)
def test_the_answer_is_the_sum_of_the_terms(index: int) -> None:
    problem = make_task(min_terms=3, max_terms=5, min_digits=1, max_digits=3).problem("train", index)
    assert re.fullmatch(r"add( [1-9]\d{0,2}| 0){3,5}", str(problem.question))
    total = 0
    for word in re.findall(r"\d+", str(problem.question)):
        total += int(word)
    assert problem.answer == str(total)


def test_train_and_held_out_share_no_terms() -> None:
    small = {"min_terms": 2, "max_terms": 2}

    def terms(seed: int, split: str) -> set[tuple[str, ...]]:
        questions = [str(make_task(seed, **small).problem(split, i).question) for i in range(600)]
        return {tuple(sorted(question.split()[1:])) for question in questions}

    assert not terms(3, "train") & terms(4, "held_out")


@pytest.mark.parametrize(
    ("left", "right", "result"), [(37, 58, 85), (95, 19, 104), (12, 34, 46), (5, 7, 12), (999, 1, 990), (55, 555, 500)]
)
def test_without_carries(left: int, right: int, result: int) -> None:
    assert without_carries(left, right) == result


def test_a_chain_by_hand() -> None:
    right = build_chain((37, 58, 19), error_rate=0.0, shares=NO_SHARES, rng=random.Random(0))
    assert right == "<thinking>37+58=95</thinking><thinking>95+19=114</thinking><answer>114</answer>"
    # Without carries: 37+58 is 85, then 85+19 is 94.
    weak = build_chain((37, 58, 19), error_rate=1.0, shares=NO_SHARES, rng=random.Random(0))
    assert weak == "<thinking>37+58=85</thinking><thinking>85+19=94</thinking><answer>94</answer>"


def test_all_nodes_by_hand() -> None:
    # Only the first addition has a carry to forget.
    chain = build_chain((37, 58, 4), error_rate=1.0, shares=ALL_SHARES, rng=random.Random(0))
    guess = re.search(r"<hypothesis>about (\d+)</hypothesis>", chain)
    assert guess and guess[1] in ("80", "90", "100", "110", "120")
    assert chain.replace(guess[0], "") == (
        "<sub-task>37+58+4</sub-task><reclarify>3 terms?</reclarify><thinking>37+58=85</thinking>"
        "<reflection>85 is wrong</reflection><thinking>37+58=95</thinking><thinking>95+4=99</thinking>"
        "<double-check>ends in 9</double-check><answer>99</answer>"
    )


def test_without_a_carry_there_is_nothing_to_take_back() -> None:
    chain = build_chain((12, 34), error_rate=1.0, shares=ALL_SHARES, rng=random.Random(0))
    assert "<reflection>" not in chain and chain.endswith(
        "<thinking>12+34=46</thinking><double-check>ends in 6</double-check><answer>46</answer>"
    )


@pytest.mark.parametrize(
    ("answer", "reward", "answered"),
    [("114", 1.0, True), (" 0114 ", 1.0, True), ("104", 0.0, True), ("-114", 0.0, False), ("37+58+19", 0.0, False)],
)
def test_verify(answer: str, reward: float, answered: bool) -> None:
    verdict = make_task().verify(problem_of("114"), f"<answer>{answer}</answer>")
    assert (verdict.reward, verdict.answered) == (reward, answered)


FIRST, SECOND = "<thinking>37+58=95</thinking>", "<thinking>95+19=114</thinking>"
SLIP = "<thinking>37+58=85</thinking>"


@pytest.mark.parametrize(
    ("chain", "wrong_node", "detail"),
    [
        (FIRST + SECOND + "<double-check>ends in 4</double-check><answer>114</answer>", None, ""),
        (FIRST + "<thinking>95+1", None, ""),
        (SLIP, 0, "37+58 is 95, not 85"),
        (SLIP + "<thinking>85+19=104</thinking>", 0, "37+58 is 95, not 85"),
        (SLIP + "<reflection>85 is wrong</reflection>" + FIRST + SECOND, None, ""),
        (SLIP + "<reflection>95 is wrong</reflection>" + FIRST, 1, "'95 is wrong' does not name"),
        (FIRST + "<reflection>95 is wrong</reflection>", 1, "'95 is wrong' does not name"),
        ("<thinking>58+37=95</thinking>", 0, "expected 37+58, found 58+37"),
        (FIRST + "<thinking>95+18=113</thinking>", 1, "expected 95+19, found 95+18"),
        (FIRST + SECOND + "<thinking>114+19=133</thinking>", 2, "all 3 terms are added already"),
        ("<thinking>37 58</thinking>", 0, "expected an addition"),
        (FIRST + "<answer>114</answer>", 1, "1 terms are not added yet"),
        (FIRST + "<double-check>ends in 4</double-check>", 1, "1 terms are not added yet"),
        (FIRST + SECOND + "<double-check>ends in 5</double-check>", 2, "expected ends in 4, found 'ends in 5'"),
        (FIRST + SECOND + "<answer>115</answer>", 2, "expected 114, found '115'"),
        ("<sub-task>37+58+19</sub-task><reclarify>3 terms?</reclarify><hypothesis>about 90</hypothesis>", None, ""),
        ("<sub-task>37+58</sub-task>", 0, "expected 37+58+19"),
        ("<reclarify>2 terms?</reclarify>", 0, "expected 3 terms?"),
        ("<hypothesis>90</hypothesis>", 0, "expected about and a number"),
    ],
)
def test_steps(chain: str, wrong_node: int | None, detail: str) -> None:
    verdict = make_task().check_steps(QUESTION, chain)
    assert verdict is not None and verdict.wrong_node == wrong_node
    assert verdict.detail.startswith(detail)


@given(index=st.integers(0, 10**6))
@settings(max_examples=60)
def test_steps_of_demonstrations_without_errors_are_right(index: int) -> None:
    task = make_task(error_rate=0, max_terms=6, shares=dict.fromkeys(TagShares.model_fields, 0.5))
    problem, chain = task.demonstration(index, random.Random(index))
    verdict = task.check_steps(problem.question, chain)
    assert verdict is not None and verdict.wrong_node is None
    assert task.verify(problem, chain).reward == 1.0


def test_more_terms_than_in_the_demonstrations() -> None:
    task = make_task(min_terms=5, max_terms=6, demonstrations={"min_terms": 2, "max_terms": 4})
    shown = {len(str(task.demonstration(i, random.Random(i))[0].question).split()) - 1 for i in range(60)}
    asked = {len(str(task.problem("train", i).question).split()) - 1 for i in range(60)}
    assert (shown, asked) == ({2, 3, 4}, {5, 6})


def test_a_question_of_unknown_form_has_no_rules() -> None:
    assert make_task().check_steps("37 and 58", FIRST) is None


# --- with a calculator ---


@given(index=st.integers(0, 10**6))
@settings(max_examples=60)
def test_calls_of_a_demonstration_have_the_results_of_the_calculator(index: int) -> None:
    task = make_task(tool_share=0.5, error_rate=0.5, max_terms=6)
    problem, chain = task.demonstration(index, random.Random(index))
    assert isinstance(chain, tuple) and len(chain) % 2 == 1
    turns, results = chain[::2], chain[1::2]
    assert [calculator.reply(problem, turns[: n + 1]).text for n in range(len(results))] == list(results)
    # The answer is the last total, whether it was computed or written from memory.
    whole = "".join(chain)
    assert f"{tags.final_answer(whole)}" in re.findall(r"<result>(\d+)</result>|=(\d+)</thinking>", whole)[-1]
    assert task.verify(problem, "".join(turns)).correct == (tags.final_answer(whole) == problem.answer)
    assert task.check_steps(problem.question, whole) is None


def test_every_addition_is_a_call_if_the_share_is_1() -> None:
    task = make_task(tool_share=1, error_rate=1)
    for index in range(30):
        problem, chain = task.demonstration(index, random.Random(index))
        assert len(chain) == 2 * len(str(problem.question).split()) - 3
        assert "thinking" not in "".join(chain) and task.verify(problem, "".join(chain[::2])).correct


def test_the_vocabulary_of_runs_without_a_calculator_stays_the_same() -> None:
    assert not set(calculator.TAGS) & set(make_task().vocabulary())
    assert set(calculator.TAGS) < set(make_task(tool_share=0.1).vocabulary())
