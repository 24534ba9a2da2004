"""What an engine has done since it was last asked."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineUsage:
    """Since the last question.

    busy_s, wall_s: seconds the engine's thread spent adding requests and in steps, of so many that went by. A step
        counts when it ends, so busy_s can exceed wall_s by a step.
    in_flight_mean: unfinished requests, mean over the steps; 0 without a step.
    generated_tokens, prompt_tokens, cached_tokens: of the completions that ended; cached: prompt tokens whose
        keys and values came from the prefix cache.
    """

    busy_s: float = 0.0
    wall_s: float = 0.0
    in_flight_mean: float = 0.0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Meter:
    """Counts on one thread, is read on any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._since = time.monotonic()
        self._busy_s = 0.0
        self._steps = self._in_flight = 0
        self._generated = self._prompt = self._cached = 0

    def add_time(self, seconds: float) -> None:
        with self._lock:
            self._busy_s += seconds

    def add_step(self, seconds: float, in_flight: int) -> None:
        with self._lock:
            self._busy_s += seconds
            self._steps += 1
            self._in_flight += in_flight

    def add_completion(self, generated: int, prompt: int, cached: int) -> None:
        with self._lock:
            self._generated += generated
            self._prompt += prompt
            self._cached += cached

    def take(self) -> EngineUsage:
        """All that was counted since the last call."""
        with self._lock:
            found = EngineUsage(
                busy_s=self._busy_s,
                wall_s=time.monotonic() - self._since,
                in_flight_mean=self._in_flight / self._steps if self._steps else 0.0,
                generated_tokens=self._generated,
                prompt_tokens=self._prompt,
                cached_tokens=self._cached,
            )
            self._clear()
        return found
