"""Problem files: their content, and errors that name the defect."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlsys.errors import DataError
from rlsys.tasks.blocksworld.blocks import check_plan, shortest_plan
from rlsys.tasks.blocksworld.pddl import read_pddl
from rlsys.tasks.blocksworld.task import load_problems
from rlsys.tasks.blocksworld.text import problem_text, read_problem

INIT = "(handempty) (on red blue) (ontable blue) (ontable b3) (clear red) (clear b3)"


def pddl(objects: str = "red blue b3", init: str = INIT, goal: str = "(and (on b3 red))") -> str:
    return f"(define (problem p)\n(:domain blocksworld-4ops)\n(:objects {objects})\n(:init {init})\n(:goal {goal}))"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "now a on b, c\ngoal c on a"),
        # The order of the objects decides the names of the blocks and the order of the towers.
        ({"objects": "b3 blue red"}, "now a, c on b\ngoal a on c"),
        ({"goal": "(on b3 red)"}, "now a on b, c\ngoal c on a"),
        (
            {"goal": "(and (on b3 red) (on red blue) (ontable blue) (clear b3))"},
            "now a on b, c\ngoal c on a on b on table, clear c",
        ),
        ({"init": "(holding b3) (on red blue) (ontable blue) (clear red)"}, "now a on b, hold c\ngoal c on a"),
        ({"init": INIT.upper() + " ; (on b3 red)\n"}, "now a on b, c\ngoal c on a"),
    ],
)
def test_read_pddl(fields: dict[str, str], expected: str) -> None:
    assert problem_text(*read_pddl(pddl(**fields), "abc")) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one (define ...), found "),
        ("hello", "expected one (define ...), found 'hello'"),
        (pddl() + pddl(), "expected one (define ...)"),
        (pddl()[:-1], "a parenthesis is never closed"),
        (pddl() + ")", "a parenthesis is closed that was never opened"),
        (pddl().replace(":goal", ":aim"), ":goal is missing"),
        (pddl(goal="(" * 3000 + ")" * 3000), "expected parentheses at most 16 deep, found more"),
        (pddl(objects="(" * 14 + ")" * 14), ":objects: expected different names, found ("),  # 16 deep
        (pddl(objects="(" * 15 + ")" * 15), "expected parentheses at most 16 deep, found more"),
        (pddl().replace("(:domain blocksworld-4ops)", "(:init)"), ":init is given twice"),
        (pddl(objects=""), ":objects: expected different names, found ()"),
        (pddl(objects="red red b3"), ":objects: expected different names, found (red red b3)"),
        (pddl(objects="red blue b3 b4"), ":objects: 4 blocks, more than the 3 letters of task.alphabet"),
        (pddl(goal="(and)"), ":goal: expected at least one fact, found none"),
        (pddl(goal=""), ":goal: expected at least one fact, found none"),
        (pddl(goal="(or (on red blue))"), ":goal: expected (on x y), (ontable x), (clear x), found (or (on red blue))"),
        (pddl(goal="(and (not (on red blue)))"), "found (not (on red blue))"),
        (pddl(goal="(and (holding red))"), "found (holding red)"),
        (pddl(goal="(and (on red))"), ":goal: expected (on x y), (ontable x), (clear x), found (on red)"),
        (pddl(goal="(and (on red green))"), ":goal: (on red green): green is not among :objects"),
        (pddl(goal="(and (on red (blue)))"), "(blue) is not among :objects"),
        (pddl(goal="(and (on red blue) (on blue red))"), ":goal: its facts about block blue contradict one another"),
        (pddl(goal="(and (on red red))"), "about block red contradict"),
        (pddl(goal="(and (on red blue) (on red b3))"), "about block red contradict"),
        (pddl(goal="(and (on red blue) (ontable red))"), "about block red contradict"),
        (pddl(goal="(and (on red blue) (on b3 blue))"), "about block blue contradict"),
        (pddl(goal="(and (on red blue) (clear blue))"), "about block blue contradict"),
        (pddl(goal="(and (on red blue) (on blue b3) (on b3 red))"), "contradict"),
        (pddl(init=INIT.replace("(on red blue)", "")), ":init: expected one place for block red, found 0"),
        (pddl(init=INIT + "(ontable red)"), ":init: expected one place for block red, found 2"),
        (pddl(init=INIT + "(holding b3)"), ":init: expected one place for block b3, found 2"),
        (pddl(init=INIT.replace("(clear b3)", "")), ":init: no (clear b3) contradicts the other facts"),
        (pddl(init=INIT.replace("(handempty)", "")), ":init: no (handempty) contradicts the other facts"),
        (pddl(init=INIT + "(clear blue)"), ":init: (clear blue) contradicts the other facts"),
        (pddl(init="(on red blue) (on blue red) (ontable b3) (clear b3) (handempty)"), "place for block red, found 0"),
        (pddl(init="(ontable blue) (on red blue) (on blue red)"), "expected one place for block red, found 2"),
        (pddl(init=INIT + "(shiny red)"), ":init: expected (on x y), (ontable x), (clear x), (holding x), (handempty)"),
    ],
)  # fmt: skip
def test_the_defect_of_a_problem_is_named(text: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_pddl(text, "abc")
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "row 2: not JSON"),
        (
            '{"instance": 2}',
            "row 2: expected {instance: number or text, pddl: text}, found instance int '2', pddl null",
        ),
        ('{"instance": 2, "pddl": "x", "pddl": "y"}', "row 2: column pddl: expected it once in a row, found it twice"),
        (
            '{"instance": 2, "pddl": "\\udfff"}',
            "pddl: text}, found instance int '2', pddl half a surrogate pair in '\\udfff'",
        ),
        (
            '{"instance": "\\udfff", "pddl": "x"}',
            "pddl: text}, found instance half a surrogate pair in '\\udfff', pddl str 'x'",
        ),
        (json.dumps({"instance": 2, "pddl": "(" * 9999}), "row 2 (instance 2): expected parentheses at most 16 deep"),
        ('{"instance": null, "pddl": "x"}', "row 2: expected {instance"),
        ('{"instance": true, "pddl": "x"}', "row 2: expected {instance"),
        (json.dumps({"instance": 9, "pddl": pddl(goal="")}), "row 2 (instance 9): :goal: expected at least one fact"),
        # INIT meets this goal, so an empty plan would solve the problem.
        (
            json.dumps({"instance": 9, "pddl": pddl(goal="(and (on red blue) (clear b3))")}),
            "row 2 (instance 9): expected a goal that takes a move, found one that :init meets",
        ),
        (json.dumps({"instance": "1", "pddl": pddl()}), "two rows have the instance '1'; expected one each"),
    ],
)
def test_a_bad_row_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"instance": 1, "pddl": pddl()}) + "\n" + line + "\n")
    with pytest.raises(DataError) as caught:
        load_problems(str(path), "abc")
    assert caught.value.message.startswith(f"task.problems_path {path}: ")
    assert message in caught.value.message


@pytest.mark.heavy
@pytest.mark.skipif("RLSYS_DATA" not in os.environ, reason="RLSYS_DATA does not name the data folder")
def test_every_planbench_instance_is_solved() -> None:
    problems = load_problems("${RLSYS_DATA}/planbench_blocksworld.jsonl", "abcde")
    assert len(problems) == 501
    for problem in problems:
        state, goal = read_problem(problem.question)
        plan = shortest_plan(state, goal)
        assert plan and check_plan(state, goal, plan) == "", problem
        # The plan is shortest, so it fails with one move less.
        assert check_plan(state, goal, plan[:-1]).startswith("goal not reached"), problem
    # By hand from instances 1 and 3 of the file: b on c, goal c on b; d on a, c on d, b on c.
    assert problems[0].question == "now a, b on c, d\ngoal c on b"
    assert problems[2].question == "now b on c on d on a\ngoal d on a on c"
