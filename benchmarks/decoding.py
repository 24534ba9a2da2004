"""One answer for each prompt without a verifier: accuracy against generated tokens, for samples, beams and trees.

`python benchmarks/decoding.py [--tasks hard_letter_count] [--write]`

Every arm has the same policy and the same held-out prompts, and gives one answer for as many tokens:

- the first sample;
- the majority of the samples, and the same, ended as soon as the leading answer is sure (adaptive consistency);
- the best of the samples by their mean log-probability;
- beam search over tokens by transformers, as wide as the tokens allow; the beam with the best score is the answer;
- tree search by surprise whose rewards are the agreement of its answers; the majority of its distinct chains is the
  answer.

All generated tokens count, discarded ones too; tokens that a search keeps from an earlier chain are not generated. No
arm sees a verdict. Votes compare texts, so the tasks are those with one right answer to a problem. There is no limit to
meet: the table is the result.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`
sys.path.append(str(ROOT / "benchmarks"))

import search_page  # noqa: E402
from search_use import CHAIN, SAMPLES, TASKS, Cells, config_of, find_policy, measure, prompts_of  # noqa: E402

from rlsys.config.schema import Config  # noqa: E402
from rlsys.evaluation.records import candidates, samples_of  # noqa: E402
from rlsys.files import write_json  # noqa: E402
from rlsys.interfaces import Task  # noqa: E402
from rlsys.models.folder import ModelFolder  # noqa: E402
from rlsys.search.compare import Attempts  # noqa: E402
from rlsys.search.votes import Candidate, best, majority, until_sure, within  # noqa: E402
from rlsys.stats import mean_over_prompts  # noqa: E402
from rlsys.tasks import build_task  # noqa: E402
from rlsys.tasks.answers.normalise import normalise  # noqa: E402
from rlsys.trees import Tree, TreeFailure, answer_text  # noqa: E402
from rlsys.types import Prompt, Trajectory, TrajectoryGroup  # noqa: E402

BUDGETS = (64, 128, 256, 512)
SURE = 0.95
ONE_ANSWER = ("letter_count", "hard_letter_count", "sums")  # tasks whose problems have one right answer, for the vote
WIDTHS = (1, 2, 4, 8)
TREE = "tree by surprise, agreement"
SEARCH = [
    *CHAIN,
    "search.backtracking=false",
    "search.selection={type: surprise}",
    "search.value={type: agreement}",
    f"search.stop={{simulations: {max(BUDGETS)}, tokens: {max(BUDGETS)}, correct: []}}",
]
FITTING = 0.9  # share of the prompts whose beams must end within a budget
BATCH = 64  # prompts that are decoded by beams at once
CHOICES: Mapping[str, tuple[str, Callable[[Sequence[Candidate]], Candidate | None]]] = {
    "first sample": (SAMPLES, lambda drawn: drawn[0] if drawn else None),
    "majority": (SAMPLES, majority),
    f"majority, ended at {SURE:g}": (SAMPLES, lambda drawn: majority(until_sure(drawn, SURE))),
    "best mean log-probability": (SAMPLES, best),
    TREE: (TREE, majority),
}


class ChoiceCells(Cells):
    """The candidates of one arm, a file for each seed."""

    def enough(self, drawn: Attempts) -> bool:
        return drawn.total >= max(BUDGETS)

    def tree_row(self, task: Task, tree: Tree | TreeFailure) -> Any:
        """Return the answers of a tree in the order of their arrival. Each has one vote, because nobody kept when a
        chain was drawn again."""
        if isinstance(tree, TreeFailure):
            return _row([])
        answers = [tree.nodes[number] for number in tree.answers()]
        return _row(
            [
                Candidate(
                    text=normalise(answer_text(node.text)),
                    right=node.correct,
                    tokens=node.scored_tokens,
                )
                for node in answers
            ]
        )

    def samples_row(self, task: Task, prompt: Prompt, drawn: Sequence[Trajectory], tokenizer: Any) -> Any:
        group = TrajectoryGroup(prompt=prompt, trajectories=tuple(drawn))
        return _row(candidates(samples_of(group, ModelFolder(self.policy))))


def _row(candidates: Sequence[Candidate]) -> dict[str, Any]:
    total = candidates[-1].tokens if candidates else 0
    return {"candidates": [asdict(each) for each in candidates], "total": total}


def beams(config: Config, policy: Path, prompts: Sequence[Prompt], width: int) -> list[list[Any]]:
    """Return the best beam of every prompt as [right, generated tokens].

    With early stopping, a prompt is finished once `width` beams have ended, so every beam takes as many steps as the
    longest of them has tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    tokenizer, task = ModelFolder(policy).tokenizer, build_task(config.task, config.run.seed)
    rows = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        longest = max(len(prompt.token_ids) for prompt in batch)
        ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
        for row, prompt in zip(ids, batch, strict=True):
            row[longest - len(prompt.token_ids) :] = torch.from_numpy(prompt.token_ids.astype(np.int64))
        found = model.generate(
            ids,
            attention_mask=(ids != tokenizer.pad_token_id).long(),
            num_beams=width,
            num_return_sequences=width,
            early_stopping=True,
            do_sample=False,
            max_new_tokens=config.sampling.max_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )[:, longest:].reshape(len(batch), width, -1)
        for prompt, of_prompt in zip(batch, found.tolist(), strict=True):
            lengths = [beam_length(beam, tokenizer.eos_token_id) for beam in of_prompt]
            first, ended = of_prompt[0][: lengths[0]], tokenizer.eos_token_id in of_prompt[0]
            text = tokenizer.decode(first[:-1] if ended else first)
            verdict = task.verify(prompt.problem, text, ended)
            rows.append([verdict.correct, width * max(lengths)])
    return rows


