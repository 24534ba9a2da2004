"""The tree store of a run directory: shards, open trees, and kills at every moment."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.errors import ConfigError, DataError
from rlsys.search.store import TreeStore, check_origin
from rlsys.search.tree_json import read_trees, tree_line
from rlsys.trees import ThoughtNode, Tree, TreeFailure

Trees = dict[int, Tree | TreeFailure]


def names(count: int) -> list[str]:
    return [f"p{number}" for number in range(count)]


def tree(number: int) -> Tree | TreeFailure:
    """Return the tree of a number. Every fifth one is a failure."""
    text = {"prompt_id": f"p{number}", "question": f"q{number}", "answer": f"{number}"}
    if number % 5 == 4:
        return TreeFailure(**text, reason="too long")
    none = np.zeros(0, np.int32)
    start = ThoughtNode(parent=-1, type="start", text="", token_ids=none, forced=0, logprobs=none.astype(np.float32))
    return Tree(
        **text,
        pattern="a",
        tokenizers={},
        models={},
        prompt_token_ids={},
        nodes=(start,),
        stop="exhausted",
        simulations=number,
        calls=0,
        tokens=0,
        counts={},
    )


def opened(folder: Path, count: int, size: int = 4) -> tuple[TreeStore, Trees]:
    """Return the store of a folder, and the trees that it visited."""
    visited: Trees = {}
    return TreeStore(folder, size, names(count), lambda number, each: visited.update({number: each})), visited


def grow(folder: Path, count: int, size: int = 4, order: Callable[[list[int]], Sequence[int]] = list) -> None:
    store, _ = opened(folder, count, size)
    for number in order(store.missing()):
        store.add(number, tree(number))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def undisturbed(folder: Path, count: int, size: int = 4) -> dict[str, bytes]:
    grow(folder / "undisturbed", count, size)
    return files(folder / "undisturbed")


def test_shards_hold_the_trees_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    grow(tmp_path, 10, order=lambda missing: missing[::-1])
    assert sorted(files(tmp_path)) == ["trees/00000.jsonl", "trees/00001.jsonl", "trees/00002.jsonl"]
    assert (tmp_path / "trees/00002.jsonl").read_text() == f"{tree_line(tree(8))}\n{tree_line(tree(9))}\n"
    store, visited = opened(tmp_path, 10)
    assert store.missing() == []
    assert sorted(visited) == list(range(10)) and all(visited[n].prompt_id == f"p{n}" for n in visited)


def test_a_finished_tree_of_an_open_shard_is_kept(tmp_path: Path) -> None:
    store, _ = opened(tmp_path, 10)
    store.add(5, tree(5))
    store.add(0, tree(0))
    assert sorted(files(tmp_path)) == ["trees/.open/0.json", "trees/.open/5.json"]
    reopened, visited = opened(tmp_path, 10)
    assert reopened.missing() == [1, 2, 3, 4, 6, 7, 8, 9]
    assert sorted(visited) == [0, 5]
    assert [visited[number].prompt_id for number in (0, 5)] == ["p0", "p5"]


def test_a_tree_is_added_once_and_under_its_own_number(tmp_path: Path) -> None:
    store, _ = opened(tmp_path, 10)
    store.add(1, tree(1))
    for number, each in ((1, tree(1)), (2, tree(3))):
        with pytest.raises(ValueError, match="expected a missing tree"):
            store.add(number, each)


@pytest.mark.heavy
@settings(deadline=None, max_examples=30)
@given(data=st.data(), size=st.integers(1, 5), counts=st.lists(st.integers(1, 13), min_size=1, max_size=3))
def test_the_files_do_not_depend_on_order_or_growth(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, size: int, counts: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    for count in sorted(counts):
        grow(folder, count, size, order=lambda missing: data.draw(st.permutations(missing)))
    assert files(folder) == undisturbed(tmp_path_factory.mktemp("other"), max(counts), size)


def test_a_short_shard_stays_until_its_further_trees_are_finished(tmp_path: Path) -> None:
    grow(tmp_path, 6)
    short = files(tmp_path)["trees/00001.jsonl"]
    store, _ = opened(tmp_path, 9)
    assert store.missing() == [6, 7, 8]
    store.add(7, tree(7))
    assert files(tmp_path)["trees/00001.jsonl"] == short
    assert opened(tmp_path, 9)[0].missing() == [6, 8]
    store.add(6, tree(6))
    assert files(tmp_path)["trees/00001.jsonl"].startswith(short)
    assert len(list(read_trees(tmp_path / "trees/00001.jsonl"))) == 4


class Killed(BaseException):
    """Simulated end of the process. The program does not catch it, so it cleans up nothing."""


STEPS = ("replace", "unlink", "rmdir", "mkdir", "fsync")


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Return a function that raises Killed before or during the n-th later change of the disk."""
    changes_left: list[int | None] = [None]

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if changes_left[0] is not None:
                changes_left[0] -= 1
                if changes_left[0] < 0:
                    raise Killed
            return real(*arguments, **keywords)

        return call

    def half_written(path: Path, text: str, **keywords: Any) -> int:
        if changes_left[0] == 0:
            real_write(path, text[: len(text) // 2], **keywords)
            raise Killed
        return watched(real_write)(path, text, **keywords)

    real_write = Path.write_text
    monkeypatch.setattr(Path, "write_text", half_written)
    for name in STEPS:
        monkeypatch.setattr(os, name, watched(getattr(os, name)))

    def arm(step: int | None) -> None:
        changes_left[0] = step

    return arm


@pytest.mark.heavy
@pytest.mark.parametrize("before", [0, 6], ids=["fresh", "grown"])
def test_a_kill_at_any_step_changes_nothing(tmp_path: Path, kill_at: Callable[[int | None], None], before: int) -> None:
    expected = undisturbed(tmp_path, 9)
    step, killed = 0, True
    while killed:
        run_dir = tmp_path / f"{step}"
        grow(run_dir, before)
        finished = set(range(before))
        kill_at(step)
        try:
            store, _ = opened(run_dir, 9)
            for number in (0, 8, 2, 6, 4, 7, 5, 3, 1):
                if number >= before:
                    store.add(number, tree(number))
                    finished.add(number)
        except Killed:
            step += 1
        else:
            killed = False
        kill_at(None)
        _, visited = opened(run_dir, 9)
        assert finished <= set(visited)
        assert all(tree_line(each) == tree_line(tree(number)) for number, each in visited.items())
        grow(run_dir, 9)
        assert files(run_dir) == expected
    assert step >= 4 * (9 - before)  # a tree takes at least one write, one rename and two syncs


def test_opening_removes_open_trees_that_are_already_in_a_shard(
    tmp_path: Path, kill_at: Callable[[int | None], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = opened(tmp_path, 4)
    for number in range(3):
        store.add(number, tree(number))
    monkeypatch.setattr(Path, "unlink", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        store.add(3, tree(3))
    monkeypatch.undo()
    assert "trees/.open/3.json" in files(tmp_path) and "trees/00000.jsonl" in files(tmp_path)
    assert opened(tmp_path, 4)[0].missing() == []
    assert list(files(tmp_path)) == ["trees/00000.jsonl"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("00000.jsonl", "{}\n", r"00000\.jsonl, line 1: expected an object with format 1"),
        ("00000.jsonl", "", r"00000\.jsonl: expected trees, found an empty file; restore"),
        ("00000.jsonl", f"{tree_line(tree(1))}\n", r"line 1: expected the tree of prompt p0, found p1; restore"),
        ("00000.jsonl", "".join(f"{tree_line(tree(n))}\n" for n in range(5)), "expected at most 4 trees, found more"),
        ("00000.jsonl", f"{tree_line(tree(0))}", "line 1: expected a line end, found the file cut off"),
        ("0.jsonl", f"{tree_line(tree(0))}\n", "expected only tree files here; move it away"),
        ("000000.jsonl", f"{tree_line(tree(0))}\n", "expected only tree files here; move it away"),
        ("notes.txt", "mine", r"notes\.txt: expected only tree files here; move it away"),
        (".open/x.json", "mine", r"x\.json: expected only tree files here; move it away"),
        (".open/01.json", f"{tree_line(tree(1))}\n", "expected only tree files here; move it away"),
        (".open/1.json", f"{tree_line(tree(2))}\n", r"1\.json, line 1: expected the tree of prompt p1, found p2"),
        (".open/1.json", f"{tree_line(tree(1))}\n{tree_line(tree(2))}\n", "expected at most 1 trees, found more"),
    ],
)
def test_a_damaged_or_foreign_file_is_an_error_and_stays(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / "trees" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        opened(tmp_path, 10)
    assert path.read_text() == content


@pytest.mark.parametrize("count", [5, 9])
def test_fewer_prompts_than_there_are_trees_is_an_error(tmp_path: Path, count: int) -> None:
    grow(tmp_path, 10)
    before = files(tmp_path)
    message = rf"search\.prompts is {count}, but .* holds the tree of prompt number {count + 1}: raise it"
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, count)
    assert files(tmp_path) == before


FIXED, INPUTS = {"run.seed": 0, "search.stop.correct": [{"count": 8}]}, {"model.path": "d1", "task.path": ""}


def test_the_same_origin_continues(tmp_path: Path) -> None:
    check_origin(tmp_path, FIXED, INPUTS)
    before = files(tmp_path)
    check_origin(tmp_path, FIXED, INPUTS)
    assert files(tmp_path) == before
    assert json.loads(before["search.json"]) == {"format": 1, "fixed": FIXED, "inputs": INPUTS}


@pytest.mark.parametrize("killed", [False, True])
def test_an_origin_without_a_tree_is_replaced(tmp_path: Path, killed: bool) -> None:
    check_origin(tmp_path, FIXED, INPUTS)
    if killed:  # while it was writing its first tree
        (tmp_path / "trees" / ".open").mkdir(parents=True)
        (tmp_path / "trees" / ".open" / f".1.json.{'0' * 32}").write_text("{")
    check_origin(tmp_path, {**FIXED, "run.seed": 1}, INPUTS)
    assert json.loads((tmp_path / "search.json").read_text())["fixed"]["run.seed"] == 1
    store, _ = opened(tmp_path, 2)
    store.add(1, tree(1))
    with pytest.raises(ConfigError, match=r"^run\.seed differs .*expected 1, found 0; set it back, or start another"):
        check_origin(tmp_path, FIXED, INPUTS)


@pytest.mark.parametrize("count", [2, 4])
def test_another_origin_is_refused_by_field(tmp_path: Path, count: int) -> None:
    check_origin(tmp_path, FIXED, INPUTS)
    store, _ = opened(tmp_path, 4)
    for number in range(count):  # 2 trees are open, 4 are a shard
        store.add(number, tree(number))
    before = files(tmp_path)
    with pytest.raises(ConfigError, match=r"^run\.seed differs .*expected 0, found 1; set it back, or start another"):
        check_origin(tmp_path, {**FIXED, "run.seed": 1}, INPUTS)
    with pytest.raises(ConfigError, match=r"^search\.s.* differs .*, found null; .*also different: search\.new"):
        check_origin(tmp_path, {"run.seed": 0, "search.new": 1}, INPUTS)
    with pytest.raises(ConfigError, match=r"^model\.path: the contents differ"):
        check_origin(tmp_path, FIXED, {**INPUTS, "model.path": "d2"})
    assert files(tmp_path) == before


def test_trees_of_unknown_origin_are_refused(tmp_path: Path) -> None:
    grow(tmp_path, 2)
    with pytest.raises(DataError, match=r"search\.json: missing, though .*trees holds trees"):
        check_origin(tmp_path, FIXED, INPUTS)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2, "fixed": {}, "inputs": {}}', '{"format": 1}'])
def test_a_damaged_origin_is_an_error_and_stays(tmp_path: Path, content: str) -> None:
    (tmp_path / "search.json").write_text(content)
    with pytest.raises(DataError, match=r"search\.json: (expected format 1|cannot be read)"):
        check_origin(tmp_path, FIXED, INPUTS)
    assert (tmp_path / "search.json").read_text() == content
