"""Question, answer and demonstration of a row, found by the names of its columns or by a known form."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

from rlsys.config.tasks import DatasetConfig
from rlsys.errors import DataError
from rlsys.tables.files import ExactFloat, Row, described, is_unicode, json_object
from rlsys.tables.forms import FORMS, expected_columns, form_name, forms_of
from rlsys.tables.messages import (
    before_reply,
    conversation,
    is_conversation,
    refuse_media,
    unfolded,
    with_system_prompt,
    with_template,
)
from rlsys.tables.sources import Source
from rlsys.tables.templates import QUESTION, field_names
from rlsys.tasks.answers.reading.reader import read_answer
from rlsys.tasks.answers.values import Sequence as ValueList
from rlsys.tasks.answers.values import UnreadableError
from rlsys.types import Question

Content = TypeVar("Content")

_TRUTH = "ground_truth"
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
# Columns of question and answer, for columns that the config leaves at their defaults.
_PAIRS = [(form.reads["task"][0], form.reads["task"][1]) for form in FORMS if "task" in form.reads]
_DEFAULTS = {name: DatasetConfig.model_fields[name].default for name in ("question_column", "answer_column")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Content of a readable row.

    Attributes:
        question: the question in the prompt template, after the system prompt.
        answer: the reference answer; "" if the data set has none.
        columns: all its columns, as JSON values.
    """

    number: int
    question: Question
    answer: str
    demonstration: str | None
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Names of the columns to read. A dot leads into a nested column, as in reward_model.ground_truth.

    Attributes:
        answer: None if the data set has no reference answers.
    """

    question: str
    answer: str | None
    demonstration: str | None = None
    pattern: re.Pattern[str] | None = None
    template: str = "{question}"
    system_prompt: str | None = None

    def example(self, row: Row) -> Example | str:
        """Return the texts of a row, or the reason why it cannot be used."""
        if isinstance(row.values, str):
            return row.values
        try:
            refuse_media(row.values)
            question = self._asked(row.values)
            answer = _read(row.values, self.answer, _answer) if self.answer else ""
            demonstration = self.demonstration and _read(row.values, self.demonstration, _demonstration)
        except DataError as error:
            return error.message
        if self.answer and self.pattern is not None:
            match = self.pattern.search(answer)
            answer = (match[1] or "").strip() if match else ""
            if not answer:
                return f"column {self.answer!r}: no answer that matches task.answer_pattern"
        columns = json.loads(json.dumps(row.values, default=str))
        return Example(
            number=row.number, question=question, answer=answer, demonstration=demonstration, columns=columns
        )

    def _asked(self, values: Mapping[str, Any]) -> Question:
        """Return the question of a row as the policy is asked it."""
        question = _read(values, self.question, _question)
        names = [name for name in field_names(self.template) if name != QUESTION]
        columns = {name: _read(values, name, _field) for name in names}
        return with_system_prompt(with_template(question, self.template, columns), self.system_prompt)


def find_columns(source: Source, config: DatasetConfig) -> Columns:
    """Return the columns that the config names, or those of a known form in place of missing defaults.

    Raises:
        DataError: A column is missing. The message names the form of the rows, and the fields to change.
    """
    question, answer = config.question_column, config.answer_column
    rows = [row.values for row in source.rows if isinstance(row.values, dict)]
    if rows:
        question, answer = _recognised(question, answer, source, rows)
        fields = [
            ("task.question_column", question),
            ("task.answer_column", answer),
            ("task.demonstration_column", config.demonstration_column),
            *(("task.prompt_template", name) for name in field_names(config.prompt_template) if name != QUESTION),
        ]
        for name, column in fields:
            if column is not None and not any(_has(values, column) for values in rows):
                known = f"its columns are {', '.join(source.columns)}"
                raise DataError(f"{name}: {source.path} has no column {column!r}; {known}{_hint(name, source)}")
    pattern = None if config.answer_pattern is None else re.compile(config.answer_pattern)
    return Columns(
        question=question,
        answer=answer,
        demonstration=config.demonstration_column,
        pattern=pattern,
        template=config.prompt_template,
        system_prompt=config.system_prompt,
    )


def _recognised(
    question: str, answer: str | None, source: Source, rows: Sequence[Mapping[str, Any]]
) -> tuple[str, str | None]:
    """Return the columns of the first known form that the rows have and the config does not contradict.

    A column that the config names itself may be any; the other one is then that of the first form that has it.
    """
    names = source.columns
    if _are_judged(source):
        return question, answer
    question_is_free = question == _DEFAULTS["question_column"] and question not in names
    if answer is None:
        first = (name for name, _ in _PAIRS if any(_has(values, name) for values in rows))
        return (next(first, question) if question_is_free else question), None
    answer_is_free = answer == _DEFAULTS["answer_column"] and answer not in names
    for form in _PAIRS:
        columns = form[0] if question_is_free else question, form[1] if answer_is_free else answer
        if columns == form and all(any(_has(values, name) for values in rows) for name in form):
            return form
    if question_is_free and not answer_is_free:
        question = next((name for name, _ in _PAIRS if any(_has(values, name) for values in rows)), question)
    return question, answer


def _are_judged(source: Source) -> bool:
    return any(form.judged for form in forms_of(source.columns))


def _hint(name: str, source: Source) -> str:
    form = form_name(source.columns)
    described = f" ({form} rows)" if form else ""
    if _are_judged(source):
        known = f"its columns are {expected_columns('task')}, or those that task.question_column and answer_column name"
        return f"{described}; a task needs a question and its right answer in every row: {known}"
    if name == "task.prompt_template":
        return f"{described}; name one of them in the braces, or a part of one (column.part)"
    without = "; without answers, set task.answer_column to null and name rewards.functions"
    unanswered = name == "task.answer_column" or form == "prompt-only"
    return f"{described}; set {name} to one of them, or to a part of one (column.part){without if unanswered else ''}"


def _has(values: Mapping[str, Any], name: str) -> bool:
    return name in values or _nested(values, name) is not None


def _cell(values: Mapping[str, Any], name: str) -> Any:
    """Return the value of a column. A dot in a name that no column has leads into a nested column."""
    return values[name] if name in values else _nested(values, name)


def _nested(values: Mapping[str, Any], name: str) -> Any:
    for place in (match.start() for match in re.finditer(r"\.", name)):
        inner = values.get(name[:place])
        if isinstance(inner, str) and inner.lstrip().startswith("{"):  # a nested column of a CSV file
            inner = json_object(inner.encode("utf-8", "ignore"))
        if isinstance(inner, Mapping) and (value := _cell(inner, name[place + 1 :])) is not None:
            return value
    return None


def _read(values: Mapping[str, Any], name: str, read: Callable[[Any], Content]) -> Content:
    try:
        return read(unfolded(_cell(values, name)))
    except DataError as error:
        is_missing = name.partition(".")[0] not in values
        raise DataError(f"column {name!r}: {'missing in this row' if is_missing else error.message}") from None


def _question(cell: Any) -> Question:
    return before_reply(conversation(cell)) if is_conversation(cell) else _required(cell, _text(cell))


def _field(cell: Any) -> str:
    """Return the text of a field of the prompt template; "" for null or an empty text."""
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return ""
    return _required(cell, _text(cell))


def _answer(cell: Any) -> str:
    """Return the reference answer. A list of one text is that text; several texts are joined by commas.

    The judge reads the items of a list without its inner order, so an entry that is a list itself would be lost in it:
    `["1", "2,3"]` and `["1,2", "3"]` are the same to the judge.

    Raises:
        DataError: there is no text, or an entry of several is more than one value.
    """
    if isinstance(cell, Mapping) and _TRUTH in cell:
        cell = cell[_TRUTH]
    if isinstance(cell, list) and not is_conversation(cell):
        texts = [_text(entry) for entry in cell]
        for text in texts if len(texts) > 1 else ():
            if text is not None and not _is_one_value(text):
                raise DataError(
                    f"expected one value in each entry of a list, found {text[:40]!r}; put an entry that is a list "
                    "itself into brackets, or write the whole answer as one text"
                )
        return _required(cell, ", ".join(map(str, texts)) if texts and None not in texts else None)
    return _demonstration(cell)


def _is_one_value(text: str) -> bool:
    """Return whether a text is still one item of a list between commas: it has separators in whole brackets only."""
    depth = 0
    for character in _THOUSANDS.sub("", text):
        depth = max(0, depth + (character in "([{") - (character in ")]}"))
        if depth == 0 and character in ",;":
            return False
    try:
        value = read_answer(text)
    except (UnreadableError, RecursionError):
        return depth == 0
    return depth == 0 and (not isinstance(value, ValueList) or bool(value.brackets))


def _demonstration(cell: Any) -> str:
    """Return a text, or the last turn of the assistant in a conversation."""
    if is_conversation(cell):
        replies = [message.content for message in conversation(cell) if message.role == "assistant"]
        return _required(cell, _text(replies[-1]) if replies else None)
    return _required(cell, _text(cell))


def _required(cell: Any, text: str | None) -> str:
    if text is None:
        is_blank = isinstance(cell, str) and not cell.strip()
        raise DataError(f"expected text, found {repr(cell[:40]) if is_blank else described(cell)}")
    return text


def _text(value: Any) -> str | None:
    """Return a text or number as text, None for an empty or other value. Answer columns often have numbers."""
    if isinstance(value, Decimal) and value.is_finite():
        value = format(value, "f")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, float) and not isinstance(value, ExactFloat) and not math.isfinite(value):
        return None
    text = str(value).strip()
    return text if text and is_unicode(text) else None
