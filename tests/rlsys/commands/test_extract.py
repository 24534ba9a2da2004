"""`rlsys extract` on tree files made by hand, with the tokenizer of a tiny model."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tree_samples import answer, ids, node, tree

from rlsys import cli
from rlsys.commands import extract as extract_command
from rlsys.commands.extract import find_source, run
from rlsys.config.files import dump_config, parse_config
from rlsys.data.inputs import prepare_model
from rlsys.errors import ConfigError, DataError
from rlsys.search.codec import TagCodec
from rlsys.search.export import report_fault
from rlsys.search.tree_json import tree_line
from rlsys.tables.schemas import TABLES
from rlsys.tables.write import whole_or_nothing
from rlsys.trees import ThoughtNode, Tree, TreeFailure

QUESTION = "a in aba"
PROMPT = f"<user>{QUESTION}<assistant>"


@pytest.fixture(scope="module")
def search_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a config and a model, without trees."""
    folder = tmp_path_factory.mktemp("search")
    values: dict[str, Any] = {
        "run": {"dir": str(folder)},
        "model": {"from_scratch": {"hidden_size": 32, "layers": 1, "heads": 1, "intermediate_size": 16}},
        "task": {"type": "letter_count"},
        "search": {"prompts": 4},
        "extract": {"max_backtracks": None, "step_min_visits": 2},
    }
    config = parse_config(values, "test")
    (folder / "config.yaml").write_text(dump_config(config))
    prepare_model(config, folder)
    return folder


