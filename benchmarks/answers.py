"""Time of the judge of answers: every reference of public data sets in several forms, and numbers of extreme size.

RLSYS_DATA names a folder with math500.jsonl, aime24.jsonl, gsm8k_test.jsonl and answer_pairs.jsonl. Missing files are
left out.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path

from rlsys.tasks.answers.judge import Judge
from rlsys.tasks.answers.reading.reader import read_answer

FORMS = ("<answer>%s</answer>", r"So it is \boxed{%s}.", "$%s$", "%s", "The answer is %s.")
EXTREME = [
    ("9^{9^9}", "9^{9^8}"),
    ("9**9**9**9", "9**9**9**8"),
    ("100000!", "100001!"),
    ("(9!)!", "(9!)! + 1"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    ("2^{1000000}", "2^{1000000}+1"),
    ("1e300", "1.0000001e300"),
    ("1e-300", "2e-300"),
    ("e^{1000}+1", "e^{1000}"),
    (r"\sin(10^{20})", r"\sin(10^{20}+1)"),
    ("(x+1)^{1000}", "(x+1)^{1001}"),
    ("((((1+x)^9)^9)^9)^9", "((((1+x)^9)^9)^9)^8"),
    ("+".join(["x^2"] * 150), "150x^2"),
    ("(" * 60 + "1" + ")" * 60, "1"),
    (r"\binom{100000}{50000}", "1"),
    ("1" * 900, "1" * 899 + "2"),
]


def pairs(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Return pairs of reference and completion by data set."""
    result = {
        "extreme": [(one, FORMS[0] % (other,)) for pair in EXTREME for one, other in (pair, pair[::-1], pair[:1] * 2)]
    }
    for path in sorted(folder.glob("*.jsonl")):
        if path.name not in ("math500.jsonl", "aime24.jsonl", "gsm8k_test.jsonl", "answer_pairs.jsonl"):
            continue
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if path.stem == "answer_pairs":
            result[path.stem] = [(row["reference"], FORMS[0] % (row["answer"],)) for row in rows]
            continue
        texts = [row["answer"].split("#### ")[-1] for row in rows]
        others = [*texts[1:], texts[0]]
        result[path.stem] = [
            (text, form % (answer,))
            for text, other in zip(texts, others, strict=True)
            for form in FORMS
            for answer in (text, other)
        ]
    return result


def seconds(judge: Judge, items: Iterable[tuple[str, str]]) -> list[float]:
    """Return the sorted times of all verdicts, without results kept from before."""
    times = []
    for reference, completion in items:
        read_answer.cache_clear()
        start = time.perf_counter()
        judge.verdict(reference, completion)
        times.append(time.perf_counter() - start)
    return sorted(times)


def main() -> None:
    judge = Judge()
    print(f"{'pairs':14} {'count':>6} {'median ms':>10} {'99 % ms':>10} {'largest ms':>10}")
    for name, items in pairs(Path(os.environ.get("RLSYS_DATA", "."))).items():
        times = [1000 * value for value in seconds(judge, items)]
        figures = (times[len(times) // 2], times[int(0.99 * (len(times) - 1))], times[-1])
        print(f"{name:14} {len(times):6} " + " ".join(f"{value:10.2f}" for value in figures))


if __name__ == "__main__":
    main()
