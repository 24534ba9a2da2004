"""The blocks-world task: splits, chains and verdicts."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import re
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import problem_of

from rlsys.config.tasks import BlocksworldConfig, TagShares
from rlsys.errors import ConfigError, DataError
from rlsys.tasks import build_task, tags
from rlsys.tasks.blocksworld.blocks import check_plan, facts, shortest_plan
from rlsys.tasks.blocksworld.chains import build_chain, take_notes
from rlsys.tasks.blocksworld.task import BlocksworldTask, fingerprint
from rlsys.tasks.blocksworld.text import problem_text, read_plan, read_problem

NO_SHARES = TagShares(sub_task=0, hypothesis=0, double_check=0, reflection=0, reclarify=0)
ALL_SHARES = TagShares(sub_task=1, hypothesis=1, double_check=1, reflection=1, reclarify=1)


def make_task(seed: int = 0, **fields: object) -> BlocksworldTask:
    return BlocksworldTask(BlocksworldConfig.model_validate(fields), seed)


def name_of(question: str) -> str:
    return fingerprint(*read_problem(question))


def chain_of(text: str, **fields: object) -> str:
    """Return a chain for a problem. By default it has no errors and no optional nodes."""
    state, goal = read_problem(text)
    defaults = {"moves_per_node": 2, "error_rate": 0.0, "shares": NO_SHARES, "rng": random.Random(0)}
    return build_chain(state, goal, **(defaults | fields))


def test_problem_is_a_pure_function_of_seed_split_and_index() -> None:
    first, second = make_task(), pickle.loads(pickle.dumps(make_task()))
    assert [first.problem("train", i) for i in (5, 3, 9)] == [second.problem("train", i) for i in (5, 3, 9)]
    questions = [[make_task(seed).problem("train", i).question for i in range(20)] for seed in (0, 1)]
    assert questions[0] != questions[1]


def test_a_known_problem_stays_the_same_over_versions() -> None:
    # Runs are reproducible only if the generator does not change.
    assert make_task().problem("train", 0).question == "now b, j, g\ngoal j on b"


@pytest.mark.parametrize("blocks", [3, 4, 5])
def test_problems_have_their_blocks_and_are_not_solved(blocks: int) -> None:
    task = make_task(min_blocks=3, max_blocks=blocks)
    counts, goals = Counter(), Counter()
    for index in range(500):
        problem = task.problem("train", index)
        assert problem.answer == problem.question
        state, goal = read_problem(problem.question)
        counts[sum(len(tower) for tower in state.towers)] += 1
        goals[len(goal)] += 1
        assert not goal <= facts(state) and shortest_plan(state, goal)
    assert set(counts) == set(range(3, blocks + 1))
    assert set(goals) == set(range(1, blocks))  # a tower of all blocks has one "on" fact less


@pytest.mark.heavy
@pytest.mark.parametrize("blocks", [3, 4])
def test_train_and_held_out_share_no_arrangement(blocks: int) -> None:
    sizes = {"min_blocks": blocks, "max_blocks": blocks}
    train = {nameless(make_task(3, **sizes).problem("train", i).question) for i in range(600)}
    other_seeds = [make_task(seed, **sizes) for seed in (3, 4)]
    held_out = {nameless(task.problem("held_out", i).question) for task in other_seeds for i in range(300)}
    assert not train & held_out
    # With three blocks there are 22 unsolved arrangements of two states (`test_arrangement.py`).
    assert len(held_out) == 5 if blocks == 3 else len(held_out) > 35


def nameless(question: str) -> tuple[object, ...]:
    """Return the smallest facts of a problem under all renamings of its blocks."""
    state, goal = read_problem(question)
    blocks = [block for tower in state.towers for block in tower]

    def renamed(names: tuple[str, ...]) -> tuple[object, ...]:
        new = dict(zip(blocks, names, strict=True))
        return tuple(
            tuple(sorted((fact[0], *(new[block] for block in fact[1:])) for fact in known if len(fact) > 1))
            for known in (facts(state), goal)
        )

    return min(map(renamed, permutations("abcde"[: len(blocks)])))


def test_a_chain_by_hand() -> None:
    # c is on a, and the goal is a on b. First c goes to the table, then a goes on b.
    assert chain_of("now c on a, b\ngoal a on b") == (
        "<thinking>unstack c a\nput-down c\nnow a, b, c</thinking>"
        "<thinking>pick-up a\nstack a b\nnow a on b, c</thinking>"
        "<answer>unstack c a\nput-down c\npick-up a\nstack a b</answer>"
    )
    assert chain_of("now c on a, b\ngoal clear a", moves_per_node=1) == (
        "<thinking>unstack c a\nnow a, b, hold c</thinking><answer>unstack c a</answer>"
    )
    assert chain_of("now a, b\ngoal a on b", moves_per_node=3) == (
        "<thinking>pick-up a\nstack a b\nnow a on b</thinking><answer>pick-up a\nstack a b</answer>"
    )


def test_all_nodes_by_hand() -> None:
    # There is one node, and the table is the only other place for a. The plan has 2 moves; the guess is 1, 2 or 4.
    chain = chain_of("now a, b\ngoal b on table, a on b", shares=ALL_SHARES, error_rate=1.0)
    guess = re.search(r"<hypothesis>(\d) moves</hypothesis>", chain)
    assert guess and guess[1] in "124"
    assert chain.replace(guess[0], "") == (
        "<sub-task>get a on b</sub-task><reclarify>goal a on b on table</reclarify>"
        "<thinking>pick-up a\nstack a b\nnow b, a</thinking><reflection>not a on table</reflection>"
        "<thinking>pick-up a\nstack a b\nnow a on b</thinking>"
        "<double-check>now a on b</double-check><answer>pick-up a\nstack a b</answer>"
    )


@pytest.mark.parametrize(
    ("text", "moves_per_node", "reflections"),
    [
        ("now a on b\ngoal b on a", 2, {"not a on b", "not b on table"}),  # each has only one wrong place
        ("now a on b, c\ngoal clear b", 1, {"not hold c"}),
    ],
)
def test_a_reflection_names_a_place_that_is_wrong(text: str, moves_per_node: int, reflections: set[str]) -> None:
    shares = NO_SHARES.model_copy(update={"reflection": 1.0})
    chains = [chain_of(text, shares=shares, moves_per_node=moves_per_node, rng=random.Random(i)) for i in range(20)]
    texts = {node for chain in chains for node in re.findall(r"<reflection>(.*?)</reflection>", chain)}
    assert texts >= reflections


def test_a_silent_error_stays_in_the_notes_and_in_the_plan() -> None:
    # "b, a" is the only wrong state that can be noted. The plan continues from there with the same two moves.
    chain = chain_of("now a, b\ngoal a on b", error_rate=1.0)
    assert chain == (
        "<thinking>pick-up a\nstack a b\nnow b, a</thinking><thinking>pick-up a\nstack a b\nnow a on b</thinking>"
        "<answer>pick-up a\nstack a b\npick-up a\nstack a b</answer>"
    )


def test_a_move_without_an_alternative_is_noted_right() -> None:
    # With one tower and an empty hand, taking a is the only move.
    chain = chain_of("now a on b\ngoal clear b", moves_per_node=1, error_rate=1.0)
    assert chain == "<thinking>unstack a b\nnow b, hold a</thinking><answer>unstack a b</answer>"


def test_an_unreachable_goal_is_an_error() -> None:
    with pytest.raises(ValueError, match="no plan reaches a on b, c on b from now a, b, c"):
        take_notes(*read_problem("now a, b, c\ngoal a on b, c on b"), 2, None, silent=True)


@given(seed=st.integers(0, 10**6), moves_per_node=st.integers(1, 3), blocks=st.integers(3, 5))
@settings(max_examples=60, deadline=None)
def test_chains_without_silent_errors_are_right_and_note_true_states(
    seed: int, moves_per_node: int, blocks: int
) -> None:
    fields = {"error_rate": 0, "shares": {"reflection": 0.5}, "min_blocks": blocks, "max_blocks": blocks}
    task = make_task(moves_per_node=moves_per_node, **fields)
    problem, chain = task.demonstration(seed, random.Random(seed))
    assert problem == task.problem("train", seed)
    verdict = task.verify(problem, chain)
    assert (verdict.outcome, verdict.reward, verdict.answered) == ("ok", 1.0, True)
    # Without a node that a reflection takes back, the moves are the plan and lead to each noted state.
    accepted = re.sub(r"<thinking>[^<]*</thinking><reflection>[^<]*</reflection>", "", chain)
    state, goal = read_problem(problem.question)
    moves = []
    for node in re.findall(r"<thinking>(.*?)</thinking>", accepted, re.DOTALL):
        *lines, now = node.split("\n")
        moves += lines
        noted = read_problem(f"{now}\ngoal clear a")[0]
        assert check_plan(state, facts(noted), read_plan("\n".join(moves))) == ""
    assert "\n".join(moves) == tags.final_answer(chain)
    assert len(moves) == len(shortest_plan(state, goal) or ())


@pytest.mark.heavy
def test_shares_of_the_tags_and_errors_are_met() -> None:
    shares = {"sub_task": 0.3, "hypothesis": 0.1, "double_check": 0.2, "reflection": 0.15, "reclarify": 0.05}
    task, rng, rows = make_task(shares=shares, error_rate=0.4), random.Random(0), 2000
    demonstrations = [task.demonstration(i, rng) for i in range(rows)]

    def near(count: int, share: float) -> bool:
        # Four standard deviations of a binomial share: 4 sqrt(p (1-p) / n).
        return abs(count / rows - share) < 4 * math.sqrt(share * (1 - share) / rows)

    for name, share in shares.items():
        assert near(sum(f"<{name.replace('_', '-')}>" in chain for _, chain in demonstrations), share), name
    # Of the chains, 0.85 have no reflection, and 0.4 of these note a wrong state: 0.34. Most of their plans are longer.
    longest = sum(
        len(read_plan(tags.final_answer(chain) or "")) > len(shortest_plan(*read_problem(problem.question)) or ())
        for problem, chain in demonstrations
    )
    wrong = sum(not task.verify(problem, chain).reward for problem, chain in demonstrations)
    assert 0.8 * 0.34 < wrong / rows < 0.36 and longest / rows > 0.2
    assert all("<thinking>" in chain and chain.count("<answer>") == 1 for _, chain in demonstrations)


def test_every_text_is_made_of_the_vocabulary() -> None:
    # Each piece is a token of a from-scratch tokenizer. Other text would become bytes.
    task = make_task(min_blocks=3, max_blocks=5, moves_per_node=1, shares=ALL_SHARES.model_dump(), error_rate=0.5)
    pieces = sorted(map(re.escape, task.vocabulary()), key=len, reverse=True)
    pattern = re.compile(f"(?:{'|'.join(pieces)})*")
    assert len(task.vocabulary()) == len(set(task.vocabulary()))
    for index in range(100):
        problem, chain = task.demonstration(index, random.Random(index))
        assert pattern.fullmatch(problem.question) and pattern.fullmatch(chain), chain


RIGHT = "unstack a b\nput-down a\npick-up b\nstack b a"


@pytest.mark.parametrize(
    ("completion", "outcome", "answered", "detail"),
    [
        (f"<thinking>now b</thinking><answer>{RIGHT}</answer>", "ok", True, ""),
        (f"<answer>\n{RIGHT}\n</answer>\n", "ok", True, ""),
        # A plan that is longer than necessary is right.
        (f"<answer>pick-up c\nput-down c\n{RIGHT}</answer>", "ok", True, ""),
        ("<answer>unstack a b\nput-down a</answer>", "wrong", True, "goal not reached: b is not on a"),
        ("<answer>pick-up b\nstack b a</answer>", "wrong", True, "move 1 (pick-up b): b is not clear"),
        ("<answer>unstack a b\nstack a d</answer>", "wrong", True, "move 2 (stack a d): no block d"),
        ("<answer></answer>", "wrong", False, "no moves"),
        ("<answer>b on a</answer>", "wrong", False, "move 1 (b on a): expected pick-up, put-down, stack, unstack"),
        (f"<answer>{RIGHT} c</answer>", "wrong", False, "move 4 (stack b a c): stack names 2 blocks, found 3"),
        (RIGHT, "wrong", False, "no final <answer>"),
        ("", "wrong", False, "no final <answer>"),
        (f"<answer>{RIGHT}", "wrong", False, "no final <answer>: it is not closed"),
        (f"<answer>{RIGHT}</answer> or so", "wrong", False, "no final <answer>: text follows it"),
        (f"<answer>c</answer><answer>{RIGHT}</answer>", "wrong", False, "no final <answer>: more than one <answer>"),
    ],
)
def test_verify(completion: str, outcome: str, answered: bool, detail: str) -> None:
    verdict = make_task().verify(problem_of("now a on b, c\ngoal b on a"), completion)
    assert (verdict.outcome, verdict.answered, verdict.detail) == (outcome, answered, detail)
    assert verdict.reward == float(outcome == "ok")


def as_pddl(question: str) -> str:
    """Return a question as PDDL, with its own block names in alphabetical order."""
    state, goal = read_problem(question)
    objects = sorted({fact[1] for fact in facts(state) if len(fact) > 1})

    def written(fact_set: frozenset[tuple[str, ...]]) -> str:
        return " ".join(f"({' '.join(fact)})" for fact in sorted(fact_set))

    return (
        f"(define (problem p) (:objects {' '.join(objects)}) (:init {written(facts(state))}) "
        f"(:goal (and {written(goal)})))"
    )


def test_a_problem_file_is_the_held_out_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The file has problems that the train split would have without it. With 3 letters all blocks keep their names.
    file_questions = {make_task(alphabet="abc").problem("train", i).question for i in range(30)}
    rows = [{"instance": number, "pddl": as_pddl(question)} for number, question in enumerate(sorted(file_questions))]
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("PROBLEMS", str(tmp_path))
    task = make_task(alphabet="abc", problems_path="${PROBLEMS}/problems.jsonl")
    assert task.size("held_out") == len(file_questions) and task.size("train") is None
    assert task.problem("held_out", 7).problem_id == "7"
    held_out = {name_of(task.problem("held_out", i).question) for i in range(len(file_questions))}
    assert held_out == {name_of(question) for question in file_questions}
    assert not held_out & {name_of(task.problem("train", i).question) for i in range(300)}
    digest = task.digest()
    assert make_task().size("held_out") is None and make_task().digest() == "" and len(digest) == 64
    path.write_text("\n".join(map(json.dumps, rows[1:])))
    assert make_task(alphabet="abc", problems_path=str(path)).digest() != digest


def test_problems_path_errors_name_the_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ConfigError, match=r"task\.problems_path.*NOT_SET is not set"):
        make_task(problems_path="${NOT_SET}/x.jsonl").size("held_out")
    with pytest.raises(DataError, match=r"task\.problems_path .*missing\.jsonl: no such file"):
        make_task(problems_path=str(tmp_path / "missing.jsonl")).size("held_out")


@pytest.mark.heavy
def test_a_split_without_problems_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlsys.tasks.blocksworld.task.is_held_out", lambda name: True)
    with pytest.raises(ConfigError, match=r"no train arrangement among 10000 drawn.*3 to 3 blocks"):
        make_task(alphabet="abc").problem("train", 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_blocks": 4}, "max_blocks 3 is below min_blocks 4"),
        ({"alphabet": "ab"}, r"alphabet 'ab': expected at least max_blocks \(3\) letters, all different"),
        ({"alphabet": "abca"}, r"alphabet 'abca': expected"),
    ],
)
def test_config_errors(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlocksworldConfig.model_validate(fields)


def test_build_task_takes_the_config_section() -> None:
    assert isinstance(build_task(BlocksworldConfig(), 0), BlocksworldTask)


@pytest.mark.heavy
@pytest.mark.skipif("RLSYS_DATA" not in os.environ, reason="RLSYS_DATA does not name the data folder")
def test_planbench_is_a_held_out_split() -> None:
    fields = {"min_blocks": 4, "max_blocks": 5, "problems_path": "${RLSYS_DATA}/planbench_blocksworld.jsonl"}
    task = make_task(alphabet="abcde", **fields)
    assert task.size("held_out") == 501
    held_out = {name_of(task.problem("held_out", i).question) for i in range(501)}
    without = make_task(alphabet="abcde", min_blocks=4, max_blocks=5)
    # Without the file, the train split would have some of its problems.
    assert held_out & {name_of(without.problem("train", i).question) for i in range(3000)}
    assert not held_out & {name_of(task.problem("train", i).question) for i in range(3000)}
    for index in (0, 250, 500):
        problem = task.problem("held_out", index)
        plan = chain_of(problem.question)
        assert task.verify(problem, plan).reward == 1.0


def test_problem_text_of_a_generated_problem_reads_back() -> None:
    for index in range(50):
        question = make_task(max_blocks=5).problem("held_out", index).question
        assert problem_text(*read_problem(question)) == question
