"""Ranks that fail together: what one of them finds becomes the error of all, so that none goes on or waits alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from rlsys.errors import RlsysError

LIMIT = 2000  # bytes of a message that travel


def first_problem(own: str, device: str) -> str:
    """What the first rank with a problem says of it, the same on all ranks; "" where none has one.

    Collective: one wait where there is none, two where there is one.

    Args:
        own: the problem of this rank, or "".
        device: that the ranks' process group communicates on.
    """
    bad = torch.tensor(float(bool(own)), device=device)
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    if not bad.item():
        return ""
    said = torch.zeros((dist.get_world_size(), LIMIT), dtype=torch.uint8, device=device)
    text = own.encode()[:LIMIT]
    said[dist.get_rank(), : len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    dist.all_reduce(said)  # every row is one rank's: the others add 0
    found = (bytes(row[row != 0].tolist()).decode(errors="ignore") for row in said.cpu())
    return next(filter(None, found))


@contextmanager
def together(kind: type[RlsysError], device: str) -> Iterator[None]:
    """Let all ranks fail where one does. What is done inside must not be collective; the end of it is.

    Args:
        kind: of the error that all ranks raise.
        device: see `first_problem`.
    Raises:
        RlsysError: of this kind, on all ranks, with what the first rank that failed found.
    """
    own, cause = "", None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - it becomes the error of all ranks
        cause = error
        what = error.message if isinstance(error, RlsysError) else f"{type(error).__name__}: {error}"
        own = f"learner rank {dist.get_rank()}: {what}"
    if problem := first_problem(own, device):
        raise kind(problem) from cause
