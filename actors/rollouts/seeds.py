"""Seeds of random draws."""

from __future__ import annotations

import hashlib


def sample_seed(run_seed: int, prompt_id: str, sample: int | str) -> int:
    """Return a 63-bit hash of the run's seed, the prompt and the draw.

    The drawn tokens then depend neither on the order of the requests nor on the actor that serves them.

    Args:
        run_seed: run.seed.
        sample: Number or name of the draw, unique among the draws for the prompt.
    """
    digest = hashlib.sha256(f"{run_seed}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
