"""Errors shared by all ranks: all ranks raise the error of one rank, so that no rank goes on or waits alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from rlsys.errors import RlsysError

MESSAGE_BYTES = 2000  # longer messages are cut


def first_problem(own: str, device: str) -> str:
    """Return the problem of the first rank that has a problem, or "" if no rank has. Collective.

    All ranks get the same text. This takes one exchange, and a second one if there is a problem.

    Args:
        own: problem of this rank, or "".
        device: device of the ranks' process group.
    """
    bad = torch.tensor(float(bool(own)), device=device)
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    if not bad.item():
        return ""
    messages = torch.zeros((dist.get_world_size(), MESSAGE_BYTES), dtype=torch.uint8, device=device)
    encoded = own.encode()[:MESSAGE_BYTES]
    messages[dist.get_rank(), : len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    dist.all_reduce(messages)  # each rank fills its own row and adds 0 to the others
    decoded = (bytes(row[row != 0].tolist()).decode(errors="ignore") for row in messages.cpu())
    return next(filter(None, decoded))


@contextmanager
def fail_on_all_ranks(kind: type[RlsysError], device: str) -> Iterator[None]:
    """Raise an error on all ranks if the body fails on one.

    The body must not be collective. The exit from the context is collective.

    Args:
        kind: class of the error that all ranks raise.
        device: device of the ranks' process group.

    Raises:
        RlsysError: of class `kind`, on all ranks, with the message of the first rank that failed.
    """
    problem, cause = "", None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - it becomes the error of all ranks
        cause = error
        message = error.message if isinstance(error, RlsysError) else f"{type(error).__name__}: {error}"
        problem = f"learner rank {dist.get_rank()}: {message}"
    if shared_problem := first_problem(problem, device):
        raise kind(shared_problem) from cause
