"""Schedule of the faults of a storm, as a function of its seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

PROCESSES = ("actor", "rank", "reward worker")
DISK_FULL, DAMAGED, STOP_VERIFIER = "disk full", "damaged checkpoint", "SIGSTOP reward worker"
ENDS_DRIVER = ("SIGKILL driver", "SIGTERM driver", "SIGINT driver", DAMAGED)
KINDS = (*(f"{how} {what}" for what in PROCESSES for how in ("SIGKILL", "SIGSTOP")), *ENDS_DRIVER, DISK_FULL)
MEAN_S = 35.0
SHORTEST, LONGEST = 0.3, 1.7  # times the mean: some faults come during the recovery from the previous one


@dataclass(frozen=True, slots=True)
class Injection:
    """A planned fault.

    Attributes:
        kind: One of KINDS.
        wait_s: Seconds after the previous fault.
        draw: Random number in [0, 1) that selects the process or file.
    """

    kind: str
    wait_s: float
    draw: float

    def pick(self, count: int) -> int:
        """Return a number below `count`."""
        return int(self.draw * count)


def schedule(seed: int, job: int, mean_s: float = MEAN_S) -> Iterator[Injection]:
    """Yield the faults of a job without end: every kind once in random order, then every kind again, and so on.

    A stopped verifier costs a verdict, and a lost verdict changes the weights. Jobs with even numbers do not get it.
    """
    chance = random.Random(f"{seed}/{job}")
    kinds = [kind for kind in KINDS if job % 2 or kind != STOP_VERIFIER]
    while True:
        for kind in chance.sample(kinds, len(kinds)):
            yield Injection(kind, chance.uniform(SHORTEST, LONGEST) * mean_s, chance.random())


@dataclass(slots=True)
class Fault:
    """An injected fault and its consequences.

    Attributes:
        at_s: Seconds since the storm began.
        took_effect: False if the target had already ended, no save was made on the full disk, or no start of the
            driver named the damaged checkpoint.
        gone_s: Seconds from the injection until the target process was gone; None if it never was.
        next_step_s: Seconds from the injection until the next completed training step; None if there was none.
    """

    job: int
    at_s: float
    kind: str
    target: str
    followed: str = ""
    took_effect: bool = True
    gone_s: float | None = None
    next_step_s: float | None = None
