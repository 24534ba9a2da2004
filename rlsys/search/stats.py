"""Statistics of many trees and of the engines that generated them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import numpy as np

from rlsys.interfaces import EngineStats
from rlsys.stats import mean_over_prompts
from rlsys.trees import Defect, Role, Tree, TreeFailure
from rlsys.types import Question, StepVerdict

StepCheck = Callable[[Question, str], StepVerdict | None]
"""Judge of the steps of a chain, as `rlsys.interfaces.Task.check_steps`."""


@dataclass(slots=True)
class TreeFigures:
    """Sums over trees. The order of the trees has no influence.

    Attributes:
        failed: Number of failed trees.
        solved: Whether a tree has a correct answer, by the number of its prompt.
        agreed: Number of trees whose most frequent answer is correct.
        stops: Number of trees by reason of their end.
        counts: Sums of `Tree.counts`.
        whole: Number of nodes without a defect, by type.
        defective: Number of other nodes, by type and defect.
        check_steps: Judges the steps of a chain, see `rlsys.interfaces.Task`; None to judge none.
        checked: Number of trees whose first right chain has steps that can be judged.
        sound: Number of these chains whose every step is right.
    """

    check_steps: StepCheck | None = None
    checked: int = 0
    sound: int = 0
    failed: int = 0
    solved: dict[int, bool] = field(default_factory=dict)
    agreed: int = 0
    scored: int = 0
    correct: int = 0
    simulations: int = 0
    calls: int = 0
    tokens: int = 0
    stops: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    whole: Counter[str] = field(default_factory=Counter)
    defective: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, number: int, tree: Tree | TreeFailure) -> None:
        if isinstance(tree, TreeFailure):
            self.failed += 1
            return
        self.solved[number] = tree.solved
        self.agreed += (best := tree.most_frequent) is not None and tree.nodes[best].correct
        self.scored += len(tree.answers())
        self.correct += sum(node.correct for node in tree.nodes)
        self.simulations += tree.simulations
        self.calls += tree.calls
        self.tokens += tree.tokens
        self.stops[tree.stop] += 1
        self.counts.update(tree.counts)
        for node in tree.nodes[1:]:
            if node.defect is None:
                self.whole[node.type] += 1
            else:
                self.defective.setdefault(node.type, Counter())[node.defect] += 1

        self._check(tree)

    def _check(self, tree: Tree) -> None:
        """Count the first right chain of a tree, and whether every step of it is right."""
        right = [number for number in tree.answers() if tree.nodes[number].correct]
        if not right or self.check_steps is None:
            return
        verdict = self.check_steps(tree.question, tree.completion(right[0]))
        self.checked += verdict is not None
        self.sound += verdict is not None and verdict.wrong_node is None

    @property
    def solved_fraction(self) -> float | None:
        """Share of the trees with a correct answer. Failed trees do not count."""
        return sum(self.solved.values()) / len(self.solved) if self.solved else None

    def never_whole(self, types: Iterable[str]) -> dict[str, str]:
        """Return the types of which no node came whole, each with the defects of its nodes."""
        defects = {name: self.defective.get(name, Counter()).most_common() for name in types if not self.whole[name]}
        return {name: _listed(counts) if counts else "none was begun" for name, counts in defects.items()}

    def report(self) -> dict[str, Any]:
        """Return figures for JSON. Only the trees determine them."""
        trees = len(self.solved)
        solved = np.array([[self.solved[number]] for number in sorted(self.solved)], dtype=float)
        return {
            "trees": trees,
            "failed": self.failed,
            "solved": asdict(mean_over_prompts(solved)) if trees else None,
            "most_frequent_answer_correct": _ratio(self.agreed, trees),
            "first_right_chains": {"checked": self.checked, "every_step_right": self.sound},
            "scored_answers": self.scored,
            "right_answers_per_tree": _ratio(self.correct, trees),
            "simulations": self.simulations,
            "calls": self.calls,
            "calls_per_scored_answer": _ratio(self.calls, self.scored),
            "generated_tokens": self.tokens,
            "tokens_per_scored_answer": _ratio(self.tokens, self.scored),
            "stops": dict(sorted(self.stops.items())),
            "counts": dict(sorted(self.counts.items())),
        }


@dataclass(slots=True)
class EngineFigures:
    """Sums of engine statistics. `in_flight_mean` is averaged over intervals, weighted by the busy seconds."""

    usages: dict[tuple[Role, int], EngineStats] = field(default_factory=dict)

    def add(self, usages: Iterable[EngineStats]) -> None:
        for usage in usages:
            key = (usage.model, usage.engine)
            self.usages[key] = _sum(self.usages[key], usage) if key in self.usages else usage

    def report(self, wall_s: float, grown: int) -> dict[str, Any]:
        """Return figures for JSON of one command that took `wall_s` seconds and finished `grown` trees."""
        usages = [usage for _, usage in sorted(self.usages.items())]
        return {
            "wall_s": wall_s,
            "grown": grown,
            "tokens_per_s": _ratio(sum(usage.generated_tokens for usage in usages), wall_s),
            "prefix_cache_hit_rate": prefix_hit_rate(usages),
            "engines": [
                {
                    "model": usage.model,
                    "engine": usage.engine,
                    "idle_fraction": usage.idle_share,
                    "in_flight_mean": usage.in_flight_mean,
                    "generated_tokens": usage.generated_tokens,
                }
                for usage in usages
            ],
        }


def prefix_hit_rate(usages: Sequence[EngineStats]) -> float | None:
    """Return the share of the prompt tokens that were found in the prefix caches."""
    return _ratio(sum(usage.cached_tokens for usage in usages), sum(usage.prompt_tokens for usage in usages))


def figure_rows(trees: dict[str, Any], engines: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return names and values of the figures to show.

    Args:
        engines: None if no tree was grown.
    """
    solved, defects = trees["solved"], get_args(Defect)
    rows = {
        "failed": f"{trees['failed']}",
        "solved": "-" if solved is None else "{mean:.3f} (95 % {low:.3f} to {high:.3f})".format(**solved),
        "most frequent answer correct": _shown(trees["most_frequent_answer_correct"], ".3f"),
        "first right chain, every step right": _of(**trees["first_right_chains"]),
        "scored answers": f"{trees['scored_answers']:,}",
        "right answers per tree": _shown(trees["right_answers_per_tree"], ".2f"),
        "simulations": f"{trees['simulations']:,}",
        "calls per scored answer": _shown(trees["calls_per_scored_answer"], ".2f"),
        "tokens per scored answer": _shown(trees["tokens_per_scored_answer"], ".1f"),
        "generated tokens": f"{trees['generated_tokens']:,}",
        "stopped by": _listed(trees["stops"].items()),
        "defects": _listed((name, count) for name, count in trees["counts"].items() if name in defects),
        "other counts": _listed((name, count) for name, count in trees["counts"].items() if name not in defects),
    }
    if engines:
        rows["prefix-cache hit rate"] = _shown(engines["prefix_cache_hit_rate"], ".3f")
        rows["tokens/s"] = _shown(engines["tokens_per_s"], ",.0f")
        for engine in engines["engines"]:
            idle, full = _shown(engine["idle_fraction"], ".3f"), _shown(engine["in_flight_mean"], ".1f")
            rows[f"{engine['model']} engine {engine['engine']}"] = f"idle {idle}, in flight {full}"
        rows["wall time"] = f"{engines['wall_s']:.1f} s for {engines['grown']} trees"
    return list(rows.items())


def _sum(one: EngineStats, other: EngineStats) -> EngineStats:
    busy = one.busy_s + other.busy_s
    in_flight = one.in_flight_mean * one.busy_s + other.in_flight_mean * other.busy_s
    return EngineStats(
        model=one.model,
        engine=one.engine,
        busy_s=busy,
        wall_s=one.wall_s + other.wall_s,
        generated_tokens=one.generated_tokens + other.generated_tokens,
        prompt_tokens=one.prompt_tokens + other.prompt_tokens,
        cached_tokens=one.cached_tokens + other.cached_tokens,
        in_flight_mean=in_flight / busy if busy else 0.0,
    )


def _ratio(amount: float, total: float) -> float | None:
    return amount / total if total else None


def _of(*, every_step_right: int, checked: int) -> str:
    return f"{every_step_right / checked:.3f} of {checked:,}" if checked else "-"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _listed(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts if count) or "none"
