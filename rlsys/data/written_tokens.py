"""Masks of the sides of preference pairs: tokens that a chain was to write, and replies of an environment."""

from __future__ import annotations

import numpy as np

from rlsys.tables.read import Batch, Ragged
from rlsys.types import BoolArray


def written_tokens(batch: Batch, name: str, side: Ragged[np.int32]) -> Ragged[np.bool_]:
    """Return a mask with the rows and lengths of a side, True where the optional column `name` has none.

    Raises:
        DataError: a mask has another length than its side.
    """
    whole = Ragged(np.ones(len(side.values), dtype=np.bool_), side.starts)
    if name not in batch.columns:
        return whole
    is_given = np.asarray(batch.columns[name].is_valid())
    if not is_given.any():
        return whole
    masks = batch.masks(name)
    batch.refuse(
        is_given & (masks.lengths != side.lengths),
        name,
        lambda row: f"expected an entry for each of the {len(side[row])} token ids, found {len(masks[row])}",
    )
    for row in np.flatnonzero(is_given):
        whole[int(row)][:] = masks[int(row)]
    return whole


def mask_of(written: Ragged[np.bool_], row: int) -> BoolArray | None:
    """Return the mask of a row; None if it is True everywhere."""
    mask = written[row]
    return None if mask.all() else mask
