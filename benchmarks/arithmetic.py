"""Write the data files of configs/smollm2_arithmetic.yaml: sums and counts of legs, with worked answers.

`python benchmarks/arithmetic.py [FOLDER]` writes supervised.jsonl (prompt and worked answer), train.jsonl and
held_out.jsonl (question and answer). No question is in two of the files. The same version writes the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path("runs/data/arithmetic")
ROWS = {"supervised": 512, "train": 4096, "held_out": 512}
INSTRUCTION = "Work in steps, then say: The answer is N."
LEGS = {
    "ants": 6,
    "bees": 6,
    "cats": 4,
    "cows": 4,
    "crabs": 10,
    "dogs": 4,
    "ducks": 2,
    "hens": 2,
    "horses": 4,
    "spiders": 8,
}
COUNTS = (2, 9)  # animals of a kind: fewest and most
NUMBERS = (2, 20)


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its worked answer, and the answer alone."""

    question: str
    steps: tuple[str, ...]
    answer: int

    @property
    def worked(self) -> str:
        return f"{', '.join(self.steps)}. The answer is {self.answer}."

    @property
    def messages(self) -> list[Mapping[str, str]]:
        return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": self.question}]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    write_files(parser.parse_args().folder)
    return 0


def write_files(folder: Path) -> None:
    """Write the three data files to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = problems(random.Random("arithmetic"))
    for name, count in ROWS.items():
        row = supervised_row if name == "supervised" else task_row
        lines = [json.dumps(row(next(drawn))) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def supervised_row(problem: Problem) -> dict[str, Any]:
    return {"prompt": problem.messages, "completion": problem.worked}


def task_row(problem: Problem) -> dict[str, Any]:
    return {"question": problem.messages, "answer": str(problem.answer)}


def asked(problem: Problem) -> tuple[Any, ...]:
    """Return what a problem asks for, whatever the order of its animals or of its later numbers."""
    if problem.question.startswith("What is"):
        first, *later = re.findall(r"[+-]? ?\d+", problem.question)
        return (first, *sorted(number.replace(" ", "") for number in later))
    return tuple(sorted(re.findall(r"(\d+) (\w+)", problem.question)))


def twins(count: int) -> list[bool]:
    """Return for the first held-out problems whether a training problem asks for the same in another order."""
    drawn = problems(random.Random("arithmetic"))
    rows = {name: [asked(next(drawn)) for _ in range(size)] for name, size in ROWS.items()}
    trained = {*rows["supervised"], *rows["train"]}
    return [each in trained for each in rows["held_out"][:count]]


def problems(rng: random.Random) -> Iterator[Problem]:
    """Yield different problems, sums and counts of legs in turns, without end."""
    seen: set[str] = set()
    while True:
        for draw in (count_legs, add_numbers):
            problem = draw(rng)
            while problem.question in seen:
                problem = draw(rng)
            seen.add(problem.question)
            yield problem


def count_legs(rng: random.Random) -> Problem:
    """Draw a question like `How many legs do 3 dogs and 2 ants have?`."""
    kinds = rng.sample(sorted(LEGS), 2)
    counts = [rng.randint(*COUNTS) for _ in kinds]
    legs = [count * LEGS[kind] for count, kind in zip(counts, kinds, strict=True)]
    products = [f"{count}*{LEGS[kind]}={product}" for count, kind, product in zip(counts, kinds, legs, strict=True)]
    sums, total = running_sums(legs)
    question = f"How many legs do {counts[0]} {kinds[0]} and {counts[1]} {kinds[1]} have?"
    return Problem(question, (*products, *sums), total)


def add_numbers(rng: random.Random) -> Problem:
    """Draw a question like `What is 34 + 17 - 25?`. The answer can be negative."""
    numbers = [rng.choice((1, -1)) * rng.randint(*NUMBERS) for _ in range(3)]
    numbers[0] = abs(numbers[0])
    sums, total = running_sums(numbers)
    later = "".join(f" {'-' if number < 0 else '+'} {abs(number)}" for number in numbers[1:])
    return Problem(f"What is {numbers[0]}{later}?", sums, total)


def running_sums(numbers: list[int]) -> tuple[tuple[str, ...], int]:
    """Return the equations that add numbers one after the other, and the total."""
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total}{number:+d}={total + number}")
        total += number
    return tuple(steps), total


if __name__ == "__main__":
    sys.exit(main())