@pytest.fixture
def write(search_dir: Path) -> Callable[..., Path]:
    """Write tree files, a list of lines each; the run directory."""

    def files(*shards: list[str]) -> Path:
        (search_dir / "trees").mkdir(exist_ok=True)
        for old in (search_dir / "trees").iterdir():
            old.unlink()
        for number, lines in enumerate(shards):
            (search_dir / "trees" / f"{number:05d}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return search_dir

    return files


@pytest.fixture(scope="module")
def codec(search_dir: Path) -> TagCodec:
    (search_dir / "trees").mkdir(exist_ok=True)
    (search_dir / "trees" / "00000.jsonl").write_text("")
    return find_source(search_dir, []).codec


def grown(codec: TagCodec, *below: ThoughtNode, **fields: Any) -> Tree:
    """A tree of the policy: every node gets the policy's tokens of its text."""
    encoded = [replace(n, token_ids=(own := ids("", *codec.encode(n.text))), logprobs=np.zeros(len(own), np.float32))
               for n in below]  # fmt: skip
    prompt = {"policy": ids("", *codec.prompt(QUESTION))}
    return tree(*encoded, question=QUESTION, tokenizers={"policy": codec.digest}, prompt_token_ids=prompt, **fields)


def solved(codec: TagCodec, prompt_id: str = "p0") -> Tree:
    """Number 4 is the longest correct chain, number 3 the shortest; 5 is wrong, of the thinking of 4."""
    return grown(
        codec,
        node(0, "<thinking>ab</thinking>"),
        node(0, "<thinking>abab</thinking>"),
        answer(1, "<answer>2</answer>", "ok", samples=2),
        answer(2, "<answer>2</answer>", "ok"),
        answer(2, "<answer>3</answer>", "wrong", samples=3),
        prompt_id=prompt_id,
    )


def unsolved(codec: TagCodec) -> Tree:
    return grown(codec, answer(0, "<answer>1</answer>", "wrong"), prompt_id="p2")


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def extracted(write: Callable[..., Path], codec: TagCodec, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Four prompts in two files: solved, failed, unsolved, and the first one again."""
    failure = TreeFailure(prompt_id="p1", question=QUESTION, answer="2", reason="too long")
    folder = write(
        [tree_line(solved(codec)), tree_line(failure)], [tree_line(unsolved(codec)), tree_line(solved(codec, "p3"))]
    )
    return tmp_path / "data", run(find_source(folder, []), tmp_path / "data")


def test_a_supervised_row(extracted: tuple[Path, dict[str, Any]], codec: TagCodec) -> None:
    (row,) = lines(extracted[0], "supervised")
    chain = "<thinking>abab</thinking><answer>2</answer>"
    prompt, completion = codec.prompt(QUESTION), codec.encode(chain)
    # Values: 1/4 of the thinking (one of four answers below it is correct), 1 of the answer.
    assert row == {
        "prompt": PROMPT,
        "completion": chain,
        "prompt_id": "p0",
        "token_ids": [*prompt, *completion, codec.end_token_id],
        "loss_mask": [False] * len(prompt) + [True] * (len(completion) + 1),
        "reward": 1.0,
        "length": len(completion) + 1,
        "pattern": "a",
        "value": (0.25 + 1) / 2,
    }


def test_the_texts_of_a_row_are_its_tokens(extracted: tuple[Path, dict[str, Any]], search_dir: Path) -> None:
    tokenizer = find_source(search_dir, []).tokenizer
    (row,) = lines(extracted[0], "supervised")
    assert tokenizer(row["prompt"] + row["completion"] + "<eos>")["input_ids"] == row["token_ids"]


def test_a_preference_row(extracted: tuple[Path, dict[str, Any]], codec: TagCodec) -> None:
    (row,) = lines(extracted[0], "preferences")
    assert [row["prompt"], row["chosen"], row["rejected"]] == [
        PROMPT,
        "<thinking>ab</thinking><answer>2</answer>",
        "<thinking>abab</thinking><answer>3</answer>",
    ]
    common = [*codec.prompt(QUESTION), *codec.encode("<thinking>ab")]
    assert row["prompt_length"] == len(codec.prompt(QUESTION))
    assert row["common_prefix"] == len(common)
    assert (row["chosen_visits"], row["rejected_visits"]) == (2, 4)  # of the two thinking nodes
    for side in ("chosen", "rejected"):
        token_ids, mask = row[f"{side}_ids"], row[f"{side}_loss_mask"]
        assert token_ids[: len(common)] == common and token_ids[-1] == codec.end_token_id
        assert mask == [False] * len(common) + [True] * (len(token_ids) - len(common))
    assert row["chosen_ids"][len(common)] != row["rejected_ids"][len(common)]


def test_step_rows(extracted: tuple[Path, dict[str, Any]], codec: TagCodec) -> None:
    (pair,) = lines(extracted[0], "step_preferences")  # 2/2 against 1/4; the answers below abab: 1 visit is too few
    texts = [PROMPT, "<thinking>ab</thinking>", "<thinking>abab</thinking>"]
    assert [pair["prompt"], pair["chosen"], pair["rejected"]] == texts
    assert [pair["chosen_value"], pair["chosen_visits"]] == [1.0, 2]
    assert [pair["rejected_value"], pair["rejected_visits"]] == [0.25, 4]
    assert pair["prompt_ids"] == codec.prompt(QUESTION)
    assert [pair["chosen_ids"], pair["rejected_ids"]] == [codec.encode(text) for text in texts[1:]]


def test_rows_of_step_values(extracted: tuple[Path, dict[str, Any]], codec: TagCodec) -> None:
    rows = lines(extracted[0], "step_values")
    assert sorted((r["completions"], r["values"], r["visits"], r["known"]) for r in rows) == [
        (["<answer>1</answer>"], [0.0], [1], 0),
        (["<thinking>ab</thinking>", "<answer>2</answer>"], [1.0, 1.0], [2, 2], 0),
        (["<thinking>abab</thinking>", "<answer>2</answer>"], [0.25, 1.0], [4, 1], 0),
        (["<thinking>abab</thinking>", "<answer>3</answer>"], [0.25, 0.0], [4, 3], 1),
    ]
    prompt = codec.prompt(QUESTION)
    for row in rows:
        parts = [codec.encode(text) for text in row["completions"]]
        assert row["prompt"] == PROMPT and row["token_ids"] == [*prompt, *(token for part in parts for token in part)]
        assert row["ends"] == [len(prompt) + sum(map(len, parts[: n + 1])) for n in range(len(parts))]
        new = len(prompt) + sum(map(len, parts[: row["known"]]))
        assert row["loss_mask"] == [False] * new + [True] * (len(row["token_ids"]) - new)


def test_masks_of_steps_leave_out_what_the_search_put_there(
    write: Callable[..., Path], codec: TagCodec, tmp_path: Path
) -> None:
    of = solved(codec)
    nodes = [of.nodes[0], *(replace(n, forced=1) for n in of.nodes[1:])]  # the opening tag is one token
    run(find_source(write([tree_line(replace(of, nodes=tuple(nodes)))]), []), tmp_path)
    (pair,) = lines(tmp_path, "step_preferences")
    for side in ("chosen", "rejected"):
        assert pair[f"{side}_loss_mask"] == [False] + [True] * (len(pair[f"{side}_ids"]) - 1)
    rows = lines(tmp_path, "step_values")
    for row in rows:
        trained = [False] * len(row["token_ids"])
        for start, end in zip([len(codec.prompt(QUESTION)), *row["ends"]], row["ends"], strict=False):
            trained[start + 1 : end] = [start >= [0, *row["ends"]][row["known"]]] * (end - start - 1)
        assert row["loss_mask"] == trained
    assert sorted((len(row["ends"]), row["known"]) for row in rows) == [(2, 0), (2, 0), (2, 1)]


def test_the_report(extracted: tuple[Path, dict[str, Any]], codec: TagCodec) -> None:
    folder, report = extracted
    assert json.loads((folder / "report.json").read_text()) == report
    assert report_fault((folder / "report.json").read_bytes()) == ""
    assert [report[name] for name in ("trees", "failed", "solved", "missing")] == [3, 1, 2, 0]
    # p3 is p0 again: one supervised row, one pair, one step pair and three chains of steps are dropped.
    assert report["rows"] == {"supervised": 1, "preferences": 1, "step_preferences": 1, "step_values": 4}
    assert report["duplicates"] == {"supervised": 1, "preferences": 1, "step_preferences": 1, "step_values": 3}
    assert report["trees_without_pair"] == {
        "no_answer": 0,
        "no_correct": 1,
        "no_wrong": 0,
        "equal_tokens": 0,
        "by_rule": 0,
    }
    chosen = len(codec.encode("<thinking>ab</thinking><answer>2</answer>"))
    rejected = len(codec.encode("<thinking>abab</thinking><answer>3</answer>"))
    assert report["tokens"]["chosen"] == dict.fromkeys(("min", "p25", "median", "p75", "max"), chosen + 1)
    assert report["tokens"]["common_prefix"]["median"] == len(codec.encode("<thinking>ab"))
    assert report["pair_tokens"] == {"policy": chosen + rejected, "forced": 0, "other_model": 0}


def test_parquet_holds_the_same_rows(extracted: tuple[Path, dict[str, Any]]) -> None:
    for table in TABLES:
        rows = pq.read_table(extracted[0] / f"{table.name}.parquet").to_pylist()
        assert rows == lines(extracted[0], table.name) != []
        assert list(rows[0]) == list(table.columns)


def test_the_folder_loads_as_a_data_set(extracted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    import datasets

    for table in TABLES:
        rows = datasets.load_dataset(str(extracted[0]), table.name, split="train", cache_dir=str(tmp_path / "cache"))
        assert rows.to_list() == lines(extracted[0], table.name)
    rows = datasets.load_dataset(str(extracted[0]), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.to_list() == lines(extracted[0], "supervised")


def test_the_card_says_that_nodes_go_on(write: Callable[..., Path], codec: TagCodec, tmp_path: Path) -> None:
    lines = [tree_line(solved(codec))]
    for rows, sentence in (("chain", "Nodes of the step tables go on"), ("node", "Rows of `supervised` and nodes")):
        run(find_source(write(lines), [f"extract.supervised_rows={rows}"]), tmp_path / rows)
        assert sentence in (tmp_path / rows / "README.md").read_text()


@pytest.mark.parametrize(("thinking", "right"), [("a1b1a2b2", 1), ("a1b2a2b2", 0)])
def test_the_report_counts_supervised_chains_with_every_step_right(
    thinking: str, right: int, write: Callable[..., Path], codec: TagCodec, tmp_path: Path
) -> None:
    chain = grown(codec, node(0, f"<thinking>{thinking}</thinking>"), answer(1, "<answer>2</answer>", "ok"))
    source = find_source(write([tree_line(replace(chain, question="count a in abab"))]), [])
    report, output = run(source, tmp_path / "a"), io.StringIO()
    assert report["supervised_steps"] == {"checked": 1, "every_step_right": right}
    extract_command.show(report, tmp_path / "a", Console(file=output, width=200))
    assert ("1 of 1 supervised chains reach the right answer by a wrong step" in output.getvalue()) == (not right)
    source = find_source(source.trees.parent, ["extract.supervised_rows=node"])
    assert run(source, tmp_path / "b")["supervised_steps"] == {"checked": 0, "every_step_right": 0}


def test_step_values_can_be_left_out(write: Callable[..., Path], codec: TagCodec, tmp_path: Path) -> None:
    source = find_source(write([tree_line(solved(codec))]), ["extract.step_values=false"])
    report = run(source, tmp_path / "data")
    assert report["rows"]["step_values"] == 0 and report["rows"]["step_preferences"] == 1
    card = (tmp_path / "data" / "README.md").read_text()
    assert "config_name: step_preferences" in card and "config_name: step_values" not in card


def test_why_there_is_no_pair_by_a_rule(write: Callable[..., Path], codec: TagCodec, tmp_path: Path) -> None:
    of = solved(codec)
    hinted = replace(of, nodes=tuple(replace(n, backtrack=bool(number)) for number, n in enumerate(of.nodes)))
    report = run(find_source(write([tree_line(hinted)]), ["extract.max_backtracks=0"]), tmp_path / "data")
    assert report["trees_without_pair"]["by_rule"] == 1


def test_the_files_load_as_data_sets(extracted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    import datasets

    for table in TABLES:
        for kind, suffix in (("json", "jsonl"), ("parquet", "parquet")):
            path = str(extracted[0] / f"{table.name}.{suffix}")
            rows = datasets.load_dataset(kind, data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
            assert rows.column_names == list(table.columns)
            assert rows.to_list() == lines(extracted[0], table.name)


def test_a_second_time_gives_the_same_bytes(extracted: tuple[Path, dict[str, Any]], search_dir: Path) -> None:
    folder, _ = extracted
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(first) == 2 * len(TABLES) + 2  # with the report and the card
    run(find_source(search_dir, []), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_what_the_policy_did_not_choose_is_counted(write: Callable[..., Path], codec: TagCodec, tmp_path: Path) -> None:
    forced = answer(0, "<answer>2</answer>", "ok")
    other = answer(0, "<answer>1</answer>", "wrong", writer="reviewer")
    grown_tree = grown(codec, forced, other)
    first = replace(grown_tree.nodes[1], forced=1)
    mixed = replace(
        grown_tree, nodes=(grown_tree.nodes[0], first, grown_tree.nodes[2]),
        tokenizers={"policy": codec.digest, "reviewer": "another"},
    )  # fmt: skip
    report = run(find_source(write([tree_line(mixed)]), []), tmp_path)
    length = len(codec.encode("<answer>2</answer>"))
    assert report["pair_tokens"] == {"policy": length - 1, "forced": 1, "other_model": length}


def test_rules_can_be_overridden(write: Callable[..., Path], codec: TagCodec, tmp_path: Path) -> None:
    source = find_source(write([tree_line(solved(codec))]), ["extract.supervised=shortest", "extract.chosen=none"])
    report = run(source, tmp_path)
    assert lines(tmp_path, "supervised")[0]["completion"] == "<thinking>ab</thinking><answer>2</answer>"
    assert report["rows"]["preferences"] == 0 and not any(report["trees_without_pair"].values())


def test_an_end_of_turn_inside_the_prompt_is_part_of_its_text(search_dir: Path, codec: TagCodec) -> None:
    source = find_source(search_dir, [])
    assert source.text(ids("", *codec.encode("ab"), codec.end_token_id, *codec.encode("c"))) == "ab<eos>c"


def test_a_damaged_line_is_named_and_the_old_files_stay(
    extracted: tuple[Path, dict[str, Any]], write: Callable[..., Path], codec: TagCodec
) -> None:
    folder, _ = extracted
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damaged = write([tree_line(unsolved(codec))], [tree_line(unsolved(codec)), '{"format": 1, "prompt'])
    with pytest.raises(DataError, match=r"trees/00001\.jsonl, line 2: "):
        run(find_source(damaged, []), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_with_a_report_holds_files_of_one_run(tmp_path: Path) -> None:
    def put(text: str) -> None:
        with whole_or_nothing(tmp_path) as folder:
            for name in ("report.json", "a.jsonl", "b.jsonl"):
                (folder / name).write_text(text)

    put("old")
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "a.jsonl", "b.jsonl"}
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "b.jsonl").mkdir()  # a file cannot take the place of a folder
    with pytest.raises(OSError, match=r"b\.jsonl"):
        put("new")
    assert (tmp_path / "a.jsonl").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "b.jsonl"}


def test_trees_of_another_policy_are_refused(write: Callable[..., Path], codec: TagCodec, tmp_path: Path) -> None:
    other = replace(unsolved(codec), tokenizers={"policy": "0123456789abcdef"})
    with pytest.raises(ConfigError, match=r"p2 was grown by a policy with another tokenizer \(digest 0123456789ab\)"):
        run(find_source(write([tree_line(other)]), []), tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.prompts=9", "only extract.* and model.path can differ"),
        ("model.from_scratch.layers=2", "a model.from_scratch cannot differ"),
        ("extract.chosen=tallest", "extract.chosen"),
    ],
)
def test_overrides_that_are_refused(write: Callable[..., Path], override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        find_source(write([]), [override])
    assert message in refused.value.message


def test_a_folder_without_trees(search_dir: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected the run directory of `rlsys search`, found no config\.yaml"):
        find_source(tmp_path, [])
    with pytest.raises(ConfigError, match=r"trees: expected \*\.jsonl files of trees, found none"):
        find_source(write(), [])


def test_the_command(
    write: Callable[..., Path], codec: TagCodec, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write([tree_line(solved(codec)), tree_line(unsolved(codec))])
    monkeypatch.setattr(sys, "argv", ["rlsys", "extract", str(folder), "extract.step_preferences=false"])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "1 of 2 trees solved, 0 prompts failed" in shown
    assert "no correct answer" in shown
    assert "2 of the prompts that search.prompts asks for have no tree in a finished file" in " ".join(shown.split())
    assert f"written to {folder / 'data'}" in shown
    assert len(lines(folder / "data", "supervised")) == 1 and lines(folder / "data", "step_preferences") == []


def test_nothing_to_show_is_left_out(write: Callable[..., Path], tmp_path: Path) -> None:
    report = run(find_source(write([]), []), tmp_path)
    assert report["tokens"] == dict.fromkeys(("supervised", "chosen", "rejected", "common_prefix"))
    output = io.StringIO()
    extract_command.show(report, tmp_path, Console(file=output))
    shown = output.getvalue()
    assert "0 of 0 trees solved" in shown and "trees without a pair" not in shown
    assert "4 of the prompts" in shown
