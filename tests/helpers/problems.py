"""Problems for tests in which only the answer matters."""

from __future__ import annotations

from typing import Any

from rlsys.types import Problem


def problem_of(answer: str, question: str = "?", /, **metadata: Any) -> Problem:
    return Problem(problem_id="p", question=question, answer=answer, metadata=metadata)
