"""Counters of the work of one engine."""

from __future__ import annotations

import threading
import time

from rlsys.interfaces import EngineStats


class Meter:
    """Counters of one engine since the last `take`. One thread counts, and any thread may read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._since = time.monotonic()
        self._busy_s = 0.0
        self._steps = self._in_flight_sum = 0
        self._generated = self._prompt = self._cached = 0

    def add_time(self, seconds: float) -> None:
        with self._lock:
            self._busy_s += seconds

    def add_step(self, seconds: float, in_flight: int) -> None:
        with self._lock:
            self._busy_s += seconds
            self._steps += 1
            self._in_flight_sum += in_flight

    def add_completion(self, generated: int, prompt: int, cached: int) -> None:
        with self._lock:
            self._generated += generated
            self._prompt += prompt
            self._cached += cached

    def take(self) -> EngineStats:
        """Return the statistics since the last call and start a new interval."""
        with self._lock:
            stats = EngineStats(
                busy_s=self._busy_s,
                wall_s=time.monotonic() - self._since,
                in_flight_mean=self._in_flight_sum / self._steps if self._steps else 0.0,
                generated_tokens=self._generated,
                prompt_tokens=self._prompt,
                cached_tokens=self._cached,
            )
            self._clear()
        return stats
