"""Scores of a teacher in the rows of a file, in the columns `teacher_ids`, `teacher_logprobs` and `tokenizer`.

Both lists have K entries for each trained token of the row, in the order of the tokens: the K most probable tokens
there. `tokenizer` is the digest of the teacher's tokenizer, without which nothing shows that ids mean the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlsys.data.ragged import RaggedRows
from rlsys.errors import DataError
from rlsys.tables.read import Batch, Layout, Ragged, RowFile
from rlsys.tables.schemas import IDS, SCORES, SUPERVISED, TEXT, Column
from rlsys.types import BoolArray, TeacherTokens

COLUMNS: Mapping[str, Column] = {"teacher_ids": IDS, "teacher_logprobs": SCORES, "tokenizer": TEXT}
SCORED_IDS: Layout = {**SUPERVISED.subset("token_ids", "loss_mask"), **COLUMNS}
ROUNDING = 1e-3
"""By so much the probabilities of a place may exceed 1 together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedScores:
    """The scores that a run expects in a file.

    Attributes:
        tokens: K, objective.distill.top_k.
        tokenizer: Digest of the tokenizer of the policy.
        optional: Whether engines score rows without scores.
    """

    tokens: int
    tokenizer: str
    optional: bool

    def check_optional(self, file: RowFile) -> None:
        """Raise DataError if a file without scores cannot be used."""
        if not self.optional:
            raise DataError(
                f"{file.where}: expected the columns token_ids, loss_mask, {', '.join(COLUMNS)}, because "
                f"objective.distill trains on these rows; found {', '.join(file.names())}; add the scores (`rlsys "
                "teach`), or set teacher.model.path to let engines score the rows"
            )


@dataclass(frozen=True, slots=True)
class TeacherColumns:
    """Scores of all rows of a file, K for each trained token."""

    ids: Ragged[np.int32]
    logprobs: Ragged[np.float32]
    tokens: int

    def row(self, number: int, loss_mask: BoolArray) -> TeacherTokens:
        """Return the scores of a row with a mask of T tokens."""
        shape = (len(loss_mask), self.tokens)
        ids, logprobs = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)
        ids[loss_mask] = self.ids[number].reshape(-1, self.tokens)
        logprobs[loss_mask] = self.logprobs[number].reshape(-1, self.tokens)
        return TeacherTokens(mask=loss_mask, ids=ids, logprobs=logprobs)


class ScoreCollector:
    """Collector of the scores of many batches."""

    def __init__(self, expected: ExpectedScores) -> None:
        self._expected = expected
        self._ids, self._logprobs = RaggedRows[np.int32](np.int32), RaggedRows[np.float32](np.float32)

    def add(self, batch: Batch, mask: Ragged[np.bool_], ids: Ragged[np.int32], selected: NDArray[np.int64]) -> None:
        """Append the selected rows of a batch.

        Args:
            mask: The trained tokens.
            ids: The column teacher_ids, checked against the vocabulary.

        Raises:
            DataError: A row has scores of another shape or tokenizer, or no log-probabilities.
        """
        tokens, tokenizer = self._expected.tokens, self._expected.tokenizer
        digests = batch.texts("tokenizer")
        batch.refuse(
            np.array([digest != tokenizer for digest in digests], dtype=np.bool_),
            "tokenizer",
            lambda row: f"expected {tokenizer}, the tokenizer of the policy, found {digests[row]}",
        )
        trained, logprobs = mask.count(mask.values), batch.reals("teacher_logprobs")
        for name, column in (("teacher_ids", ids), ("teacher_logprobs", logprobs)):
            counts = column.lengths
            wrong = np.flatnonzero(counts != trained * tokens)
            if len(wrong):
                batch.refuse(counts != trained * tokens, name, self._shape(trained[wrong[0]], counts[wrong[0]]))
        sums = np.exp(logprobs.values.astype(np.float64)).reshape(-1, tokens).sum(axis=1)
        places = Ragged(~(sums <= 1 + ROUNDING), np.concatenate([np.zeros(1, np.int64), np.cumsum(trained)]))
        batch.refuse(
            places.count(places.values) > 0,
            "teacher_logprobs",
            "expected natural logarithms of probabilities, found a token whose probabilities are more than 1 together",
        )
        self._ids.add(ids, selected)
        self._logprobs.add(logprobs, selected)

    def _shape(self, trained: int, entries: int) -> str:
        return (
            f"expected objective.distill.top_k = {self._expected.tokens} entries for each of the {trained} tokens to "
            f"train, found {entries}"
        )

    def joined(self) -> TeacherColumns:
        """Return the scores of all rows."""
        return TeacherColumns(self._ids.joined(), self._logprobs.joined(), self._expected.tokens)
