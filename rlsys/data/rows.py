"""Training rows from files: demonstrations and preference pairs, kept as arrays of token ids.

A file has the columns of `rlsys extract`, or the text columns that other trainers write. The policy's tokenizer
encodes texts: the prompt unchanged, the completion with the end token. Only token ids stay in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from rlsys.errors import DataError
from rlsys.models.chat import end_token_id
from rlsys.sequences import common_prefix_length
from rlsys.tables.read import UNKNOWN, Batch, Element, Layout, Ragged, RowFile
from rlsys.tables.schemas import PREFERENCES, STEP_PREFERENCES, SUPERVISED
from rlsys.types import Demonstration, Preference

_VISITS = ("chosen_visits", "rejected_visits")
SUPERVISED_IDS: Layout = SUPERVISED.subset("token_ids", "loss_mask")
SUPERVISED_TEXT: Layout = SUPERVISED.subset("prompt", "completion")
CHAINS: Layout = PREFERENCES.subset("chosen_ids", "rejected_ids", "prompt_length", "common_prefix", *_VISITS)
STEPS: Layout = STEP_PREFERENCES.subset("prompt_ids", "chosen_ids", "rejected_ids", *_VISITS)
PAIRS_TEXT: Layout = PREFERENCES.subset("prompt", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class SupervisedRows:
    """Demonstrations of a file. `notes` are lines for the user about the file."""

    token_ids: Ragged[np.int32]
    loss_mask: Ragged[np.bool_]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)

    def row(self, number: int) -> Demonstration:
        return Demonstration(token_ids=self.token_ids[number], loss_mask=self.loss_mask[number])

    def digest(self) -> str:
        """Return the sha256 of all rows."""
        return _digest(self.token_ids.values, self.token_ids.starts, self.loss_mask.values)


@dataclass(frozen=True, slots=True)
class PairRows:
    """P preference pairs of a file.

    Attributes:
        chosen, rejected: Token ids of the two sides, prompt first.
        prompt_lengths, commons: [P] lengths of the prompt and of the common prefix, in tokens.
        visits: [P, 2] visits of both sides, `UNKNOWN` where the file has none.
        notes: Lines for the user about the file.
    """

    chosen: Ragged[np.int32]
    rejected: Ragged[np.int32]
    prompt_lengths: NDArray[np.int64]
    commons: NDArray[np.int64]
    visits: NDArray[np.int64]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.chosen)

    def row(self, number: int, reference: Sequence[float] | None = None) -> Preference:
        """Return a pair.

        Args:
            number: Index of the pair.
            reference: Scores of its two sides under the reference policy.
        """
        chosen, rejected = (None if visits == UNKNOWN else int(visits) for visits in self.visits[number])
        return Preference(
            chosen_ids=self.chosen[number],
            rejected_ids=self.rejected[number],
            prompt_length=int(self.prompt_lengths[number]),
            common=int(self.commons[number]),
            chosen_visits=chosen,
            rejected_visits=rejected,
            chosen_reference=None if reference is None else float(reference[0]),
            rejected_reference=None if reference is None else float(reference[1]),
        )

    def digest(self) -> str:
        """Return the sha256 of all pairs."""
        sides = [array for side in (self.chosen, self.rejected) for array in (side.values, side.starts)]
        return _digest(*sides, self.prompt_lengths, self.commons, self.visits)


@dataclass(frozen=True, slots=True)
class Reader:
    """Reader of row files for one policy.

    Attributes:
        tokenizer: Hugging Face tokenizer of the policy.
        vocabulary: Number of token ids.
        longest: Largest number of tokens of a row (actors.max_model_len).
    """

    tokenizer: Any
    vocabulary: int
    longest: int

    def supervised(self, path: str, source: str) -> SupervisedRows:
        """Read the demonstrations of a file.

        Args:
            path: The file.
            source: Config field that names the file, for error messages.

        Raises:
            DataError: The file or one of its rows cannot be used. The message names the file, the row and the column.
        """
        file = RowFile(path, source)
        layout = file.layout([SUPERVISED_IDS, SUPERVISED_TEXT])
        token_ids, masks = _Rows[np.int32](np.int32), _Rows[np.bool_](np.bool_)
        for batch in file.batches(layout):
            ids, mask = self._supervised(batch) if layout is SUPERVISED_IDS else self._supervised_text(batch)
            token_ids.add(ids)
            masks.add(mask)
        return SupervisedRows(token_ids.joined(), masks.joined())

    def pairs(self, path: str, source: str) -> PairRows:
        """Read the pairs of a file. Pairs without a difference to learn are left out and counted in a note.

        Args:
            path: The file.
            source: Config field that names the file, for error messages.

        Raises:
            DataError: The file or one of its rows cannot be used, or no pair is left.
        """
        file = RowFile(path, source)
        layout = file.layout([CHAINS, STEPS, PAIRS_TEXT])
        pairs = _Pairs()
        for batch in file.batches(layout):
            prompts, chosen, rejected = self._sides(batch, layout)
            pairs.add(batch, prompts, chosen, rejected)
        return pairs.joined(file.where)

    def _supervised(self, batch: Batch) -> tuple[Ragged[np.int32], Ragged[np.bool_]]:
        ids, mask = self._ids(batch, "token_ids"), batch.masks("loss_mask")
        batch.refuse(
            mask.lengths != ids.lengths,
            "loss_mask",
            lambda row: f"expected an entry for each of the {len(ids[row])} token_ids, found {len(mask[row])}",
        )
        first = mask.values[mask.starts[:-1]]
        batch.refuse(first, "loss_mask", "expected false for the first token, which nothing predicts, found true")
        batch.refuse(mask.count(mask.values) == 0, "loss_mask", "expected a token to train, found none")
        return ids, mask

    def _supervised_text(self, batch: Batch) -> tuple[Ragged[np.int32], Ragged[np.bool_]]:
        prompts, completions = self._encoded(batch, "prompt"), self._encoded(batch, "completion", ended=True)
        ids = self._fitting(batch, "completion", [[*a, *b] for a, b in zip(prompts, completions, strict=True)])
        masks = [[False] * len(a) + [True] * len(b) for a, b in zip(prompts, completions, strict=True)]
        return ids, _ragged(masks, np.bool_)

    def _sides(self, batch: Batch, layout: Layout) -> tuple[NDArray[np.int64], Ragged[np.int32], Ragged[np.int32]]:
        """Return the prompt lengths and the token ids of both sides, prompt first."""
        if layout is CHAINS:
            lengths = batch.counts("prompt_length")
            chosen, rejected = self._ids(batch, "chosen_ids"), self._ids(batch, "rejected_ids")
            batch.refuse(lengths < 1, "prompt_length", lambda row: f"expected 1 or more, found {lengths[row]}")
            return lengths, chosen, rejected
        if layout is STEPS:
            prefix = self._ids(batch, "prompt_ids")
            own = [self._ids(batch, name) for name in ("chosen_ids", "rejected_ids")]
            prompts = [list(prefix[row]) for row in range(len(prefix))]
            sides = [[list(side[row]) for row in range(len(side))] for side in own]
        else:
            prompts = self._encoded(batch, "prompt")
            sides = [self._encoded(batch, name, ended=True) for name in ("chosen", "rejected")]
        names = [name for name in layout if name.startswith(("chosen", "rejected"))]
        both = [
            self._fitting(batch, name, [[*a, *b] for a, b in zip(prompts, side, strict=True)])
            for name, side in zip(names, sides, strict=False)
        ]
        return np.array([len(prompt) for prompt in prompts], dtype=np.int64), both[0], both[1]

    def _ids(self, batch: Batch, name: str) -> Ragged[np.int32]:
        return self._checked(batch, name, batch.ids(name))

    def _fitting(self, batch: Batch, name: str, rows: list[list[int]]) -> Ragged[np.int32]:
        return self._checked(batch, name, _ragged(rows, np.int64))

    def _checked(self, batch: Batch, name: str, rows: Ragged[Any]) -> Ragged[np.int32]:
        lengths = rows.lengths
        batch.refuse(lengths == 0, name, "expected one token or more, found none")
        batch.refuse(
            lengths > self.longest,
            name,
            lambda row: f"{lengths[row]} tokens with the prompt, actors.max_model_len is {self.longest}",
        )
        outside = (rows.values < 0) | (rows.values >= self.vocabulary)
        batch.refuse(
            rows.count(outside) > 0,
            name,
            lambda row: (
                f"expected token ids from 0 to {self.vocabulary - 1} (the policy's vocabulary), found "
                f"{next(int(i) for i in rows[row] if not 0 <= i < self.vocabulary)}"
            ),
        )
        return Ragged(rows.values.astype(np.int32), rows.starts)

    def _encoded(self, batch: Batch, name: str, *, ended: bool = False) -> list[list[int]]:
        """Return the token ids of a text column. With `ended`, each row ends with one end token."""
        texts = batch.texts(name)
        rows: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        end = end_token_id(self.tokenizer)
        # An end token right after the prompt would teach the policy to give no answer.
        empty = ([], [end]) if ended else ([],)
        blank = [not text.strip() or row in empty for text, row in zip(texts, rows, strict=True)]
        batch.refuse(np.array(blank, dtype=np.bool_), name, lambda row: f"expected text, found {texts[row][:40]!r}")
        return [[*row, end] if ended and row[-1] != end else row for row in rows]


class _Pairs:
    """Collector of pairs. It drops a pair if its sides are equal, or if one side begins with the other."""

    def __init__(self) -> None:
        self._chosen, self._rejected = _Rows[np.int32](np.int32), _Rows[np.int32](np.int32)
        self._prompts, self._commons, self._visits = (list[NDArray[np.int64]]() for _ in range(3))
        self._total = self._equal = self._empty = 0

    def add(
        self, batch: Batch, prompts: NDArray[np.int64], chosen: Ragged[np.int32], rejected: Ragged[np.int32]
    ) -> None:
        common_lengths = [common_prefix_length(chosen[row], rejected[row]) for row in range(len(chosen))]
        commons = np.array(common_lengths, dtype=np.int64)
        batch.refuse(
            commons < prompts,
            "prompt_length",
            lambda row: f"{prompts[row]}, but chosen_ids and rejected_ids have only {commons[row]} tokens in common",
        )
        if "common_prefix" in batch.columns:
            given = batch.counts("common_prefix")
            batch.refuse(
                given != commons,
                "common_prefix",
                lambda row: f"expected {commons[row]}, the length of their common prefix, found {given[row]}",
            )
        visits = np.stack([batch.visits(name) for name in _VISITS], axis=1)
        equal = (commons == chosen.lengths) & (commons == rejected.lengths)
        empty = (commons == np.minimum(chosen.lengths, rejected.lengths)) & ~equal
        selected = np.flatnonzero(~equal & ~empty)
        self._total += len(chosen)
        self._equal += int(equal.sum())
        self._empty += int(empty.sum())
        self._chosen.add(chosen, selected)
        self._rejected.add(rejected, selected)
        self._prompts.append(prompts[selected])
        self._commons.append(commons[selected])
        self._visits.append(visits[selected])

    def joined(self, where: str) -> PairRows:
        dropped = {"whose sides are equal": self._equal, "with no token after the common prefix": self._empty}
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        if self._equal + self._empty == self._total:
            raise DataError(f"{where}: expected pairs of two chains, found {reasons}")
        notes = (f"{where}: {self._equal + self._empty} of {self._total} pairs left out: {reasons}",) if reasons else ()
        prompts, commons, visits = map(np.concatenate, (self._prompts, self._commons, self._visits))
        return PairRows(self._chosen.joined(), self._rejected.joined(), prompts, commons, visits, notes)


@dataclass(slots=True)
class _Rows(Generic[Element]):
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


def _ragged(rows: Sequence[Sequence[Any]], dtype: Any) -> Ragged[Any]:
    lengths = np.array([0, *(len(row) for row in rows)], dtype=np.int64)
    values = np.fromiter((entry for row in rows for entry in row), dtype=dtype, count=int(lengths.sum()))
    return Ragged(values, np.cumsum(lengths))


def _digest(*arrays: NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
