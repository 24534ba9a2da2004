"""Trees as lines of JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rlsys.errors import DataError
from rlsys.search.tree_json import parse_line, read_trees, tree_line
from rlsys.trees import Defect, Role, StopReason, ThoughtNode, Tree, TreeFailure
from rlsys.types import FinishReason, Message, Outcome, Verdict, VersionSpan


def assert_same_tree(actual: object, expected: object) -> None:
    """Check equality of values and array dtypes. `==` of dataclasses with arrays has no truth value."""
    if isinstance(expected, np.ndarray):
        assert isinstance(actual, np.ndarray) and actual.dtype == expected.dtype
        assert actual.tobytes() == expected.tobytes()  # distinguishes 0.0 and -0.0
    elif dataclasses.is_dataclass(expected):
        assert type(actual) is type(expected)
        for field in dataclasses.fields(expected):
            assert_same_tree(getattr(actual, field.name), getattr(expected, field.name))
    elif isinstance(expected, Mapping):
        assert isinstance(actual, Mapping) and set(actual) == set(expected)
        for name in expected:
            assert_same_tree(actual[name], expected[name])
    elif isinstance(expected, tuple):
        assert isinstance(actual, tuple) and len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same_tree(one, other)
    else:
        assert type(actual) is type(expected) and actual == expected


def start() -> ThoughtNode:
    none = np.zeros(0, np.int32)
    return ThoughtNode(parent=-1, type="start", text="", token_ids=none, forced=0, logprobs=none.astype(np.float32))


def answer_node(**changes: Any) -> ThoughtNode:
    node = ThoughtNode(
        parent=0,
        type="answer",
        text="<answer>2</answer>",
        token_ids=np.array([5, 9, 6], np.int32),
        forced=1,
        logprobs=np.array([0, -0.1, -2.5e-7], np.float32),
        finish_reason="stop",
        versions=(VersionSpan(start=1, version=3),),
        visits=1,
        total=1.0,
        verdict=Verdict(outcome="ok", reward=1.0, answered=True),
        scored=0,
        scored_tokens=2,
    )
    return dataclasses.replace(node, **changes)


def small_tree(prompt_id: str = "train-0", **changes: Any) -> Tree:
    tree = Tree(
        prompt_id=prompt_id,
        question="how many b in abb?",
        answer="2",
        pattern="a",
        tokenizers={"policy": "d1"},
        models={"policy": "m1"},
        prompt_token_ids={"policy": np.array([1, 2], np.int32)},
        nodes=(start(), answer_node()),
        stop="correct",
        simulations=1,
        calls=1,
        tokens=2,
        counts={"merged": 0},
    )
    return dataclasses.replace(tree, **changes)


def changed(**values: object) -> str:
    """Return the line of the small tree with other values. A name with the prefix node_ is a field of node 1."""
    line = json.loads(tree_line(small_tree()))
    for name, value in values.items():
        (line["nodes"][1] if name.startswith("node_") else line)[name.removeprefix("node_")] = value
    return json.dumps(line)


counts = st.integers(0, 10**9)
finite = st.floats(allow_nan=False, allow_infinity=False)
token_arrays = arrays.arrays(np.int32, st.integers(0, 5), elements=st.integers(0, 2**31 - 1))


@st.composite
def nodes(draw: st.DrawFn, number: int) -> ThoughtNode:
    ids = draw(token_arrays)
    floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
    return ThoughtNode(
        parent=draw(st.integers(0, number - 1)),
        type=draw(st.text(max_size=5)),
        text=draw(st.text(max_size=9)),
        token_ids=ids,
        forced=draw(st.integers(0, len(ids))),
        logprobs=draw(arrays.arrays(np.float32, len(ids), elements=floats)),
        spill=draw(st.text(max_size=2)),
        writer=draw(st.sampled_from(get_args(Role))),
        finish_reason=draw(st.none() | st.sampled_from(get_args(FinishReason))),
        versions=tuple(draw(st.lists(st.builds(VersionSpan, start=counts, version=counts), max_size=2))),
        defect=draw(st.none() | st.sampled_from(get_args(Defect))),
        backtrack=draw(st.booleans()),
        samples=draw(counts),
        visits=draw(counts),
        total=draw(finite),
        verdict=draw(
            st.none()
            | st.builds(
                Verdict,
                outcome=st.sampled_from(get_args(Outcome)),
                reward=finite,
                answered=st.booleans(),
                detail=st.text(max_size=5),
            )
        ),
        scored=draw(st.integers(-1, 99)),
        scored_tokens=draw(counts),
        estimate=draw(st.none() | finite),
    )


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    return Tree(
        prompt_id=draw(st.text(max_size=5)),
        question=draw(st.text(max_size=20)),
        answer=draw(st.text(max_size=5)),
        pattern=draw(st.text(max_size=3)),
        tokenizers=draw(st.dictionaries(st.sampled_from(get_args(Role)), st.text(max_size=4))),
        models=draw(st.dictionaries(st.sampled_from(get_args(Role)), st.text(max_size=4))),
        prompt_token_ids=draw(st.dictionaries(st.sampled_from(get_args(Role)), token_arrays)),
        nodes=(start(), *(draw(nodes(number)) for number in range(1, draw(st.integers(1, 5))))),
        stop=draw(st.sampled_from(get_args(StopReason))),
        simulations=draw(counts),
        calls=draw(counts),
        tokens=draw(counts),
        counts=draw(st.dictionaries(st.text(max_size=4), counts, max_size=3)),
    )


@settings(deadline=None)
@given(tree=trees())
def test_reading_gives_the_tree_back(tree: Tree) -> None:
    line = tree_line(tree)
    assert_same_tree(parse_line(line), tree)
    assert tree_line(parse_line(line)) == line


@given(failure=st.builds(TreeFailure, prompt_id=st.text(), question=st.text(), answer=st.text(), reason=st.text()))
def test_reading_gives_a_failure_back(failure: TreeFailure) -> None:
    assert_same_tree(parse_line(tree_line(failure)), failure)


def test_a_question_of_messages_is_read_back() -> None:
    question = (Message(role="system", content="s"), Message(role="user", content="q"))
    failure = TreeFailure(prompt_id="p", question=question, answer="1", reason="r")
    assert parse_line(tree_line(failure)) == failure
    assert '"question":[{"role":"system","content":"s"},' in tree_line(failure)
    with pytest.raises(DataError, match="question"):
        parse_line(tree_line(failure).replace('"content":"q"', '"content":3'))


def test_a_line_leaves_out_the_tokens_of_a_failure() -> None:
    one, other = (TreeFailure(prompt_id="p", question="q", answer="1", reason="no", tokens=n) for n in (0, 7))
    assert tree_line(one) == tree_line(other) and one == other


@given(text=st.text())
def test_a_line_is_one_line_for_every_reader(text: str) -> None:
    assert len(tree_line(small_tree(question=text + "\u2028\n")).splitlines()) == 1


def test_a_line_reads_as_plain_json() -> None:
    line = tree_line(small_tree())
    assert line.startswith('{"format":1,"prompt_id":"train-0","question":"how many b in abb?","answer":"2",')
    node = json.loads(line)["nodes"][1]
    assert node["text"] == "<answer>2</answer>" and node["token_ids"] == [5, 9, 6]
    # The float32 nearest to -0.1 is -0.100000001490116..., and -0.1 is the shortest decimal that rounds to it.
    assert '"logprobs":[0.0,-0.1,-2.5e-07]' in line
    assert node["versions"] == [{"start": 1, "version": 3}]
    assert node["verdict"] == {"outcome": "ok", "reward": 1.0, "answered": True, "detail": ""}


def test_the_order_of_a_mapping_has_no_influence() -> None:
    one, other = small_tree(counts={"a": 1, "b": 2}), small_tree(counts={"b": 2, "a": 1})
    assert tree_line(one) == tree_line(other)


def test_a_number_that_is_not_finite_is_not_written() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        tree_line(small_tree(nodes=(start(), answer_node(logprobs=np.array([0, np.nan, 0], np.float32)))))


def test_lines_from_before_estimates_are_read() -> None:
    assert "estimate" not in tree_line(small_tree())
    line = changed(node_estimate=0.25)
    assert line == tree_line(small_tree(nodes=(start(), answer_node(estimate=0.25)))).replace(",", ", ").replace(
        ":", ": "
    )
    read = parse_line(line)
    assert isinstance(read, Tree) and [node.estimate for node in read.nodes] == [None, 0.25]


def test_every_field_is_required() -> None:
    whole = json.loads(tree_line(small_tree()))
    for name in set(whole) - {"format"}:
        with pytest.raises(DataError, match=f"^tree: {name}: expected this key, found none$"):
            parse_line(json.dumps({key: value for key, value in whole.items() if key != name}))
    for name in whole["nodes"][1]:
        node = {key: value for key, value in whole["nodes"][1].items() if key != name}
        with pytest.raises(DataError, match=rf"^tree: nodes\.1\.{name}: expected this key, found none$"):
            parse_line(json.dumps({**whole, "nodes": [whole["nodes"][0], node]}))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "Expecting value"),
        ("[1]", r"expected an object with format 1, found \[1\]"),
        ("{}", "expected an object with format 1, found None"),
        ('{"format":1,"format":1}', "expected every key once, found format twice"),
        ("[" * 100_000, "expected a tree, found JSON that is nested too deeply"),
        (changed(format=2), "expected an object with format 1, found 2"),
        (changed(extra=1), "extra: expected no such key"),
        (changed(node_extra=1), r"nodes\.1\.extra: expected no such key"),
        (changed(tokens="2"), "tokens: expected a whole number, found '2'"),
        (changed(tokens=True), "tokens: expected a whole number, found True"),
        (changed(calls=1.0), "calls: expected a whole number, found 1.0"),
        (changed(stop="bored"), "stop: .*'exhausted', found 'bored'"),
        (changed(nodes=[]), "nodes: .* at least 1 item"),
        (changed(prompt_token_ids={"policy": [2**31]}), r"prompt_token_ids\.policy\.0: .*, found 2147483648"),
        (changed(reason="why"), "pattern: expected no such key"),
        (changed(node_parent=1), r"nodes\.1\.parent: expected 0 to 0, found 1"),
        (changed(node_parent=-1), r"nodes\.1\.parent: expected 0 to 0, found -1"),
        (changed(node_token_ids=[5, 9]), r"nodes\.1\.logprobs: expected one for each of 2 token_ids, found 3"),
        (changed(node_forced=4), r"nodes\.1\.forced: expected at most the 3 token_ids, found 4"),
        (changed(node_logprobs=[0, -1, -1e39]), r"nodes\.1\.logprobs: expected numbers of float32"),
        (changed(node_versions=[{"start": -1, "version": 0}]), r"nodes\.1\.versions: expected starts of 0 or more"),
        (changed(node_logprobs=[0, -1, float("nan")]), "expected finite numbers, found NaN"),
        (changed(node_total=None), r"nodes\.1\.total: expected a number, found None"),
        (changed().replace('"parent": -1', '"parent": 0'), r"nodes\.0\.parent: expected -1, found 0"),
    ],
)
def test_a_line_that_is_not_a_tree_is_refused(line: str, message: str) -> None:
    with pytest.raises(DataError, match=f"^tree: {message}"):
        parse_line(line)


def test_the_message_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "00000.jsonl"
    path.write_text(f"{tree_line(small_tree())}\n{changed(tokens=-1)}\n")
    trees_of_file = read_trees(path)
    assert_same_tree(next(trees_of_file), small_tree())
    with pytest.raises(DataError, match=r"00000\.jsonl, line 2: tokens: expected at least 0, found -1"):
        next(trees_of_file)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "00000.jsonl"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"00000\.jsonl: cannot be read: 'utf-8'"):
        list(read_trees(path))
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        list(read_trees(tmp_path / "none.jsonl"))


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "00000.jsonl"
    path.write_text(f"{tree_line(small_tree())}\n{tree_line(small_tree())}")
    with pytest.raises(DataError, match=r"00000\.jsonl, line 2: expected a line end, found the file cut off"):
        list(read_trees(path))
