"""`rlsys search` over Ray and vLLM: the same bytes from any number of actors, and after any interruption."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bpe_model import build_bpe_model
from problems import problem_of
from real_runs import TINY, Command, FinishedRun, commands, write_config
from real_searches import (
    announced,
    count_finished,
    finished_trees,
    search_config,
    summary,
    tree_files,
    wait_until,
    whole_shards,
)

from rlsys.commands import extract as extract_command
from rlsys.config.tasks import LetterCountConfig
from rlsys.models.folder import ModelFolder
from rlsys.search.codec import TagCodec
from rlsys.search.paths import path_tokens
from rlsys.search.tree_json import read_trees, tree_line
from rlsys.tasks import build_task
from rlsys.trees import Tree

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
PROMPTS = 32
ONE_ACTOR = ("actors.count=1", "actors.max_num_seqs=8")
TWO_ACTORS = ("actors.count=2", "actors.max_num_seqs=64")
LARGEST_GAP = 5e-4


@dataclass(frozen=True)
class Searched:
    """A search that reached its end."""

    config: str
    dir: Path
    command: Command

    @property
    def trees(self) -> list[Tree]:
        found = [tree for path in sorted((self.dir / "trees").glob("*.jsonl")) for tree in read_trees(path)]
        assert all(isinstance(tree, Tree) for tree in found)
        return found


@pytest.fixture(scope="module")
def policy(finished_run: FinishedRun) -> Path:
    """The tiny model after its warm start: it closes its tags, and is sometimes right."""
    return finished_run.dir / "stages" / "warm_start"


@pytest.fixture(scope="module")
def searched(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Searched]]:
    """Run a search to its end; each kind once."""
    done: dict[tuple[Any, ...], Searched] = {}
    with commands() as start:

        def search(expansion: str, placement: tuple[str, ...] = ONE_ACTOR, prompts: int = PROMPTS) -> Searched:
            key = (expansion, placement, prompts)
            if key not in done:
                folder = tmp_path_factory.mktemp("searched")
                config = write_config(folder, search_config(policy, prompts))
                command = start("search", config, f"search.expansion={expansion}", *placement).finish()
                done[key] = Searched(config, folder / "run", command)
            return done[key]

        yield search


@pytest.fixture(scope="module", params=["node", pytest.param("chain", marks=pytest.mark.long)])
def undisturbed(request: pytest.FixtureRequest, searched: Callable[..., Searched]) -> Searched:
    return searched(request.param)


def codec_of(policy: Path, trees: list[Tree]) -> TagCodec:
    model = ModelFolder(policy)
    tokenizer = model.tokenizer
    tags = ("thinking", "reflection", "answer")
    codec = TagCodec(tokenizer, tags, model.end_token_ids, digest=model.tokenizer_digest)
    assert {tree.tokenizers["policy"] for tree in trees} == {codec.digest}
    assert {tree.models["policy"] for tree in trees} == {model.digest}
    return codec


def test_trees_are_complete_and_backtracked(undisturbed: Searched) -> None:
    trees = undisturbed.trees
    assert [tree.prompt_id for tree in trees] == [f"train-{number}" for number in range(PROMPTS)]
    assert sorted(path.name for path in (undisturbed.dir / "trees").iterdir()) == [
        f"{shard:05d}.jsonl" for shard in range(7)
    ]
    assert sum(tree.counts.get("backtracks", 0) for tree in trees) > 0
    reflections = [node for tree in trees for node in tree.nodes if node.type == "reflection"]
    assert reflections and all(node.backtrack and node.generated == 0 for node in reflections)
    assert {verdict.outcome for tree in trees for node in tree.nodes if (verdict := node.verdict)} == {"ok", "wrong"}
    assert all(tree.simulations <= 16 for tree in trees)
    undisturbed.command.assert_gone(within_s=5)
    folders = undisturbed.command.seen.ray_folders
    assert folders and [folder for folder in folders if Path(folder).exists()] == []
    assert [path.name for path in undisturbed.dir.iterdir() if path.name.startswith(".")] == []


def test_trees_are_read_back_and_are_plain_json(undisturbed: Searched) -> None:
    lines = b"".join(tree_files(undisturbed.dir).values()).decode().splitlines()
    assert [tree_line(tree) for tree in undisturbed.trees] == lines
    task = build_task(LetterCountConfig(**TINY["task"]), 3)
    judged = 0
    for tree in map(json.loads, lines):
        assert tree["format"] == 1
        for node in tree["nodes"]:
            if node["verdict"] is None:
                continue
            judged += 1
            text, above = node["text"], node["parent"]
            while above > 0:
                text, above = tree["nodes"][above]["text"] + text, tree["nodes"][above]["parent"]
            expected = task.verify(problem_of(tree["answer"]), text)
            assert (node["verdict"]["outcome"], node["verdict"]["reward"]) == (expected.outcome, expected.reward)
    assert judged > PROMPTS


def test_log_probabilities_are_those_of_the_context_in_the_tree(undisturbed: Searched, policy: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    trees = undisturbed.trees[:8]
    codec = codec_of(policy, trees)
    gaps: list[float] = []
    for tree in trees:
        for number in set(range(1, len(tree.nodes))) - {node.parent for node in tree.nodes}:
            path = path_tokens(tree, number, codec)
            ids = torch.as_tensor(path.token_ids, dtype=torch.long)
            with torch.no_grad():
                table = torch.log_softmax(model(ids[None]).logits[0, :-1], dim=-1)
            expected = table.gather(1, ids[1:, None])[:, 0].numpy()
            gaps += np.abs(expected - path.logprobs[1:])[path.chosen[1:]].tolist()
    assert len(gaps) > 200
    assert 0 < max(gaps) < LARGEST_GAP


def test_extracted_data_follow_from_the_trees(undisturbed: Searched, tmp_path: Path) -> None:
    source = extract_command.find_source(undisturbed.dir, [])
    reports = [extract_command.run(source, tmp_path / name) for name in ("first", "second")]
    assert reports[0] == reports[1]
    first, second = (
        {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())} for name in ("first", "second")
    )
    assert first == second and "supervised.jsonl" in first and "supervised.parquet" in first
    task = build_task(LetterCountConfig(**TINY["task"]), 3)
    answers = {tree.prompt_id: tree.answer for tree in undisturbed.trees}
    rows = {
        name: [json.loads(line) for line in first[f"{name}.jsonl"].splitlines()]
        for name in ("supervised", "preferences", "step_preferences", "step_values")
    }
    assert all(rows.values())
    for row in rows["supervised"]:
        assert task.verify(problem_of(answers[row["prompt_id"]]), row["completion"]).reward == 1
    for row in rows["preferences"]:
        rewards = [
            task.verify(problem_of(answers[row["prompt_id"]]), row[side]).reward for side in ("chosen", "rejected")
        ]
        assert rewards == [1, 0]


@pytest.mark.long
@pytest.mark.parametrize("expansion", ["node", "chain"])
def test_two_actors_and_larger_batches_give_the_same_bytes(searched: Callable[..., Searched], expansion: str) -> None:
    one, two = searched(expansion), searched(expansion, TWO_ACTORS)
    assert tree_files(two.dir) == tree_files(one.dir)
    assert summary(two.dir)["trees"] == summary(one.dir)["trees"]
    assert len(summary(two.dir)["last_command"]["engines"]) == 2


@pytest.fixture(scope="module")
def disturbed(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SIGKILL of the driver, then Ctrl-C, then to the end: three times the same search, on different placements."""
    folder = tmp_path_factory.mktemp("disturbed_search")
    config, run = write_config(folder, search_config(policy, PROMPTS)), folder / "run"
    with commands() as start:
        first = start("search", config)
        wait_until(first, lambda: count_finished(run) >= 6)
        first.signal(signal.SIGKILL, group=False)
        first.fail(-signal.SIGKILL)
        first.assert_gone(within_s=15)
        killed = finished_trees(run)
        assert 5 <= len(killed) < PROMPTS - 10
        shards = whole_shards(run)

        before = count_finished(run)  # with those that the kill caught at both places
        second = start("search", config, "actors.count=1")
        wait_until(second, lambda: count_finished(run) > before + 1)
        second.signal(signal.SIGINT, group=True)
        message = second.fail(130).splitlines()[-1]
        second.assert_gone(within_s=5)
        stopped = finished_trees(run)
        assert message == (f"stopped by SIGINT; {len(stopped)} of {PROMPTS} trees are kept, the same command continues")
        assert announced(second) == (len(killed), PROMPTS)
        assert len(killed) < len(stopped) < PROMPTS
        assert killed.items() <= stopped.items()

        third = start("search", config, *TWO_ACTORS).finish()
        third.assert_gone(within_s=5)
        assert announced(third) == (len(stopped), PROMPTS)
        assert summary(run)["last_command"]["grown"] == PROMPTS - len(stopped)
        assert shards.items() <= whole_shards(run).items()  # a complete shard is not written again
        folders = {folder for command in (first, second, third) for folder in command.seen.ray_folders}
        assert len(folders) == 3 and [folder for folder in folders if Path(folder).exists()] == []
        assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []
        return run


