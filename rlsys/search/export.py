"""Export of searched trees as training tables. `rlsys.tables.schemas` declares and explains the columns."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.config.patterns import resolve
from rlsys.config.schema import Config
from rlsys.config.search import ExtractConfig
from rlsys.config.tasks import WITHOUT_STEPS
from rlsys.directory import CARD, REPORT, SearchDirectory
from rlsys.errors import ConfigError, DataError
from rlsys.models.folder import ModelFolder
from rlsys.search import extract
from rlsys.search.codec import TagCodec
from rlsys.search.marks import marked_nodes, read_marks, without_chains
from rlsys.search.paths import prompt_tokens
from rlsys.search.scores import ScoreFile
from rlsys.search.stats import StepCheck
from rlsys.search.step_chains import StepChain, step_chains
from rlsys.search.supervised import SupervisedRow, supervised_rows
from rlsys.search.tree_index import shards
from rlsys.search.tree_json import read_trees
from rlsys.tables.schemas import TABLES
from rlsys.tables.write import TableFiles, whole_or_nothing
from rlsys.tasks import build_task
from rlsys.trees import Tree, TreeFailure
from rlsys.types import BoolArray, Int32Array


@dataclass(frozen=True, slots=True)
class Source:
    """A folder of trees and the policy that is trained on them."""

    config: Config
    trees: Path
    codec: TagCodec
    tokenizer: Any

    def text(self, token_ids: Any) -> str:
        """Return the text of a prompt, including its end-of-turn tokens."""
        return self.tokenizer.decode(token_ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def source_of(config: Config, trees: Path, model: ModelFolder) -> Source:
    """Return the source for a folder of trees and the policy that is trained on them."""
    tags = sorted({kind.tag for pattern in resolve(config.search).values() for kind in pattern.types.values()})
    codec = TagCodec(model.tokenizer, tags, model.end_token_ids, digest=model.tokenizer_digest)
    return Source(config, trees, codec, model.tokenizer)


def run(source: Source, output: Path) -> dict[str, Any]:
    """Write all tables and the report into a folder, and return the report.

    One tree is in memory at a time. The first of several rows with the same tokens is written; the others are counted.

    Raises:
        DataError: A line of the tree files is damaged. The message names file and line, and nothing is written.
        ConfigError: A policy with another tokenizer grew a tree.
    """
    with whole_or_nothing(output) as folder:
        with ExitStack() as stack:
            files = {table.name: stack.enter_context(TableFiles(folder, table)) for table in TABLES}
            extraction = _Extraction(source, files)
            for path in shards(source.trees):
                for tree in read_trees(path):
                    extraction.add(tree)
        report = extraction.report()
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        nodes = source.config.extract.supervised_rows == "node"
        (folder / CARD).write_text(card(report["rows"], nodes=nodes), encoding="utf-8")
    return report


def report_fault(content: bytes) -> str:
    """Return why the content of a file is not that of a report which `run` wrote, or ""."""
    try:
        report = json.loads(content)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(report, dict):
        return f"expected a JSON object, found {type(report).__name__}"
    kinds = {"trees": int, "failed": int, "rows": dict, "duplicates": dict, "trees_without_pair": dict}
    lacks = [name for name, kind in kinds.items() if not isinstance(report.get(name), kind)]
    return f"expected its key {lacks[0]}" if lacks else ""


def card(rows: Mapping[str, int], *, nodes: bool = False) -> str:
    """Return the dataset card, by which `datasets.load_dataset(FOLDER, TABLE)` finds the tables that have rows.

    Without a TABLE it loads the first of them.

    Args:
        nodes: whether a row of the table `supervised` is a node, not a chain.
    """
    files = [f"- config_name: {name}\n  data_files: {name}.parquet" for name, count in rows.items() if count]
    files[:1] = [f"{first}\n  default: true" for first in files[:1]]
    lines = ["---", "configs:", *files, "---", ""] if files else []
    lines += ["# Data from tree search", "", "| table | rows | |", "|---|---|---|"]
    meanings = MEANINGS | ({"supervised": "nodes of right chains, each after all nodes before it"} if nodes else {})
    lines += [f"| {name} | {count:,} | {meanings[name]} |" for name, count in rows.items()]
    goes_on = "Rows of `supervised` and nodes of the step tables go on" if nodes else "Nodes of the step tables go on"
    lines += [
        "",
        "`prompt` is the text that the policy receives, with its chat template; a trainer must add no template. Each "
        "table also has the exact token ids and a mask of the tokens to train. Whole chains lack their end token as "
        f"text, and a trainer must append it. {goes_on}: a trainer must not append an end token to them.",
    ]
    return "\n".join(lines) + "\n"


MEANINGS = {
    "supervised": "right chains to imitate",
    "preferences": "a right and a wrong chain of one prompt",
    "step_preferences": "a better and a worse node after the same chain; no end token follows",
    "step_values": "chains of nodes with a value each, as for a process reward model; `known` nodes stand in an "
    "earlier row of the tree too",
}


class _Extraction:
    """Writer of the rows of all trees, with their statistics."""

    def __init__(self, source: Source, files: Mapping[str, TableFiles]) -> None:
        self._source, self._files = source, files
        by_scores = source.config.extract.supervised == "divergence"
        self._scores = ScoreFile(SearchDirectory(source.trees.parent).scores) if by_scores else None
        self._marks = read_marks(SearchDirectory(source.trees.parent).marks)
        self._check_steps = _step_check(source.config)
        self._counts = Counter[str]()
        self._without_pair = Counter[str]()
        self._origins = Counter[str]()
        self._lengths: defaultdict[str, list[int]] = defaultdict(list)

    def add(self, tree: Tree | TreeFailure) -> None:
        if isinstance(tree, TreeFailure):
            self._counts["failed"] += 1
            return
        codec = self._source.codec
        digest = tree.tokenizers.get("policy", codec.digest)
        if digest != codec.digest:
            raise ConfigError(
                f"{self._source.trees}: the tree of {tree.prompt_id} was grown by a policy with another tokenizer "
                f"(digest {digest[:12]}) than model.path has ({codec.digest[:12]}): set model.path to the model that "
                "grew it"
            )
        marked = marked_nodes(tree, self._marks)
        self._counts["marked"] += len(marked)
        tree = without_chains(tree, marked) if marked else tree
        self._counts["trees"] += 1
        self._counts["solved"] += tree.solved
        prompt = self._source.text(prompt_tokens(tree, codec))
        self._add_supervised(tree, prompt)
        self._add_pairs(tree, prompt)
        config = self._source.config.extract
        for better, worse in extract.preferred_steps(tree, config, codec):
            self._files["step_preferences"].add(_step_preference_row(tree, prompt, better, worse))
        steps = extract.step_values(tree, codec, config.step_value) if config.step_values else []
        for chain in step_chains(steps):
            self._files["step_values"].add(_step_values_row(tree, prompt, chain))

    def _add_supervised(self, tree: Tree, prompt: str) -> None:
        for row in supervised_rows(tree, self._source.config.extract, self._source.codec, self._scores):
            columns = _supervised_row(tree, prompt, row)
            if self._files["supervised"].add(columns):
                self._lengths["supervised"].append(columns["length"])
                verdict = self._check_steps(tree.question, columns["completion"]) if self._check_steps else None
                self._counts["checked"] += verdict is not None
                self._counts["every_step_right"] += verdict is not None and verdict.wrong_node is None

    def _add_pairs(self, tree: Tree, prompt: str) -> None:
        config, codec = self._source.config.extract, self._source.codec
        pairs = extract.preferred_chains(tree, config, codec)
        if not pairs and config.chosen != "none":
            self._without_pair[_why_no_pair(tree, config)] += 1
        for chosen, rejected in pairs:
            row = _preference_row(tree, prompt, chosen, rejected)
            if self._files["preferences"].add(row):
                self._lengths["chosen"].append(chosen.length)
                self._lengths["rejected"].append(rejected.length)
                self._lengths["common_prefix"].append(row["common_prefix"] - chosen.prompt_length)
                for chain in (chosen, rejected):
                    self._origins.update(extract.token_origins(tree, chain.number, codec))

    def report(self) -> dict[str, Any]:
        """Return the report. Lengths are in tokens after the prompt; those of chains include the end token."""
        trees, failed = self._counts["trees"], self._counts["failed"]
        prompts = self._source.config.search.prompts
        names = ("supervised", "chosen", "rejected", "common_prefix")
        return {
            "trees": trees,
            "failed": failed,
            "solved": self._counts["solved"],
            "missing": max(0, prompts - trees - failed),
            "marked": self._counts["marked"],
            "rows": {name: file.rows for name, file in self._files.items()},
            "duplicates": {name: file.duplicates for name, file in self._files.items()},
            "supervised_steps": {name: self._counts[name] for name in ("checked", "every_step_right")},
            "tokens": {name: _quantiles(self._lengths[name]) for name in names},
            "pair_tokens": {name: self._origins[name] for name in ("policy", "forced", "other_model")},
            "trees_without_pair": {name: self._without_pair[name] for name in NO_PAIR},
        }


def _step_check(config: Config) -> StepCheck | None:
    """Return what judges the steps of supervised chains; None for rows of nodes, and for tasks that cannot tell."""
    if config.extract.supervised_rows == "node" or config.task.type in WITHOUT_STEPS:
        return None
    try:
        return build_task(config.task, config.run.seed).check_steps
    except (ConfigError, DataError):  # the trees may have come from a machine that has the task's files
        return None


NO_PAIR = {
    "no_answer": "no judged answer",
    "no_correct": "no correct answer",
    "no_wrong": "no wrong answer",
    "equal_tokens": "right and wrong chains have the same tokens",
    "by_rule": "extract.pairs or extract.max_backtracks leaves none",
}


def _why_no_pair(tree: Tree, config: ExtractConfig) -> str:
    has_wrong = any(extract.is_wrong(tree.nodes[number]) for number in tree.answers())
    if tree.solved:
        if has_wrong and (config.pairs == "same_type" or config.max_backtracks is not None):
            return "by_rule"
        return "equal_tokens" if has_wrong else "no_wrong"
    return "no_correct" if has_wrong else "no_answer"


def _supervised_row(tree: Tree, prompt: str, row: SupervisedRow) -> dict[str, Any]:
    return {
        "prompt": prompt + row.prefix,
        "completion": row.text,
        "prompt_id": tree.prompt_id,
        "token_ids": row.token_ids.tolist(),
        "loss_mask": row.loss_mask.tolist(),
        "reward": row.chain.reward,
        "length": len(row.token_ids) - row.prompt_length,
        "pattern": tree.pattern,
        "value": row.chain.value,
    }


def _preference_row(tree: Tree, prompt: str, chosen: extract.Chain, rejected: extract.Chain) -> dict[str, Any]:
    pair = extract.preference(chosen, rejected)
    return {
        "prompt": prompt,
        "chosen": chosen.text,
        "rejected": rejected.text,
        "prompt_id": tree.prompt_id,
        "chosen_ids": pair.chosen_ids.tolist(),
        "rejected_ids": pair.rejected_ids.tolist(),
        "prompt_length": pair.prompt_length,
        "common_prefix": pair.common,
        "chosen_visits": pair.chosen_visits,
        "rejected_visits": pair.rejected_visits,
        "chosen_loss_mask": _after(pair.common, pair.chosen_ids, pair.chosen_mask),
        "rejected_loss_mask": _after(pair.common, pair.rejected_ids, pair.rejected_mask),
        "chosen_mask": None if pair.chosen_mask is None else pair.chosen_mask.tolist(),
        "rejected_mask": None if pair.rejected_mask is None else pair.rejected_mask.tolist(),
    }


def _after(common: int, ids: Int32Array, written: BoolArray | None) -> list[bool]:
    """Return the loss mask of a side: its tokens after the common prefix, without replies of an environment."""
    after = np.arange(len(ids)) >= common
    mask: list[bool] = (after if written is None else after & written).tolist()
    return mask


def _step_preference_row(
    tree: Tree, prompt: str, better: extract.StepValue, worse: extract.StepValue
) -> dict[str, Any]:
    pair = extract.step_preference(better, worse)
    return {
        "prompt": prompt + better.prefix,
        "chosen": better.text,
        "rejected": worse.text,
        "prompt_id": tree.prompt_id,
        "prompt_ids": pair.prefix_ids.tolist(),
        "chosen_ids": pair.chosen_ids.tolist(),
        "rejected_ids": pair.rejected_ids.tolist(),
        "chosen_value": pair.chosen_value,
        "rejected_value": pair.rejected_value,
        "chosen_visits": pair.chosen_visits,
        "rejected_visits": pair.rejected_visits,
        "chosen_loss_mask": better.loss_mask[better.start :].tolist(),
        "rejected_loss_mask": worse.loss_mask[worse.start :].tolist(),
    }


def _step_values_row(tree: Tree, prompt: str, chain: StepChain) -> dict[str, Any]:
    steps = chain.steps
    return {
        "prompt": prompt + steps[0].prefix,
        "completions": [step.text for step in steps],
        "prompt_id": tree.prompt_id,
        "token_ids": steps[-1].token_ids.tolist(),
        "start": steps[0].start,
        "ends": [len(step.token_ids) for step in steps],
        "types": [step.type for step in steps],
        "values": [step.value for step in steps],
        "visits": [step.visits for step in steps],
        "known": chain.known,
        "loss_mask": chain.loss_mask.tolist(),
    }


QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "max": 1.0}


def _quantiles(lengths: Sequence[int]) -> dict[str, float] | None:
    if not lengths:
        return None
    return {name: float(np.quantile(lengths, share)) for name, share in QUANTILES.items()}
