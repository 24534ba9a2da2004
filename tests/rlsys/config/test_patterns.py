"""The shipped node types and tables, and the errors for tables that cannot be searched."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from rlsys.config.files import load_config, parse_config
from rlsys.config.keys import all_keys
from rlsys.config.patterns import NODE_TYPES, TABLES, resolve
from rlsys.config.search import SearchConfig
from rlsys.errors import ConfigError
from rlsys.tasks.tags import TAGS

# start -> a -> answer, to which the tests add rows.
NODES: dict[str, Any] = {
    "a": {"tag": "a"},
    "b": {"tag": "b"},
    "fixed": {"tag": "fixed", "prefixes": ["Wait!"], "writer": "nobody"},
}
CHILDREN = {"start": {"a": 2}, "a": {"answer": 1}}


def search(children: dict[str, Any], nodes: dict[str, Any] | None = None, **more: Any) -> SearchConfig:
    after_wrong = more.pop("after_wrong", {})
    table = {"children": children, "after_wrong": after_wrong}
    return SearchConfig.model_validate(
        {"nodes": {**NODES, **(nodes or {})}, "tables": {"t": table}, "patterns": ["t"], **more}
    )


def refused(config: SearchConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(config)
    return str(caught.value)


def test_every_shipped_table_is_sound() -> None:
    patterns = resolve(SearchConfig(patterns=tuple(TABLES)))
    assert list(patterns) == ["a", "b", "c", "d", "letter_count"]
    for pattern in patterns.values():
        assert not any(pattern.types[name].terminal for name in pattern.children if name != "start")
        assert set(pattern.types) == {name for row in pattern.children.values() for name in row} | {
            name for row in pattern.after_wrong.values() for name in row
        }
        assert pattern.children["start"] == {"sub_task": 2}  # every table of the paper begins with sub-tasks


def test_the_papers_tables() -> None:
    # Figure 2: what follows thinking, and what follows a wrong answer.
    patterns = resolve(SearchConfig(patterns=("a", "b", "c", "d")))
    assert {name: set(p.children["thinking"]) for name, p in patterns.items()} == {
        "a": {"thinking", "answer"},
        "b": {"thinking", "answer"},
        "c": {"thinking", "answer", "double_check"},
        "d": {"thinking", "answer"},
    }
    assert {name: p.after_wrong for name, p in patterns.items()} == {
        "a": {"thinking": {"reflection": 1}},
        "b": {"thinking": {"thinking": 1}},
        "c": {},
        "d": {"thinking": {"reclarify": 1}},
    }
    assert (
        set(patterns["b"].children["sub_task"]) == set(patterns["d"].children["sub_task"]) == {"thinking", "hypothesis"}
    )
    assert set(patterns["c"].children["double_check"]) == {"thinking", "answer"}


def test_every_row_of_the_authors_table_is_reached() -> None:
    pattern = resolve(SearchConfig(patterns=("letter_count",)))["letter_count"]
    assert "hypothesis" not in pattern.types
    assert pattern.children == {
        "start": {"sub_task": 2},
        "sub_task": {"thinking": 2},
        "thinking": {"double_check": 2, "thinking": 2},
        "double_check": {"answer": 1},
        "reflection": {"thinking_from_scratch": 2},
        "thinking_from_scratch": {"thinking": 2},
    }
    assert pattern.after_wrong == {"double_check": {"reflection": 1}}


def test_the_shipped_types() -> None:
    assert [NODE_TYPES[name].tag for name in NODE_TYPES] == [*TAGS, "thinking-from-scratch"]
    assert {name for name, node in NODE_TYPES.items() if node.terminal} == {"answer"}
    assert {name: node.writer for name, node in NODE_TYPES.items() if node.writer != "model"} == {
        "double_check": "reviewer",
        "reflection": "nobody",
        "thinking_from_scratch": "reviewer",
    }


def test_a_type_of_the_user_takes_the_place_of_the_shipped_one() -> None:
    config = search(CHILDREN, {"answer": {"tag": "final", "terminal": True}})
    assert resolve(config)["t"].types["answer"].tag == "final"
    assert resolve(config)["t"].types["answer"].prefixes == ()


def test_a_table_of_the_user_takes_the_place_of_the_shipped_one() -> None:
    config = SearchConfig.model_validate({"tables": {"a": {"children": {"start": {"answer": 3}}}}})
    pattern = resolve(config)["a"]
    assert (pattern.name, pattern.children, pattern.after_wrong) == ("a", {"start": {"answer": 3}}, {})


def test_an_empty_row_is_left_out() -> None:
    assert resolve(search({**CHILDREN, "answer": {}}))["t"].children == CHILDREN


def test_a_type_that_only_a_wrong_answer_leads_to_is_reached() -> None:
    config = search({**CHILDREN, "fixed": {"b": 1}, "b": {"answer": 1}}, after_wrong={"a": {"fixed": 1}})
    assert set(resolve(config)["t"].types) == {"a", "answer", "fixed", "b"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"children": {**CHILDREN, "b": {"answer": 1}}},
            "search.tables.t.children.b: no row that can be reached from `start` leads to 'b'; take this row out",
        ),
        (  # neither row of this pair is reached, though each leads to the other
            {"children": {**CHILDREN, "b": {"thinking": 1}, "thinking": {"b": 1, "answer": 1}}},
            "search.tables.t.children.b: no row",
        ),
        (
            {"children": CHILDREN, "after_wrong": {"b": {"fixed": 1}}},
            "search.tables.t.after_wrong.b: no row",
        ),
        (
            {"children": {"start": {"a": 1}, "a": {"b": 1}}},
            "search.tables.t.children.start: no way leads from 'start' to a terminal type; give it a child that does",
        ),
        (
            {"children": {"start": {"a": 1, "b": 1}, "a": {"answer": 1}}},
            "search.tables.t.children.b: no way leads from 'b' to a terminal type",
        ),
        (  # a child after a wrong answer must lead to an answer too
            {"children": CHILDREN, "after_wrong": {"a": {"fixed": 1}}},
            "search.tables.t.children.fixed: no way leads from 'fixed' to a terminal type",
        ),
        (  # an answer that only a wrong answer leads to is never reached
            {"children": {"start": {"a": 1}, "a": {"a": 1}}, "after_wrong": {"a": {"answer": 1}}},
            "search.tables.t.children.start: no way leads from 'start'",
        ),
        (
            {"children": {**CHILDREN, "answer": {"a": 1}}},
            "search.tables.t.children.answer: 'answer' is terminal, and nothing follows an answer; take this row out",
        ),
        ({"children": {"a": {"answer": 1}}}, "search.tables.t.children: expected a row `start`"),
        ({"children": {"start": {}, "a": {"answer": 1}}}, "search.tables.t.children: expected a row `start`"),
        (
            {"children": {**CHILDREN, "a": {"answr": 1}}},
            "search.tables.t.children.a: unknown node type 'answr'; did you mean answer? known: a, answer, b, ",
        ),
        (
            {"children": {**CHILDREN, "a": {"enviroment": 1}}},
            "search.tables.t.children.a: unknown node type 'enviroment'; did you mean environment? known: a, ",
        ),
        (
            {"children": CHILDREN, "after_wrong": {"a": {"reflexion": 1}}},
            "search.tables.t.after_wrong.a: unknown node type 'reflexion'; did you mean reflection?",
        ),
        (
            {"children": {"start": {"a": 1}, "a": {"answer": 1, "start": 1}}},
            "search.tables.t.children.a: `start` is the prompt and no node type; take it out of this row",
        ),
        (
            {"children": CHILDREN, "after_wrong": {"start": {"a": 1}}},
            "search.tables.t.after_wrong.start: `start` is the prompt and no node type",
        ),
        (
            {"children": CHILDREN, "after_wrong": {"a": {"start": 1}}},
            "search.tables.t.after_wrong.a: `start` is the prompt and no node type",
        ),
        (
            {"children": CHILDREN, "nodes": {"start": {"tag": "start"}}},
            "search.nodes.start: the name of the prompt cannot be that of a node type; rename it",
        ),
        (
            {"children": CHILDREN, "nodes": {"a": {"tag": "a", "writer": "nobody"}}},
            "search.tables.t: nobody writes the node type 'a', so its prefix is its text, and it has none; "
            "set search.nodes.a.prefixes or another writer",
        ),
        (
            {
                "children": CHILDREN,
                "nodes": {"answer": {"tag": "answer", "writer": "nobody", "terminal": True, "prefixes": ["42"]}},
            },
            "search.tables.t: nobody writes the node type 'answer', but it is terminal",
        ),
        (
            {"children": CHILDREN, "nodes": {"a": {"tag": "answer"}}},
            "search.tables.t: the node types 'a' and 'answer' both have the tag 'answer', so they cannot be "
            "told apart; change search.nodes.answer.tag",
        ),
        (
            {"children": CHILDREN, "nodes": {"a": {"tag": "a", "prefixes": ["Well", "Wait!</a>"]}}},
            "search.nodes.a.prefixes: a prefix contains </a>",
        ),
        (
            {"children": CHILDREN, "after_wrong": {"answer": {"a": 1}}},
            "search.tables.t.after_wrong.answer: 'answer' is terminal, and nothing follows an answer; name a type that",
        ),
        (
            {"children": CHILDREN, "max_depth": 1},
            "search.tables.t: its shortest chain has 2 nodes, more than search.max_depth 1",
        ),
        ({"children": CHILDREN, "patterns": ["t", "t"]}, "search.patterns names the table 't' twice"),
        (
            {"children": CHILDREN, "patterns": ["letter-count"]},
            "search.patterns: unknown table 'letter-count'; did you mean letter_count? "
            "known: a, b, c, d, letter_count, t; others are added in search.tables",
        ),
    ],
)
def test_tables_that_cannot_be_searched_are_refused(config: dict[str, Any], expected: str) -> None:
    assert refused(search(**config)).startswith(expected)


@pytest.mark.parametrize(
    ("children", "after_wrong", "loop"),
    [
        ({"start": {"a": 1}, "a": {"a": 1, "answer": 1}}, {}, "a -> a"),
        ({"start": {"a": 1}, "a": {"b": 1, "answer": 1}, "b": {"a": 1}}, {}, "a -> b -> a"),
        # a, wrong answer, fixed, a, wrong answer, ...
        ({**CHILDREN, "fixed": {"a": 1}}, {"a": {"fixed": 1}}, "a -> fixed -> a"),
        (CHILDREN, {"a": {"a": 1}}, "a -> a"),
    ],
)
def test_a_loop_needs_a_depth_limit(children: dict[str, Any], after_wrong: dict[str, Any], loop: str) -> None:
    resolve(search(children, after_wrong=after_wrong, max_depth=4))
    message = refused(search(children, after_wrong=after_wrong, max_depth=None))
    start, _, rest = message.partition("the loop ")
    assert start == "search.tables.t: "
    reported, _, rest = rest.partition(" has no end without a depth limit; ")
    assert rest.startswith("set search.max_depth")
    # A loop has no first node, so compare its steps from any beginning.
    steps, expected = reported.split(" -> "), loop.split(" -> ")
    assert set(pairwise(steps)) == set(pairwise(expected))


def test_without_a_loop_no_depth_limit_is_needed() -> None:
    assert list(resolve(search(CHILDREN, max_depth=None))) == ["t"]


def test_only_tables_in_use_are_checked() -> None:
    assert list(resolve(search({"start": {"nothing": 1}}, patterns=["a", "c"]))) == ["a", "c"]


def test_a_config_with_such_a_table_is_refused() -> None:
    values = {"run": {"dir": "d"}, "model": {"from_scratch": {}}, "task": {"type": "letter_count"}}
    with pytest.raises(ConfigError, match=r"^f: search\.patterns: unknown table 'q'; known: a, b, c, d, letter_count;"):
        parse_config({**values, "search": {"patterns": ["q"]}}, "f")


def test_the_full_name_of_a_table_with_an_unknown_key_is_given() -> None:
    # "letter_count" is also a task.type, which is left out of names; here it must stay.
    values = {"run": {"dir": "d"}, "model": {"from_scratch": {}}, "task": {"type": "letter_count"}}
    table = {"children": {"start": {"answer": 1}}, "after": {}}
    with pytest.raises(ConfigError, match=r"^f: search\.tables\.letter_count\.after: unknown key;"):
        parse_config({**values, "search": {"tables": {"letter_count": table}}}, "f")


def test_the_shipped_config_has_sound_patterns() -> None:
    assert resolve(load_config("configs/quickstart.yaml").search)


def test_the_help_names_what_is_shipped() -> None:
    help_of = {key.name: key.meaning for key in all_keys()}
    assert all(name in help_of["search.nodes"] for name in NODE_TYPES)
    *first, last = TABLES
    assert f"Shipped: {', '.join(first)} (the four of the paper) and {last} " in " ".join(
        help_of["search.patterns"].split()
    )


REPLIES = {"start": {"a": 1}, "a": {"environment": 1}, "environment": {"b": 1, "answer": 1}, "b": {"answer": 1}}


def test_replies_follow_the_end_of_a_turn() -> None:
    pattern = resolve(search(REPLIES))["t"]
    assert (pattern.turn_ends, pattern.ends) == ({"a"}, {"answer"})
    assert "environment" not in pattern.types
    game = resolve(search({"start": {"a": 1}, "a": {"environment": 1}, "environment": {"a": 2}}))["t"]
    assert game.ends == {"environment"}, "a reply alone can end this game"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"a": {"environment": 2}}, "search.tables.t.children.a: a type that ends a turn has the reply as its only"),
        ({"a": {"environment": 1, "b": 1}}, "expected a: {environment: 1}"),
        ({"start": {"environment": 1}}, "search.tables.t.children.start: a type that ends a turn"),
        ({"start": {"a": 1, "b": 1}, "environment": {"a": 1}}, "no way leads from 'a' to a terminal type"),
        ({"a": {"answer": 1}}, "leads to 'environment'"),
    ],
)
def test_tables_with_replies_that_cannot_be_searched(change: dict[str, Any], reason: str) -> None:
    assert reason in refused(search({**REPLIES, **change}))


def test_a_wrong_answer_changes_nothing_between_a_turn_and_its_reply() -> None:
    for row in ({"a": {"fixed": 1}}, {"b": {"environment": 1}}):
        config = search({**REPLIES, "fixed": {"answer": 1}}, after_wrong=row)
        assert "a reply of the environment follows the end of a turn and nothing else" in refused(config)
    resolve(search({**REPLIES, "fixed": {"answer": 1}}, after_wrong={"environment": {"fixed": 1}}))


def test_the_name_of_a_reply_is_taken() -> None:
    assert "the name of a reply of the environment cannot be that of a node type" in refused(
        search(CHILDREN, {"environment": {"tag": "x"}})
    )