@pytest.mark.long
def test_a_search_that_was_killed_and_stopped_ends_with_the_same_bytes(
    disturbed: Path, searched: Callable[..., Searched]
) -> None:
    assert tree_files(disturbed) == tree_files(searched("node").dir)
    assert summary(disturbed)["trees"] == summary(searched("node").dir)["trees"]


def test_a_complete_search_starts_nothing(
    searched: Callable[..., Searched], start: Callable[..., Command], tmp_path: Path
) -> None:
    before = searched("node")
    shutil.copytree(before.dir, tmp_path / "run")
    files = whole_shards(tmp_path / "run")
    again = start("search", before.config, f"run.dir={tmp_path / 'run'}").finish()
    assert f"already complete ({PROMPTS} trees)" in again.stdout
    assert again.seen.ray_folders == set()
    assert whole_shards(tmp_path / "run") == files


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_killed_at_any_moment(policy: Path, searched: Callable[..., Searched], tmp_path: Path) -> None:
    """Eight kills of one search: while processes start, after some trees, and in the middle of writing a shard."""
    prompts = 60
    expected = searched("node", prompts=prompts)
    config, run = write_config(tmp_path, search_config(policy, prompts)), tmp_path / "run"
    rng = random.Random(0)
    moments = ["start", "tree", "shard", "trees", "start", "shard", "trees", "shard"]
    kept: dict[str, str] = {}
    ray_folders: set[str] = set()
    with commands() as start:
        for moment in moments:
            command = start("search", config, f"actors.count={rng.choice((1, 2))}")
            if moment == "start":
                wait_until(command, (run / "lock").exists)
                time.sleep(rng.uniform(0, 8))
            elif moment == "shard":
                shards = len(whole_shards(run))
                wait_until(command, lambda shards=shards: being_written(run, shards))
            else:
                enough = len(kept) + (1 if moment == "tree" else rng.randint(2, 6))
                wait_until(command, lambda enough=enough: count_finished(run) >= enough)
            command.signal(signal.SIGKILL, group=False)
            command.fail(-signal.SIGKILL)
            command.assert_gone(within_s=15)
            ray_folders |= command.seen.ray_folders
            now = finished_trees(run)
            assert kept.items() <= now.items()
            kept = now
        assert 0 < len(kept) < prompts
        last = start("search", config).finish()
        last.assert_gone(within_s=5)
    assert announced(last) == (len(kept), prompts)
    assert tree_files(run) == tree_files(expected.dir)
    assert [folder for folder in ray_folders if Path(folder).exists()] == []


