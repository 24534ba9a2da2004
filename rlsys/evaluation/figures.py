"""The figures of one model on one task, from its judged completions, as JSON-able values.

The figures `by_problem` are means over the samples of each problem, in order. Paired comparisons and intervals come
from them, because samples of one problem are not independent.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rlsys.evaluation.detectors import Signs, signs
from rlsys.evaluation.records import Rows, Sample, candidates, problems_digest
from rlsys.interfaces import Task
from rlsys.search.votes import Candidate, majority
from rlsys.stats import bootstrap_mean, mean_over_prompts, pass_at_k
from rlsys.types import Prompt

# Answers with fewer problems are left out of the macro mean, because their accuracy is uncertain.
MACRO_MINIMUM = 30
DETECTORS = ("repetition", "over_reflection", "ignored_instruction")
ENDS = ("accuracy", "no_answer_rate", "truncated_rate", "out_of_turns_rate")
RATES = (*ENDS, *DETECTORS)
"""Figures `by_problem` that are shares."""
LONGEST_REASON = 60
QUOTED = re.compile(r"(?<!\w)'.*?'(?!\w)|\".*?\"")


def result_figures(
    task: Task, prompts: Sequence[Prompt], modes: Mapping[str, Rows], search: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return all figures of a model on a task.

    Args:
        task: judges the steps of right chains.
        prompts: the problems.
        modes: the samples of every problem, by mode ("greedy", "sampled").
        search: the results of `rlsys.control.search_evaluation.search_and_sample`; None without them.
    """
    sampled = modes.get("sampled", ())
    samples = len(sampled[0]) if sampled else 0
    figures: dict[str, Any] = {
        "problems": len(prompts), "samples": samples, "problems_digest": problems_digest(prompts),
    }  # fmt: skip
    for mode, rows in modes.items():
        figures[mode] = mode_figures(task, prompts, rows)
    if sampled:
        right = _flags(sampled, "right")
        ks = sample_counts(samples)
        figures["pass_at_k"] = {str(k): asdict(mean_over_prompts(pass_at_k(right, k))) for k in ks}
    if samples > 1:
        drawn = [candidates(row) for row in sampled]
        votes = {k: majority_right(drawn, k) for k in ks if k > 1}
        figures["majority_at_k"] = {str(k): asdict(mean_over_prompts(right)) for k, right in votes.items()}
        by_problem = figures["sampled"]["by_problem"]
        by_problem |= {f"majority@{k}": right.astype(float)[:, 0].tolist() for k, right in votes.items()}
    if search is not None:
        figures["search"] = dict(search)
    if task.one_answer:
        [(answer, count)] = Counter(prompt.answer for prompt in prompts).most_common(1)
        figures["constant_answer"] = {"answer": answer, "accuracy": count / len(prompts)}
    return figures


def sample_counts(samples: int) -> list[int]:
    """Return the values of k for pass@k: the powers of two up to the number of samples, and this number."""
    return sorted({*(2**power for power in range(samples.bit_length())), samples} & set(range(1, samples + 1)))


def mode_figures(task: Task, prompts: Sequence[Prompt], rows: Rows) -> dict[str, Any]:
    """Return the figures of one way of sampling."""
    right = _flags(rows, "right")
    lengths = np.array([[sample.tokens for sample in row] for row in rows])
    rewards = np.array([[sample.reward for sample in row] for row in rows])
    row_signs = [[signs(sample) for sample in row] for row in rows]
    values: dict[str, np.ndarray] = {
        "accuracy": right,
        "no_answer_rate": _flags(rows, "judged") & ~_flags(rows, "answered"),
        "truncated_rate": _flags(rows, "truncated"),
        "out_of_turns_rate": _flags(rows, "out_of_turns"),
        **{name: _flags(row_signs, name) for name in DETECTORS},
    }
    return {
        **{name: asdict(mean_over_prompts(values[name])) for name in ENDS},
        "reward": asdict(bootstrap_mean(rewards)),
        "error_rate": float(1 - _flags(rows, "judged").mean()),
        "completion_length": float(lengths.mean()),
        "completion_lengths": {
            "mean": asdict(bootstrap_mean(lengths)),
            "median": float(np.median(lengths)),
            "quantile_95": float(np.quantile(lengths, 0.95)),
        },
        "every_step_right": every_step_right(task, prompts, rows),
        "thinking": thinking_figures(prompts, rows, row_signs, values),
        **(_by_answer([prompt.answer for prompt in prompts], right) if task.one_answer else {}),
        "by_problem": {
            **{name: array.mean(axis=1).tolist() for name, array in values.items()},
            "reward": rewards.mean(axis=1).tolist(),
            "completion_length": lengths.mean(axis=1).tolist(),
        },
    }


