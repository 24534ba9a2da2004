"""Which fault comes when in a storm: a function of its seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

PROCESSES = ("actor", "rank", "reward worker")
DISK_FULL, DAMAGED, STOP_VERIFIER = "disk full", "damaged checkpoint", "SIGSTOP reward worker"
ENDS_DRIVER = ("SIGKILL driver", "SIGTERM driver", "SIGINT driver", DAMAGED)
KINDS = (*(f"{how} {what}" for what in PROCESSES for how in ("SIGKILL", "SIGSTOP")), *ENDS_DRIVER, DISK_FULL)
MEAN_S = 35.0
SHORTEST, LONGEST = 0.3, 1.7  # of the mean: some come while the fault before is still dealt with


@dataclass(frozen=True, slots=True)
class Injection:
    """A fault to come. wait_s: seconds after the one before; draw: in [0, 1), which process or file it hits."""

    kind: str
    wait_s: float
    draw: float

    def pick(self, count: int) -> int:
        """A number below `count`."""
        return int(self.draw * count)


def schedule(seed: int, job: int, mean_s: float = MEAN_S) -> Iterator[Injection]:
    """Faults of a job without end, a function of the arguments: every kind once in some order, then all again.

    A stopped verifier costs a verdict, after which the weights are others; jobs of even number are spared it.
    """
    chance = random.Random(f"{seed}/{job}")
    kinds = [kind for kind in KINDS if job % 2 or kind != STOP_VERIFIER]
    while True:
        for kind in chance.sample(kinds, len(kinds)):
            yield Injection(kind, chance.uniform(SHORTEST, LONGEST) * mean_s, chance.random())


@dataclass(slots=True)
class Fault:
    """A fault that was injected, and what followed.

    at_s: since the storm began. took_effect: not where its target had ended by itself, no save was made on the full
    disk, or no start of the driver named the damaged checkpoint. gone_s: until the process that was hit was gone;
    next_step_s: until the next completed training step; both from the injection on, None where it never was.
    """

    job: int
    at_s: float
    kind: str
    target: str
    followed: str = ""
    took_effect: bool = True
    gone_s: float | None = None
    next_step_s: float | None = None