def being_written(run: Path, shards: int) -> bool:
    """Whether a shard's file is half there, or there beside the trees it was made of; `shards` were whole before."""
    names = [path.name for path in (run / "trees").iterdir()] if (run / "trees").is_dir() else []
    half = any(name.startswith(".0") for name in names)
    return half or sum(name.endswith(".jsonl") for name in names) > shards


REFUSED = [
    (("search.patterns=[z]",), "search.patterns: unknown table 'z'"),
    (("search.max_depth=null",), "search.tables.tiny: the loop "),
    (("search.tables.tiny.children.thinking={thinking: 1}",), "search.tables.tiny.children.start: no way leads from "),
    (("search.tables.tiny.children.answer={thinking: 1}",), "search.tables.tiny.children.answer: "),
    (("search.tables.tiny.children.thinking.guess=1",), "unknown node type 'guess'"),
    (("search.expansion=both",), "search.expansion: expected one of node, chain, found 'both'"),
    (("model.path=/nowhere/model",), "model.path /nowhere/model: "),
    (("search.model={path: /nowhere/model}",), "search.model.path /nowhere/model: "),
    (("search.reviewer={path: /nowhere/model}",), "search.reviewer.path /nowhere/model: "),
    (("actors.kv_cache_gib=100000",), "actors.count or actors.kv_cache_gib: "),
    (("actors.max_model_len=16", "sampling.max_tokens=10"), "actors.max_model_len minus sampling.max_tokens leaves 6"),
]


@pytest.mark.parametrize(("overrides", "expected"), REFUSED, ids=[row[0][0] for row in REFUSED])
def test_bad_input(refused, policy: Path, tmp_path: Path, overrides: tuple[str, ...], expected: str) -> None:
    assert expected in refused("search", write_config(tmp_path, search_config(policy, 8)), *overrides)
    assert not (tmp_path / "run" / "search.json").exists()


