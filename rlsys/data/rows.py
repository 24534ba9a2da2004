"""Training rows from files: demonstrations and preference pairs, kept as arrays of token ids.

A file has the id columns of `rlsys extract`, or rows of text or messages, which `rlsys.data.text_rows` encodes. Rows
that are too long or unreadable are left out up to a share. Only token ids stay in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlsys.data.left_out import LeftOut
from rlsys.data.ragged import RaggedRows, joined_sides, ragged
from rlsys.data.teacher_columns import SCORED_IDS, ExpectedScores, ScoreCollector, TeacherColumns
from rlsys.data.text_rows import EncodedRows, TextEncoder
from rlsys.data.written_tokens import mask_of, written_tokens
from rlsys.errors import DataError
from rlsys.models.chat_template import reply_header
from rlsys.sequences import common_prefix_length
from rlsys.tables.forms import Section, expected_columns, form_name, read_columns
from rlsys.tables.read import UNKNOWN, Batch, Layout, Ragged, RowFile
from rlsys.tables.schemas import PREFERENCES, STEP_PREFERENCES, SUPERVISED
from rlsys.tables.sources import WHOLE, Part
from rlsys.types import Demonstration, Preference

_SIDE_PLACES = ("column prompt_ids", "column chosen_ids", "column rejected_ids")
_VISITS = ("chosen_visits", "rejected_visits")
SUPERVISED_IDS: Layout = SUPERVISED.subset("token_ids", "loss_mask")
_MASKS = ("chosen_mask", "rejected_mask")
CHAINS: Layout = PREFERENCES.subset("chosen_ids", "rejected_ids", "prompt_length", "common_prefix", *_VISITS, *_MASKS)
STEPS: Layout = STEP_PREFERENCES.subset("prompt_ids", "chosen_ids", "rejected_ids", *_VISITS)


@dataclass(frozen=True, slots=True)
class SupervisedRows:
    """Demonstrations of a file. `notes` are lines for the user about the file."""

    token_ids: Ragged[np.int32]
    loss_mask: Ragged[np.bool_]
    notes: tuple[str, ...] = ()
    teacher: TeacherColumns | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    def row(self, number: int) -> Demonstration:
        ids, mask = self.token_ids[number], self.loss_mask[number]
        scores = self.teacher.row(number, mask) if self.teacher else None
        return Demonstration(token_ids=ids, loss_mask=mask, teacher=scores)

    def digest(self) -> str:
        """Return the sha256 of all rows."""
        scores = (self.teacher.ids.values, self.teacher.logprobs.values) if self.teacher else ()
        return _digest(self.token_ids.values, self.token_ids.starts, self.loss_mask.values, *scores)


@dataclass(frozen=True, slots=True)
class PairRows:
    """P preference pairs of a file.

    Attributes:
        chosen, rejected: Token ids of the two sides, prompt first.
        prompt_lengths, commons: [P] lengths of the prompt and of the common prefix, in tokens.
        visits: [P, 2] visits of both sides, `UNKNOWN` where the file has none.
        written: Masks of the tokens of the two sides, False on replies of an environment.
        notes: Lines for the user about the file.
    """

    chosen: Ragged[np.int32]
    rejected: Ragged[np.int32]
    prompt_lengths: NDArray[np.int64]
    commons: NDArray[np.int64]
    visits: NDArray[np.int64]
    written: tuple[Ragged[np.bool_], Ragged[np.bool_]]
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
            chosen_mask=mask_of(self.written[0], number),
            rejected_mask=mask_of(self.written[1], number),
            chosen_visits=chosen,
            rejected_visits=rejected,
            chosen_reference=None if reference is None else float(reference[0]),
            rejected_reference=None if reference is None else float(reference[1]),
        )

    def digest(self) -> str:
        """Return the sha256 of all pairs."""
        sides = [array for side in (self.chosen, self.rejected) for array in (side.values, side.starts)]
        masks = [mask.values for mask in self.written if not mask.values.all()]
        return _digest(*sides, self.prompt_lengths, self.commons, self.visits, *masks)


@dataclass(frozen=True, slots=True)
class Reader:
    """Reader of row files for one policy.

    Attributes:
        tokenizer: Hugging Face tokenizer of the policy.
        vocabulary: Number of token ids.
        longest: Largest number of tokens of a row (actors.max_model_len).
        end_tokens: Tokens that end a completion, besides the tokenizer's own.
        scores: Which scores of a teacher demonstrations may have; None to leave them unread.
    """

    tokenizer: Any
    vocabulary: int
    longest: int
    end_tokens: frozenset[int] = frozenset()
    scores: ExpectedScores | None = None

    def supervised(self, path: str, source: str, max_bad_rows: float = 0.0, part: Part = WHOLE) -> SupervisedRows:
        """Read the demonstrations of a file.

        Args:
            path: The file.
            source: Config field that names the file, for error messages.
            max_bad_rows: Largest share of rows that are left out because they are too long or unreadable.
            part: Part of a data set.

        Raises:
            DataError: The file cannot be used, or too many of its rows. The message names the file, the row and the
                column.
        """
        file = RowFile(path, source, part)
        left_out = LeftOut(where=file.where, noun="rows", limit="sft.max_bad_rows", share=max_bad_rows)
        token_ids, masks, unwanted, bare = RaggedRows[np.int32](np.int32), RaggedRows[np.bool_](np.bool_), 0, 0
        layout = file.layout([SCORED_IDS, SUPERVISED_IDS] if self.scores else [SUPERVISED_IDS])
        teacher = ScoreCollector(self.scores) if self.scores and layout is SCORED_IDS else None
        if self.scores and not teacher:
            self.scores.check_optional(file)
        if layout:
            for batch in file.batches(layout):
                ids, mask = self._supervised(batch)
                prompts = np.zeros(len(ids), dtype=np.int64)
                fitting = self._fitting(batch, ["column token_ids"] * 2, prompts, [ids], left_out)
                token_ids.add(ids, fitting)
                masks.add(mask, fitting)
                if teacher:
                    teacher.add(batch, mask, self._ids(batch, "teacher_ids"), fitting)
        else:
            for rows in self._texts(file, "sft", left_out):
                unwanted, bare = unwanted + rows.unwanted, bare + rows.bare
                pieces = list(zip(rows.prompts, rows.sides[0], strict=True))
                token_ids.add(ragged([[*prompt, *side] for prompt, side in pieces], np.int32))
                masks.add(ragged([[False] * len(prompt) + [True] * len(side) for prompt, side in pieces], np.bool_))
        left_out.check()
        joined = token_ids.joined()
        if not len(joined):
            raise DataError(f"{file.where}: expected a row to train, found none: the label of every row is false")
        labels = f"{file.where}: {unwanted} rows left out: their label is false"
        notes = (*left_out.notes, *self._bare_note(left_out, bare), *((labels,) if unwanted else ()))
        return SupervisedRows(joined, masks.joined(), notes, teacher.joined() if teacher else None)

    def pairs(self, path: str, source: str, max_bad_rows: float = 0.0, part: Part = WHOLE) -> PairRows:
        """Read the pairs of a file. Pairs without a difference to learn are left out and counted in a note.

        Args:
            path: The file.
            source: Config field that names the file, for error messages.
            max_bad_rows: Largest share of pairs that are left out because they are too long or unreadable.
            part: Part of a data set.

        Raises:
            DataError: The file cannot be used, or too many of its rows, or no pair is left.
        """
        file = RowFile(path, source, part)
        left_out = LeftOut(where=file.where, noun="rows", limit="preference.max_bad_rows", share=max_bad_rows)
        pairs, bare = _Pairs(), 0
        if layout := file.layout([CHAINS, STEPS]):
            for batch in file.batches(layout):
                prompts, chosen, rejected = self._sides(batch, layout)
                own = prompts if layout is STEPS else np.zeros_like(prompts)
                fitting = self._fitting(batch, _SIDE_PLACES, own, [chosen, rejected], left_out)
                pairs.add(batch, prompts, chosen, rejected, fitting)
        else:
            for rows in self._texts(file, "preference", left_out):
                bare += rows.bare
                lengths = np.array([len(prompt) for prompt in rows.prompts], dtype=np.int64)
                chosen, rejected = (joined_sides(rows.prompts, side) for side in rows.sides)
                pairs.add(Batch(file.where, rows.numbers, {}), lengths, chosen, rejected)
        left_out.check()
        return pairs.joined(file.where, (*left_out.notes, *self._bare_note(left_out, bare)))

    def _bare_note(self, left_out: LeftOut, bare: int) -> tuple[str, ...]:
        """Return the line about rows of plain text without the chat template that sampled prompts have."""
        if not bare:
            return ()
        return (
            f"{left_out.where}: {bare} of {left_out.total} rows are plain text, which gets no chat template, and lack "
            f"{reply_header(self.tokenizer)!r}, which prompts of sampling have before a reply; write them as messages, "
            "or render the template into the text",
        )

    def _texts(self, file: RowFile, section: Section, left_out: LeftOut) -> Iterator[EncodedRows]:
        """Yield the usable rows of text or messages. The others are added to `left_out`.

        Raises:
            DataError: The section reads none of the forms that the file has, or the file has no row.
        """
        names = file.names()
        columns = read_columns(names, section)
        if columns is None:
            form = form_name(names)
            described = f"{form} rows: " if form else ""
            raise DataError(
                f"{file.where}: expected the columns {expected_columns(section)}; found "
                f"{described}{', '.join(names) or 'none'}"
            )
        for rows in TextEncoder(self.tokenizer, self.end_tokens, columns).encode(file.rows()):
            left_out.total += len(rows.numbers) + len(rows.bad) + rows.unwanted
            for number, reason in rows.bad.items():
                left_out.add(number, f"row {number}{', ' if reason.startswith('column') else ': '}{reason}")
            yield self._fitting_texts(file, rows, left_out)

    def _fitting_texts(self, file: RowFile, rows: EncodedRows, left_out: LeftOut) -> EncodedRows:
        """Return the rows that are not too long. Raise DataError for a token outside the vocabulary."""
        fitting = []
        for index, number in enumerate(rows.numbers):
            parts = [rows.prompts[index], *(side[index] for side in rows.sides)]
            for place, tokens in zip(rows.places[index], parts, strict=True):
                if (largest := max(tokens, default=0)) >= self.vocabulary:
                    raise DataError(f"{file.where}, row {number}, {place}: {self._expected_ids(largest)}")
            prompt, *sides = map(len, parts)
            if prompt + max(sides) > self.longest:
                reason = self._too_long(rows.places[index], prompt, sides)
                left_out.add(number, f"row {number}, {reason}")
            else:
                fitting.append(index)
        return EncodedRows(
            numbers=[rows.numbers[index] for index in fitting],
            prompts=[rows.prompts[index] for index in fitting],
            sides=[[side[index] for index in fitting] for side in rows.sides],
            unwanted=rows.unwanted,
            bare=rows.bare,
        )

    def _too_long(self, places: Sequence[str], prompt: int, sides: Sequence[int]) -> str:
        """Return the column that is too long, and by how much.

        Args:
            places: Columns of the prompt and of each side.
            prompt: Tokens of the prompt, which is at fault if it leaves no room for a side.
            sides: Tokens of each side after the prompt.
        """
        length, with_prompt = prompt + max(sides), " with the prompt"
        place = places[1 + sides.index(max(sides))]
        if prompt >= self.longest:
            length, with_prompt, place = prompt, "", places[0]
        return f"{place}: {length} tokens{with_prompt}, actors.max_model_len is {self.longest}"

    def _expected_ids(self, token: int) -> str:
        return f"expected token ids from 0 to {self.vocabulary - 1} (the policy's vocabulary), found {token}"

    def _fitting(
        self,
        batch: Batch,
        places: Sequence[str],
        prompts: NDArray[np.int64],
        sides: Sequence[Ragged[np.int32]],
        left_out: LeftOut,
    ) -> NDArray[np.int64]:
        """Return the indices of the rows that are not too long, and add the others to `left_out`.

        Args:
            places: Columns of the prompt and of each side.
            prompts: Tokens of each prompt that has a column of its own, else 0.
            sides: Token ids of each side, prompt first.
        """  # fmt: skip
        lengths = np.max([side.lengths for side in sides], axis=0)
        left_out.total += len(lengths)
        for row in np.flatnonzero(lengths > self.longest):
            number, prompt = batch.numbers[row], int(prompts[row])
            reason = self._too_long(places, prompt, [int(side.lengths[row]) - prompt for side in sides])
            left_out.add(number, f"row {number}, {reason}")
        return np.flatnonzero(lengths <= self.longest)

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

    def _sides(self, batch: Batch, layout: Layout) -> tuple[NDArray[np.int64], Ragged[np.int32], Ragged[np.int32]]:
        """Return the prompt lengths and the token ids of both sides, prompt first."""
        if layout is CHAINS:
            lengths = batch.counts("prompt_length")
            chosen, rejected = self._ids(batch, "chosen_ids"), self._ids(batch, "rejected_ids")
            batch.refuse(lengths < 1, "prompt_length", lambda row: f"expected 1 or more, found {lengths[row]}")
            return lengths, chosen, rejected
        prefix = self._ids(batch, "prompt_ids")
        prompts = [prefix[row].tolist() for row in range(len(prefix))]
        own = [self._ids(batch, name) for name in ("chosen_ids", "rejected_ids")]
        both = [joined_sides(prompts, [side[row].tolist() for row in range(len(side))]) for side in own]
        return prefix.lengths, both[0], both[1]

    def _ids(self, batch: Batch, name: str) -> Ragged[np.int32]:
        rows = batch.ids(name)
        batch.refuse(rows.lengths == 0, name, "expected one token or more, found none")
        outside = (rows.values < 0) | (rows.values >= self.vocabulary)
        batch.refuse(
            rows.count(outside) > 0,
            name,
            lambda row: self._expected_ids(next(int(i) for i in rows[row] if not 0 <= i < self.vocabulary)),
        )
        return Ragged(rows.values.astype(np.int32), rows.starts)


class _Pairs:
    """Collector of pairs. It drops a pair if its sides are equal, or if one side begins with the other."""

    def __init__(self) -> None:
        self._chosen, self._rejected = RaggedRows[np.int32](np.int32), RaggedRows[np.int32](np.int32)
        self._written = RaggedRows[np.bool_](np.bool_), RaggedRows[np.bool_](np.bool_)
        self._prompts, self._commons, self._visits = (list[NDArray[np.int64]]() for _ in range(3))
        self._total = self._equal = self._empty = 0

    def add(
        self,
        batch: Batch,
        prompts: NDArray[np.int64],
        chosen: Ragged[np.int32],
        rejected: Ragged[np.int32],
        fitting: NDArray[np.int64] | None = None,
    ) -> None:
        """Append the pairs of a batch, or those with the indices `fitting`."""
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
        fits = np.ones(len(chosen), dtype=np.bool_) if fitting is None else np.isin(np.arange(len(chosen)), fitting)
        equal = (commons == chosen.lengths) & (commons == rejected.lengths) & fits
        empty = (commons == np.minimum(chosen.lengths, rejected.lengths)) & ~equal & fits
        selected = np.flatnonzero(~equal & ~empty & fits)
        self._total += int(fits.sum())
        self._equal += int(equal.sum())
        self._empty += int(empty.sum())
        self._chosen.add(chosen, selected)
        self._rejected.add(rejected, selected)
        for mask, name, side in zip(self._written, _MASKS, (chosen, rejected), strict=True):
            mask.add(written_tokens(batch, name, side), selected)
        self._prompts.append(prompts[selected])
        self._commons.append(commons[selected])
        self._visits.append(visits[selected])

    def joined(self, where: str, notes: tuple[str, ...]) -> PairRows:
        dropped = {"whose sides are equal": self._equal, "with no token after the common prefix": self._empty}
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        if self._equal + self._empty == self._total:
            raise DataError(f"{where}: expected pairs of two chains, found {reasons}")
        if reasons:
            notes = (*notes, f"{where}: {self._equal + self._empty} of {self._total} pairs left out: {reasons}")
        prompts, commons, visits = map(np.concatenate, (self._prompts, self._commons, self._visits))
        written = self._written[0].joined(), self._written[1].joined()
        return PairRows(self._chosen.joined(), self._rejected.joined(), prompts, commons, visits, written, notes)


def _digest(*arrays: NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
