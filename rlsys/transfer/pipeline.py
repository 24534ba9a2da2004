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
    arrivals: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(maxsize=ahead)
    closed = threading.Event()

    def deliver(item: Item | None, error: BaseException | None = None) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                arrivals.put((item, error), timeout=LOOK_S)
                return

    def produce() -> None:
        try:
            for item in items:
                deliver(item)
                if closed.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - the consumer raises it
            deliver(None, error)
        else:
            deliver(None, StopIteration())

    threading.Thread(target=produce, name="prefetch", daemon=True).start()
    return _consume(arrivals, closed)


def _consume(
    arrivals: queue.Queue[tuple[Item | None, BaseException | None]], closed: threading.Event
) -> Iterator[Item]:
    try:
        while True:
            item, error = arrivals.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc] - an entry without an error has an item
    finally:
        closed.set()
