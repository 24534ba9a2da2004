"""The table of docs/reliability.md: a row for every fault, written by the test that injects it.

Rows are kept in docs/reliability.json by the name of the fault. A test that runs again replaces its row, the others
stay, and the table of the page is made of all of them. A test that fails leaves a row of which nothing has passed.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rlsys.run.ledger import OUTCOMES, read_ledger

VARIABLE = "RLSYS_WRITE_FIGURES"
DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
HEADINGS = {
    "fault": "fault",
    "promise": "promise",
    "injection": "injected by",
    "passed": "passed",
    "detection_s": "detected, s",
    "recovery_s": "recovered, s",
    "steps_lost": "steps lost",
    "prompts_lost": "prompts lost",
    "trained_twice": "trained twice",
    "processes_left": "processes left",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was measured of one fault. None where a figure has no meaning.

    fault: its name; the row is found by it.
    promise: what is to happen, in a few words. injection: how it was made to happen.
    runs, passed: how often it was injected, and how often all that is promised was found.
    detection_s: the longest time from the fault to the moment it is known, seconds.
    recovery_s: the longest time from the fault until everything works as before, seconds; where the fault ends the
        command, from the start of the next one to its first new training step.
    steps_lost: training steps of the worst run that had to be made again.
    prompts_lost, trained_twice: prompts of all runs that no step has trained though it should have, or two have.
    processes_left: processes of all runs that outlived them.
    """

    fault: str
    promise: str
    injection: str
    runs: int
    passed: int = 0
    detection_s: float | None = None
    recovery_s: float | None = None
    steps_lost: int | None = None
    prompts_lost: int | None = None
    trained_twice: int | None = None
    processes_left: int | None = None


def begin(**values: Any) -> Row:
    """The row of a fault before it is injected, recorded as not passed: it stays so where the test fails."""
    row = Row(**{"runs": 1, **values})
    record(row)
    return row


@contextmanager
def recorded(**values: Any) -> Iterator[None]:
    """The row of a fault, as passed where the block ends without an error."""
    row = begin(**values)
    yield
    record(replace(row, passed=row.runs))


def record(row: Row, docs: Path | None = None) -> None:
    """Put a row into docs/reliability.json and docs/reliability.md, where RLSYS_WRITE_FIGURES is set."""
    if os.environ.get(VARIABLE):
        write(row, docs or DOCS)


def write(row: Row, docs: Path) -> None:
    """Replace the row of this fault and make the table again. Missing files are made."""
    kept, page = docs / "reliability.json", docs / "reliability.md"
    rows = {**(json.loads(kept.read_text()) if kept.exists() else {}), row.fault: asdict(row)}
    rows = dict(sorted(rows.items()))
    _replace(kept, json.dumps(rows, indent=1) + "\n")
    text = page.read_text() if page.exists() else f"# Reliability\n\n{BEGIN}\n{END}\n"
    _replace(page, with_table(text, table({name: Row(**values) for name, values in rows.items()})))


def with_table(text: str, rows: str) -> str:
    """A page with the table between its markers.

    Raises:
        ValueError: it has not one of each, in this order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in after or END in before + after:
        raise ValueError(f"docs/reliability.md: expected one {BEGIN} and then one {END}")
    return f"{before}{BEGIN}\n\n{rows}\n{END}{after}"


def lost_and_twice(run: Path) -> tuple[int, int]:
    """Prompts of a finished run, by its ledger: without a fate up to the last that has one, and those that have two."""
    lines = read_ledger(run / "ledger.jsonl")
    assert lines, f"{run} has no ledger"
    fates = Counter(index for line in lines for fate in OUTCOMES for index in line[fate])
    return max(fates) + 1 - len(fates), sum(count > 1 for count in fates.values())


def table(rows: Mapping[str, Row]) -> str:
    """The rows as Markdown, by name."""
    lines = ["| " + " | ".join(HEADINGS.values()) + " |", "|---" * len(HEADINGS) + "|"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for _, row in sorted(rows.items())]
    return "\n".join(lines) + "\n"


def _cells(row: Row) -> list[str]:
    values = {each.name: getattr(row, each.name) for each in fields(row)}
    values["passed"] = f"{row.passed} of {row.runs}"
    return [_cell(values[name]) for name in HEADINGS]


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _replace(path: Path, text: str) -> None:
    """At once: other tests may write another row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