def test_a_tag_that_the_tokenizer_loses(refused, policy: Path, tmp_path: Path) -> None:
    """The vocabulary is without "<": the shipped tags are entries of their own, another one would come back cut."""
    folder = tmp_path / "model"
    shutil.copytree(policy, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    del tokenizer["model"]["vocab"]["<"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = write_config(tmp_path, search_config(folder, 8))
    expected = "search.nodes: the tag guess is changed by this tokenizer: "
    for command in ("search", "train"):
        overrides = ("search.nodes.thinking.tag=guess", "search.fraction=0.5")
        assert expected in refused(command, config, *overrides)
        assert not (tmp_path / "run" / "search.json").exists()
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


CHANGED = [
    ("run.seed=4", "run.seed differs from the search to be continued"),
    ("search.stop.simulations=8", "search.stop.simulations differs"),
    ("search.tables.tiny.children.start.thinking=3", "search.tables.tiny.children.start differs"),
    ("search.prompts=31", "search.prompts is 31, but "),
]


@pytest.mark.parametrize(("override", "expected"), CHANGED, ids=[row[0] for row in CHANGED])
def test_another_search_in_the_same_folder(
    refused, searched: Callable[..., Searched], override: str, expected: str
) -> None:
    found = searched("node")
    before = {path: path.read_bytes() for path in found.dir.iterdir() if path.is_file()}
    files = whole_shards(found.dir)
    assert expected in refused("search", found.config, override)
    assert whole_shards(found.dir) == files
    assert {path: path.read_bytes() for path in found.dir.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2, "fixed": {}, "inputs": {}}'])
def test_a_damaged_origin(refused, searched: Callable[..., Searched], tmp_path: Path, text: str) -> None:
    found = searched("node")
    shutil.copytree(found.dir, tmp_path / "run")
    (tmp_path / "run" / "search.json").write_text(text)
    assert "search.json" in refused("search", found.config, f"run.dir={tmp_path / 'run'}")
    assert tree_files(tmp_path / "run") == tree_files(found.dir)


def test_a_search_where_a_training_run_is(refused, policy: Path, finished_run: FinishedRun, tmp_path: Path) -> None:
    config = write_config(tmp_path, search_config(policy, 8))
    assert "holds a training run" in refused("search", config, f"run.dir={finished_run.dir}")
    assert "found none" in refused("extract", str(finished_run.dir))


@pytest.mark.long
def test_a_large_model_builds_the_data_of_a_small_one(
    policy: Path, start: Callable[..., Command], tmp_path: Path
) -> None:
    """search.model grows, search.reviewer writes the thinking nodes; the policy has a tokenizer of its own (BPE)."""
    small = tmp_path / "small"
    tokenizer = build_bpe_model(small, ["<thinking>a1b2</thinking><answer>2</answer> count a in abba 0123456789"] * 50)
    values = search_config(small, prompts=8)
    thinking = {"tag": "thinking", "writer": "reviewer"}
    large = {"path": str(policy), "max_model_len": 128, "max_num_seqs": 16, "kv_cache_gib": 0.1}
    values["search"] |= {
        "nodes": {**values["search"]["nodes"], "thinking": thinking},
        "model": large,
        "reviewer": dict(large),  # YAML would write the same one as an alias
    }
    config = write_config(tmp_path, values)
    for expansion in ("node", "chain"):
        run_dir = tmp_path / expansion
        chosen = (f"run.dir={run_dir}", f"search.expansion={expansion}", "actors.count=1")
        start("search", config, *chosen).finish()
        trees = [tree for path in sorted((run_dir / "trees").glob("*.jsonl")) for tree in read_trees(path)]
        assert len(trees) == 8 and all(isinstance(tree, Tree) and tree.proposer == "model" for tree in trees)
        nodes = [node for tree in trees if isinstance(tree, Tree) for node in tree.nodes[1:]]
        assert {node.writer for node in nodes} == {"model", "reviewer"}
        assert all((node.writer == "reviewer") == (node.type == "thinking") for node in nodes if not node.defect)
        assert any(node.writer == "reviewer" and not node.defect for node in nodes)
        start("extract", str(run_dir)).finish()
        rows = [json.loads(line) for line in (run_dir / "data" / "supervised.jsonl").read_text().splitlines()]
        assert rows
        for row in rows:
            ids = [token for token, kept in zip(row["token_ids"], row["loss_mask"], strict=True) if kept]
            assert tokenizer.decode(ids[:-1]) == row["completion"] and ids[-1] == tokenizer.eos_token_id
        report = json.loads((run_dir / "data" / "report.json").read_text())
        assert report["solved"] == len(rows)
        assert {use["model"] for use in summary(run_dir)["last_command"]["engines"]} == {"model", "reviewer"}
