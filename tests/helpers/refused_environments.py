"""Searches beside an environment that `searched_turns_have_replies` refuses, and those that it accepts."""

from __future__ import annotations

SEARCHED = "search.fraction=0.5"
CALLS = [
    SEARCHED,
    "environment.fn=calculator",
    "search.nodes={tool: {tag: tool}, thinking: {tag: thinking}, answer: {tag: answer, terminal: true}}",
    "search.tables={calls: {children: {start: {tool: 1}, tool: {environment: 1}, environment: {thinking: 1, answer: 1},"
    " thinking: {answer: 1}}}}",
    "search.patterns=[calls]",
]
SEARCHED_REFUSED: list[tuple[list[str], str]] = [
    (["environment.fn=calculator", SEARCHED], "is not terminal and ends with '</tool>'"),
    (
        ["task={type: benchmark, name: multi_if}", SEARCHED],
        "environment multi_if replies with messages of the role user",
    ),
    (["task={type: guess}", "stages=[search, sft]"], "is not terminal and ends with '</guess>'"),
    ([*CALLS, "environment.fn=null"], "search.tables.calls: replies of an environment follow tool"),
    ([*CALLS, "environment={fn: calculator, role: user}"], "set environment.role to null, or leave out the search"),
    ([*CALLS, "search.model.path=large"], "search.model: beside an environment the policy alone"),
    ([*CALLS, "search.reviewer.path=large"], "search.reviewer: beside an environment the policy alone"),
    ([*CALLS, "search.value={type: steps}"], "search.value {type: steps} is not for an environment"),
    ([*CALLS, "search.value={type: rollouts}"], "search.value {type: rollouts} is not for an environment"),
    ([*CALLS, "extract.skip=[thinking]"], "extract.skip is not for an environment"),
    (
        [*CALLS, "environment.stop=[</tool>, </thinking>]"],
        "search.tables.calls.children.thinking: calculator answers after '</thinking>'",
    ),
    (
        [*CALLS, "environment.stop=[</tool>, </answer>]"],
        "is not terminal and ends with '</answer>'",
    ),
    (
        [
            *CALLS,
            "environment={fn: tools.py:ask, stop: [</thinking>]}",
            "search.tables.calls.children.thinking={environment: 1}",
        ],
        "search.tables.calls.children.tool: tools.py:ask does not answer after </tool>",
    ),
]
SEARCHED_ACCEPTED = [
    ["environment.fn=calculator"],
    CALLS,
    [*CALLS, "search.value={type: agreement}", "search.backtracking=false", "search.stop.correct=[]"],
    [*CALLS, "search.model.path=large", "search.fraction=0"],
]
