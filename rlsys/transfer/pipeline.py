"""Run an iterator ahead of its consumer, in a thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
LOOK_S = 0.2  # between two looks whether the consumer is still there


def prefetched(items: Iterable[Item], ahead: int = 1) -> Iterator[Item]:
    """Yield the items of an iterable, of which a thread produces up to `ahead` in advance. It starts at once.

    An error of the iterable is raised where its item would come. The thread ends when the iterator is closed.
    """
    arrivals: queue.Queue[list[Item] | BaseException] = queue.Queue(maxsize=ahead)
    closed = threading.Event()

    def deliver(arrival: list[Item] | BaseException) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                arrivals.put(arrival, timeout=LOOK_S)
                return

    def produce() -> None:
        try:
            for item in items:
                deliver([item])
                if closed.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - the consumer raises it
            deliver(error)
        else:
            deliver([])

    threading.Thread(target=produce, name="prefetch", daemon=True).start()
    return _consume(arrivals, closed)


def _consume(arrivals: queue.Queue[list[Item] | BaseException], closed: threading.Event) -> Iterator[Item]:
    """Yield the arrivals: an item in a list, an empty list at the end, or an error."""
    try:
        while arrival := arrivals.get():
            if isinstance(arrival, BaseException):
                raise arrival
            yield arrival[0]
    finally:
        closed.set()
