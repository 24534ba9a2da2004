"""Rows of different lengths from many batches, joined into arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from rlsys.tables.read import Element, Ragged


@dataclass(slots=True)
class RaggedRows(Generic[Element]):
    """Ragged rows of many batches."""

    dtype: type[Element]
    values: list[NDArray[Element]] = field(default_factory=list)
    lengths: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, rows: Ragged[Element], selected: NDArray[np.int64] | None = None) -> None:
        """Append all rows, or the selected ones."""
        if selected is None or len(selected) == len(rows):
            self.values.append(rows.values)
            self.lengths.append(rows.lengths)
        else:
            self.values += [rows[int(row)] for row in selected]
            self.lengths.append(rows.lengths[selected])

    def joined(self) -> Ragged[Element]:
        lengths = np.concatenate([np.zeros(1, dtype=np.int64), *self.lengths])
        return Ragged(np.concatenate([np.zeros(0, dtype=self.dtype), *self.values]), np.cumsum(lengths))


def joined_sides(prompts: Sequence[Sequence[int]], sides: Sequence[Sequence[int]]) -> Ragged[np.int32]:
    return ragged([[*prompt, *side] for prompt, side in zip(prompts, sides, strict=True)], np.int32)


def ragged(rows: Sequence[Sequence[Any]], dtype: Any) -> Ragged[Any]:
    lengths = np.array([0, *(len(row) for row in rows)], dtype=np.int64)
    values = np.fromiter((entry for row in rows for entry in row), dtype=dtype, count=int(lengths.sum()))
    return Ragged(values, np.cumsum(lengths))
