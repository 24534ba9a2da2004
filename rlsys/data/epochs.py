"""Seeded shuffle of a finite data set, epoch by epoch."""

from __future__ import annotations

import numpy as np


class Epochs:
    """Positions in a finite data set by stream index. Each epoch has every position once, in its own seeded order."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def epoch(self, index: int) -> int:
        return index // self._size

    def position(self, index: int) -> int:
        epoch = self.epoch(index)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._size)
        return int(self._order[index % self._size])
