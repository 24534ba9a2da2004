"""Which fields of a config decide a tree, and which may differ when a search continues."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from pretended_search import CONFIG, shipped
from tree_samples import answer, node, tree

from rlsys.config.tasks import DatasetConfig
from rlsys.control.tree_search import check_answers, deciding_fields, demonstration_notes
from rlsys.errors import TooManyFailuresError
from rlsys.search.stats import TreeFigures
from rlsys.tasks import build_task
from rlsys.trees import TEXT, Tree


def test_the_shipped_config_says_where_its_model_comes_from() -> None:
    line = next(line for line in CONFIG.read_text().splitlines() if line.strip().startswith("path:"))
    assert "runs/quickstart/stages/warm_start" in line and "`make quickstart`" in line


MODEL, REVIEWER = "search.model={path: a}", "search.reviewer={path: a}"


@pytest.mark.parametrize(
    "override",
    [
        "run.dir=elsewhere",
        "run.address=auto",
        "actors.count=1",
        "actors.max_num_seqs=8",
        "actors.threads=2",
        "actors.kv_cache_gib=2",
        "actors.rollout_timeout_s=900",
        "rewards.workers=2",
        "search.prompts=600",
        "search.fraction=0.5",
        "search.max_failed_trees=0.5",
        "search.nodes.unused={tag: unused}",
        "search.tables.unused={children: {start: {answer: 1}}}",
        "extract.pairs_per_tree=2",
        "train.max_steps=3",
        "model.path=moved",
    ],
)
def test_what_does_not_decide_a_tree_may_differ(override: str) -> None:
    assert shipped(override) != shipped()
    assert deciding_fields(shipped(override)) == deciding_fields(shipped())


@pytest.mark.parametrize("override", ["count=2", "max_num_seqs=8", "kv_cache_gib=2", "path=b"])
@pytest.mark.parametrize("section", ["model", "reviewer"])
def test_engines_of_other_models_may_differ_in_number_and_size(section: str, override: str) -> None:
    before = shipped(MODEL, REVIEWER)
    after = shipped(MODEL, REVIEWER, f"search.{section}.{override}")
    assert deciding_fields(after) == deciding_fields(before)


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=1",
        "run.device=cuda",
        "task.error_rate=0.2",
        "actors.dtype=bf16",
        "actors.max_model_len=200",
        "actors.block_size=64",
        "actors.enforce_eager=false",
        "sampling.max_tokens=100",
        "rewards.timeout_s=1",
        "rewards.memory_mib=512",
        "sampling.temperature=0.7",
        "sampling.top_p=0.9",
        "search.temperature=0.7",
        "search.split=held_out",
        "search.shard_size=8",
        "search.expansion=node;search.selection={type: ucb}",
        "search.selection={type: puct}",
        "search.parallel_simulations=2",
        "search.backtracking=true",
        "search.max_depth=12",
        "search.max_node_tokens=9",
        "search.stop.simulations=9",
        "search.stop.correct=[{count: 2}]",
        "search.nodes.thinking.max_tokens=9",
        "search.tables.chain.children.thinking.answer=2",
        "search.tables.chain.after_wrong={}",
        "search.patterns=[a]",
        "search.patterns=[chain, a]",
        MODEL,
        REVIEWER,
    ],
)
def test_what_decides_a_tree_is_compared(override: str) -> None:
    assert deciding_fields(shipped(*override.split(";"))) != deciding_fields(shipped())


def test_the_number_of_rollouts_decides_and_that_of_judges_does_not() -> None:
    rollouts = [deciding_fields(shipped(f"search.value={{type: rollouts, count: {n}}}")) for n in (2, 3)]
    judges = [deciding_fields(shipped(f"search.value={{type: model, path: j, count: {n}}}")) for n in (1, 2)]
    assert rollouts[0] != rollouts[1] and judges[0] == judges[1]


def test_the_order_of_a_row_decides_too() -> None:
    one = shipped("search.tables.chain.children.start={thinking: 4, sub_task: 2}", "search.patterns=[chain]")
    other = shipped("search.tables.chain.children.start={sub_task: 2, thinking: 4}", "search.patterns=[chain]")
    assert deciding_fields(one) != deciding_fields(other)


def test_a_sampling_setting_that_the_search_replaces_may_differ() -> None:
    before = shipped("search.temperature=0.7", "search.top_p=0.9")
    after = shipped("search.temperature=0.7", "search.top_p=0.9", "sampling.temperature=0.5", "sampling.top_p=0.5")
    assert deciding_fields(after) == deciding_fields(before)


def test_the_deciding_fields_survive_json() -> None:
    found = deciding_fields(shipped(REVIEWER))
    assert json.loads(json.dumps(found)) == found


def figures(*trees: Tree) -> TreeFigures:
    sums = TreeFigures()
    for number, each in enumerate(trees):
        sums.add(number, each)
    return sums


TABLE = [
    "search.nodes={thinking: {tag: think}, check: {tag: check}, answer: {tag: answer, terminal: true}}",
    "search.tables={own: {children: {start: {thinking: 1}, thinking: {check: 1, answer: 1}, check: {answer: 1}}}}",
    "search.patterns=[own]",
]


def test_node_types_that_never_come_whole_are_named() -> None:
    cut = node(1, "<check>a", "check", defect="too_long")
    found = figures(tree(node(0, "a"), cut, replace(cut, defect="truncated"), cut, answer(1, "b", "ok")))
    assert check_answers(shipped(*TABLE), found) == [
        "no node of type check (tag <check>) came whole: too_long 2, truncated 1"
    ]
    assert check_answers(shipped(*TABLE), figures(tree(node(0, "a"), answer(1, "b", "wrong")))) == [
        "no node of type check (tag <check>) came whole: none was begun"
    ]


def test_a_type_that_only_backtracking_begins_is_not_missed_without_it() -> None:
    table = ["search.tables.chain.after_wrong={thinking: {reclarify: 1}}", "search.patterns=[chain]"]
    children = "search.tables.chain.children={start: {thinking: 2}, thinking: {answer: 1}, reclarify: {answer: 1}}"
    found = figures(tree(node(0, "a"), answer(1, "b", "ok")))
    assert check_answers(shipped(children, *table, "search.backtracking=false"), found) == []
    assert len(check_answers(shipped(children, *table, "search.backtracking=true"), found)) == 1


def test_a_check_names_the_types_that_no_demonstration_shows() -> None:
    task = build_task(shipped().task, 0)
    assert demonstration_notes(shipped(), task) == []
    (note,) = demonstration_notes(shipped("search.nodes.thinking.tag=thoughts"), task)
    assert note.startswith("search.nodes.thinking: the task's demonstrations have no tag <thoughts>")


def test_a_small_data_set_is_read_to_its_end_and_node_expansion_sets_the_tags_itself(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "answer": str(n), "demonstration": f"<thinking>{n}</thinking>"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DatasetConfig(type="dataset", path=str(tmp_path / "rows.jsonl"), demonstration_column="demonstration")
    task = build_task(config, 0)
    assert any("<answer>" in note for note in demonstration_notes(shipped(), task))
    assert demonstration_notes(shipped("search.expansion=node", "search.selection={type: ucb}"), task) == []


def test_trees_without_any_answer_are_an_error() -> None:
    unread = node(0, "<thought>a</thought>", TEXT, defect="malformed")
    with pytest.raises(TooManyFailuresError) as caught:
        check_answers(shipped(*TABLE), figures(tree(unread), tree(unread, unread)))
    assert caught.value.message.startswith(
        "none of 2 trees has a scored answer: no node of type thinking (tag <think>)"
    )
    assert "; texts without a known tag: 3. Compare the tags of search.nodes" in caught.value.message
    assert check_answers(shipped(*TABLE), TreeFigures()) == []  # every tree failed, which has a limit of its own
