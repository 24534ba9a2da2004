"""The index of trees: every tree by number, files that grow, lines that are cut or damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tree_samples import answer, golden, node, tree

from rlsys.errors import DataError
from rlsys.search.tree_index import TreeIndex
from rlsys.search.tree_json import tree_line
from rlsys.trees import Tree, TreeFailure
from rlsys.types import Verdict

WRONG = tree(node(0, 'say "outcome":"ok"'), answer(1, "x", "wrong"), prompt_id='with "quotes" \\ é')
FAILURE = TreeFailure(prompt_id="failed", question="q", answer="1", reason="no actor")


def write(folder: Path, name: str, *trees: Tree | TreeFailure) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(tree_line(each) + "\n" for each in trees))
    return path


def index(run_dir: Path) -> TreeIndex:
    made = TreeIndex(run_dir)
    made.refresh()
    return made


def test_every_tree_is_read_alone(tmp_path: Path) -> None:
    trees = (golden(), WRONG, FAILURE)
    write(tmp_path / "trees", "00000.jsonl", *trees)
    write(tmp_path / "trees" / ".open", "7.json", replace(golden(), prompt_id="open"))
    made = index(tmp_path)
    assert [place.prompt_id for place in made.places] == ["p", 'with "quotes" \\ é', "failed", "open"]
    assert [place.right for place in made.places] == [True, False, False, True]
    assert [place.failed for place in made.places] == [False, False, True, False]
    assert [tree_line(made.tree(n)) for n in range(3)] == [tree_line(each) for each in trees]


def test_a_right_tree_is_one_that_is_solved(tmp_path: Path) -> None:
    unjudged = answer(1, "x", "ok", reward=0.0)  # nothing to compare an answer with, and no reward
    ok = Verdict(outcome="ok", reward=-0.5, answered=True, detail='a "quote" \\', parts={"task": 1.0, "short": -1.5})
    shaped = replace(unjudged, verdict=ok)
    failed = answer(1, "x", "ok", defect="malformed")  # right, but no answer of the tree
    chains = ((unjudged,), (shaped,), (unjudged, shaped), (), (failed,))
    trees = [tree(node(0, "t"), *answers) for answers in chains]
    write(tmp_path / "trees", "00000.jsonl", *trees)
    rights = [place.right for place in index(tmp_path).places]
    assert rights == [each.solved for each in trees] == [False, True, True, False, False]


def test_shards_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (99_999, 100_000, 2):
        write(tmp_path / "stages" / "search" / "trees", f"{number:05d}.jsonl", replace(golden(), prompt_id=str(number)))
    made = index(tmp_path)
    assert [place.prompt_id for place in made.places] == ["2", "99999", "100000"]
    assert made.search_of(0).path == tmp_path / "stages" / "search"


def test_new_and_changed_files_are_seen_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    made = index(tmp_path)
    assert made.places == []
    path = write(tmp_path / "trees", "00000.jsonl", golden())
    path.write_text(path.read_text() + tree_line(WRONG)[:-9])
    made.refresh()
    assert [place.prompt_id for place in made.places] == ["p"]
    assert made.cut_off == [path]
    path.write_text(tree_line(WRONG) + "\n")
    made.refresh()
    assert [place.prompt_id for place in made.places] == [WRONG.prompt_id]
    assert made.cut_off == []


def test_files_without_a_whole_line_are_named(tmp_path: Path) -> None:
    shard = write(tmp_path / "trees", "00000.jsonl", golden())
    shard.write_text(shard.read_text()[:500])
    opened = write(tmp_path / "trees" / ".open", "7.json")
    made = index(tmp_path)
    assert (made.places, made.cut_off) == ([], [shard, opened])


def test_a_damaged_tree_is_named_and_does_not_hide_the_others(tmp_path: Path) -> None:
    newer = tree_line(golden()).replace('"format":1', '"format":2', 1)
    path = write(tmp_path / "trees", "00000.jsonl", golden())
    path.write_text(path.read_text() + "rubbish\n" + newer + "\n")
    made = index(tmp_path)
    assert [place.prompt_id for place in made.places] == ["p", "?", "p"]
    for number, fault in ((1, "byte"), (2, "expected an object with format 1, found 2")):
        with pytest.raises(DataError, match=fault):
            made.tree(number)
    assert isinstance(made.tree(0), Tree)
