"""Marks of bad chains: the file, and a tree without the marked chains."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_runs import config
from rich.console import Console
from tree_samples import CharCodec, answer, golden, node, tree

from rlsys.commands.extract import show
from rlsys.errors import DataError
from rlsys.search.export import Source, run
from rlsys.search.marks import chain_digest, marked_nodes, read_marks, without_chains, write_marks
from rlsys.search.tree_json import tree_line


def test_marks_come_back(tmp_path: Path) -> None:
    path = tmp_path / "marks.json"
    assert read_marks(path) == {}
    write_marks(path, {"q": {"b", "a"}, "p": set(), "é": {"c"}})
    assert read_marks(path) == {"q": {"a", "b"}, "é": {"c"}}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 2, "bad_chains": {}}', '{"format": 1}', '{"format": 1, "bad_chains": []}']
)
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "marks.json").write_text(text)
    with pytest.raises(DataError, match=r"marks\.json"):
        read_marks(tmp_path / "marks.json")


def test_a_mark_holds_for_all_chains_with_its_text_and_for_no_other_tree() -> None:
    grown = tree(
        node(0, "a"), answer(1, "X", "ok"), node(0, "a", "sub_task"), answer(3, "X", "ok"), answer(3, "y", "ok")
    )
    marks = {"p": {chain_digest(grown, 2)}}
    assert marked_nodes(grown, marks) == [2, 4]
    assert marked_nodes(replace(grown, prompt_id="other"), marks) == []
    assert marked_nodes(grown, {}) == []


def test_a_tree_without_a_chain_has_the_values_of_the_others() -> None:
    # Node 1 has the chains 3 (right), 4, 6 (right) and 7; node 2 has 3 and 4.
    whole = golden()
    less = without_chains(whole, [3])
    assert [(less.nodes[n].visits, less.nodes[n].value) for n in (1, 2)] == [(3, 1 / 3), (1, 0.0)]
    assert (less.nodes[0].visits, less.nodes[0].total) == (whole.nodes[0].visits - 1, whole.nodes[0].total - 1)
    assert 3 not in less.answers() and not less.nodes[3].correct
    assert [n for n in less.answers() if n != 3] == [n for n in whole.answers() if n != 3]
    assert less.nodes[8:] == whole.nodes[8:] and without_chains(whole, []) == whole


class Letters:
    def decode(self, token_ids: list[int], **_options: bool) -> str:
        return "".join(map(chr, token_ids))


def test_the_extraction_leaves_marked_chains_out_and_counts_them(tmp_path: Path) -> None:
    whole = golden()
    (tmp_path / "trees").mkdir()
    (tmp_path / "trees" / "00000.jsonl").write_text(tree_line(whole) + "\n")
    source = Source(config(), tmp_path / "trees", CharCodec(), Letters())
    before = run(source, tmp_path / "before")
    chain = json.loads((tmp_path / "before" / "supervised.jsonl").read_text())["completion"]
    number = next(n for n in whole.answers() if whole.completion(n) == chain)
    write_marks(tmp_path / "marks.json", {"p": {chain_digest(whole, number)}, "no prompt": {"0"}})
    after = run(source, tmp_path / "after")
    output = io.StringIO()
    show(after, tmp_path / "after", Console(file=output))
    assert (before["marked"], after["marked"]) == (0, 1)
    assert json.loads((tmp_path / "after" / "supervised.jsonl").read_text())["completion"] != chain
    assert all(f'"{chain}"' not in path.read_text() for path in (tmp_path / "after").glob("*.jsonl"))
    assert "chains marked as bad and left out: 1" in output.getvalue()


def test_a_chain_that_was_drawn_twice_is_left_out_twice() -> None:
    less = without_chains(golden(), [16])
    assert (less.nodes[15].visits, less.nodes[16].visits) == (0, 0)
    assert less.nodes[8].visits == 3
