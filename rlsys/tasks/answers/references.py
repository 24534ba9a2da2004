"""Check of the references of a data set: can the judge verify them against themselves?"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rlsys.tasks.answers.judge import Judge, shortened

# More references than this are sampled, at equal distances.
MAX_REFERENCES = 2000
MAX_SECONDS = 10.0


def reference_note(judge: Judge, references: Sequence[tuple[int, str]]) -> str | None:
    """Return a line about the references that cannot be verified against themselves, or None without any.

    Args:
        judge: the judge of the data set.
        references: row number and text of every reference.
    """
    stride = -(-len(references) // MAX_REFERENCES)
    chosen = references[:: max(stride, 1)]
    deadline = time.monotonic() + MAX_SECONDS
    tried, faults = 0, []
    for row, reference in chosen:
        if time.monotonic() > deadline:
            break
        tried += 1
        reason = judge.reference_fault(reference)
        if reason is not None:
            faults.append(f"row {row} {shortened(reference)!r}: {reason}")
    if not faults:
        return None
    scope = f"{tried}" if tried == len(references) else f"{tried} sampled of {len(references)}"
    return f"{len(faults)} of {scope} references cannot be verified by value, the first: {faults[0]}"
