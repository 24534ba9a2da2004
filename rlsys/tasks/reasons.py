"""Words of verdicts: what a verifier has read and what it has expected, short and without control characters."""

from __future__ import annotations

MAX_QUOTED_CHARS = 40


def quoted(text: str) -> str:
    """Return the beginning of a text on one line, in quotes that it does not contain.

    Evaluation counts reasons without what they quote (`rlsys.evaluation.figures`).
    """
    line = " ".join(text[: 8 * MAX_QUOTED_CHARS].split())
    line = "".join(char if char.isprintable() else "?" for char in line)
    if len(line) > MAX_QUOTED_CHARS:
        line = f"{line[: MAX_QUOTED_CHARS - 1]}…"
    return f"'{line}'" if "'" not in line else '"{}"'.format(line.replace('"', "?"))


def read_and_expected(read: str, expected: str) -> str:
    """Return that an answer is not the reference."""
    return f"read {quoted(read)}, expected {quoted(expected)}"