def beam_length(ids: Sequence[int], end_token_id: int) -> int:
    """Return the number of tokens of a beam with its end token, without what fills it up behind that."""
    return ids.index(end_token_id) + 1 if end_token_id in ids else len(ids)


def beam_rows(config: Config, policy: Path, seeds: int, count: int, folder: Path) -> dict[int, list[list[Any]]]:
    """Return the rows of all beams by width. A file for each width is made once for the same weights and prompts."""
    found, asked = {}, [*Cells("beams", folder, config, policy, count).asked, str(seeds)]
    for width in WIDTHS:
        path = folder / f"beams-{width}.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("asked") != asked:
            prompts = [prompt for seed in range(seeds) for prompt in prompts_of(config, policy, seed, count)]
            folder.mkdir(parents=True, exist_ok=True)
            kept = {"asked": asked, "rows": beams(config, policy, prompts, width)}
            write_json(path, kept)
        found[width] = kept["rows"]
    return found


def table(cells: Mapping[str, Sequence[Mapping[str, Any]]], beams: Mapping[int, Sequence[Sequence[Any]]]) -> list[str]:
    """Return the accuracy of every arm at every budget as Markdown."""
    heads = [*CHOICES, "beam search (width)"]
    lines = [f"| tokens | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    drawn = {arm: [[Candidate(**each) for each in row["candidates"]] for row in rows] for arm, rows in cells.items()}
    for budget in BUDGETS:
        shown = [f"{budget}"]
        for arm, choose in CHOICES.values():
            chosen = [choose(within(each, budget)) for each in drawn[arm]]
            shown.append(_share([each is not None and each.right for each in chosen]))
        shown.append(_widest(beams, budget))
        lines.append(f"| {' | '.join(shown)} |")
    samples = drawn[SAMPLES]
    spent = [ended[-1].tokens for each in samples if (ended := until_sure(within(each, max(BUDGETS)), SURE))]
    whole = [used[-1].tokens for each in samples if (used := within(each, max(BUDGETS)))]
    lines += ["", f"With {max(BUDGETS)} tokens, the ended majority uses {np.mean(spent) / np.mean(whole):.2f} of them."]
    widths = ", ".join(
        f"{width}: {_share([right for right, _ in rows])} with {np.mean([tokens for _, tokens in rows]):.0f} tokens"
        for width, rows in beams.items()
    )
    return [*lines, "", f"Beam search by width (width 1 is greedy): {widths}."]


def _widest(beams: Mapping[int, Sequence[Sequence[Any]]], budget: int) -> str:
    """Return the accuracy of the widest beams that end within a budget for 9 of 10 prompts; others count as wrong."""
    fitting = [width for width, rows in beams.items() if np.mean([tokens <= budget for _, tokens in rows]) >= FITTING]
    if not fitting:
        return "none"
    return f"{_share([right and tokens <= budget for right, tokens in beams[max(fitting)]])} ({max(fitting)})"


def _share(right: Sequence[bool]) -> str:
    estimate = mean_over_prompts(np.array(right, dtype=float)[:, None])
    return f"{estimate.mean:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=ONE_ANSWER, default=list(ONE_ANSWER))
    parser.add_argument("--prompts", type=int, default=256, help="number of held-out prompts of a seed")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--folder", type=Path, default=Path("runs/decoding"))
    parser.add_argument("--policies", type=Path, default=Path("runs/search_use/policies"), help="made if missing")
    parser.add_argument("--write", action="store_true", help=f"write the figures of {search_page.PAGE.name}")
    arguments = parser.parse_args()
    for name in arguments.tasks:
        setup, own = TASKS[name], arguments.folder / name
        policy = find_policy(setup, arguments.policies)
        config = config_of(setup, policy, SEARCH)
        cells = [ChoiceCells(arm, own, config, policy, arguments.prompts) for arm in (SAMPLES, TREE)]
        with tempfile.TemporaryDirectory() as run_dir:
            asyncio.run(measure(cells, range(arguments.seeds), Path(run_dir)))
        rows = {cell.arm: [row for seed in range(arguments.seeds) for row in cell.read(seed) or []] for cell in cells}
        lines = table(rows, beam_rows(config, policy, arguments.seeds, arguments.prompts, own))
        print("\n".join(["", name, "", *lines]))
        if arguments.write:
            begin = f"<!-- decoding {name}: written by benchmarks/decoding.py -->"
            search_page.results_page.write_section(search_page.PAGE, begin, "<!-- end -->", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