def thinking_figures(
    prompts: Sequence[Prompt], rows: Rows, row_signs: Sequence[Sequence[Signs]], values: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Return shares and completions of every detector of formalistic thinking."""
    flat = [each for row in row_signs for each in row]
    counted = np.array([[each.reflections for each in row] for row in row_signs])
    repeated = np.array([[each.repeated_ngrams for each in row] for row in row_signs])
    reasons = Counter(_reason(s) for s, sign in _pairs(rows, row_signs) if sign.ignored_instruction)
    total, idle = sum(each.reflections for each in flat), sum(each.idle_reflections for each in flat)
    more: dict[str, dict[str, Any]] = {
        "repetition": {"repeated_ngrams": asdict(bootstrap_mean(repeated))},
        "over_reflection": {
            "reflections": asdict(bootstrap_mean(counted)), "idle_share": idle / total if total else None,
        },
        "ignored_instruction": {"reasons": dict(reasons.most_common())},
    }  # fmt: skip
    return {
        name: {
            "share": asdict(mean_over_prompts(values[name])),
            **more[name],
            "completions": _completions(name, prompts, rows, row_signs),
        }
        for name in DETECTORS
    }


def _completions(
    name: str, prompts: Sequence[Prompt], rows: Rows, row_signs: Sequence[Sequence[Signs]]
) -> list[dict[str, Any]]:
    """Return the completions that a detector names, in order, each with its evidence."""
    return [
        {"problem": prompt.prompt_id, "sample": number, "evidence": _evidence(name, sample, sign), "text": sample.text}
        for prompt, row, of_row in zip(prompts, rows, row_signs, strict=True)
        for number, (sample, sign) in enumerate(zip(row, of_row, strict=True))
        if getattr(sign, name)
    ]


def _evidence(name: str, sample: Sample, sign: Signs) -> str:
    if name == "repetition":
        return sign.loop or f"{sign.repeated_ngrams:.2f} of the n-grams are repeated"
    if name == "over_reflection":
        return f"{sign.reflections} reflections, {sign.idle_reflections} idle"
    return sample.reason


def _reason(sample: Sample) -> str:
    """Return the verifier's reason without the text that it quotes."""
    return QUOTED.sub("...", sample.reason)[:LONGEST_REASON] or "no reason given"


def _pairs(rows: Rows, row_signs: Sequence[Sequence[Signs]]) -> list[tuple[Sample, Signs]]:
    return [pair for row, of_row in zip(rows, row_signs, strict=True) for pair in zip(row, of_row, strict=True)]


def every_step_right(task: Task, prompts: Sequence[Prompt], rows: Rows) -> dict[str, int]:
    """Return how many right chains the task can check (`checked`), and how many have every step right (`right`)."""
    verdicts = [
        task.check_steps(prompt.question, sample.text)
        for prompt, row in zip(prompts, rows, strict=True)
        for sample in row
        if sample.right
    ]
    checked = [verdict.wrong_node is None for verdict in verdicts if verdict is not None]
    return {"right": sum(checked), "checked": len(checked)}


def majority_right(drawn: Sequence[Sequence[Candidate]], k: int) -> np.ndarray:
    """Return whether the most frequent answer among the first k samples is right, [problems, 1] bool."""
    chosen = [majority(each[:k]) for each in drawn]
    return np.array([[each is not None and each.right] for each in chosen])


def _flags(rows: Sequence[Sequence[Any]], name: str) -> np.ndarray:
    """Return an attribute of every sample, [problems, samples] bool."""
    return np.array([[getattr(each, name) for each in row] for row in rows], dtype=bool)


def _by_answer(answers: Sequence[str], right: np.ndarray) -> dict[str, Any]:
    labels = np.array(answers)
    rows = {answer: right[labels == answer] for answer in sorted(set(answers))}
    macro = [float(row.mean()) for row in rows.values() if len(row) >= MACRO_MINIMUM]
    return {
        "accuracy_by_answer": {
            answer: {"problems": len(row), "accuracy": float(row.mean())} for answer, row in rows.items()
        },
        "macro_accuracy": float(np.mean(macro)) if macro else None,
    }
