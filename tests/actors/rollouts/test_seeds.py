"""Seeds of completions."""

from __future__ import annotations

import hashlib

from actors.rollouts.seeds import sample_seed


def test_a_seed_depends_on_run_prompt_and_sample() -> None:
    parts = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (0, "a@1", 0)]
    assert len({sample_seed(*part) for part in parts}) == len(parts)


def test_a_seed_is_a_hash_that_fits_an_int64() -> None:
    # The first 8 bytes of the hash of "0/a/0", without the sign bit.
    expected = int.from_bytes(hashlib.sha256(b"0/a/0").digest()[:8], "big") // 2
    assert sample_seed(0, "a", 0) == expected
    assert all(0 <= sample_seed(0, "a", sample) < 2**63 for sample in range(100))
