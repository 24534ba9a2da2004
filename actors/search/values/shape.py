"""Common parts of the sources of values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from actors.search.requests import Value


def shaped(request: Value, values: Iterable[float | None]) -> tuple[tuple[float | None, ...], ...]:
    """Return the values of all nodes of a request by line and node."""
    following = iter(values)
    return tuple(tuple(next(following) for _ in line.texts) for line in request.lines)


def raise_first(outcomes: Sequence[object], tolerated: type[BaseException]) -> None:
    """Raise the first outcome that is an error, except those that are tolerated."""
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, tolerated):
            raise outcome
