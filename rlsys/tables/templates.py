"""Templates of prompts: text with fields in braces, such as {question}, that the columns of a row fill."""

from __future__ import annotations

import re
from collections.abc import Mapping

QUESTION = "question"

# str.format would fail, because LaTeX has braces. The arguments of a LaTeX command, as in \frac{a}{b}, are no fields.
_FIELD = re.compile(r"\\[A-Za-z]+(?:\{[^{}]*\})+|\{([A-Za-z_][A-Za-z0-9_.-]*)\}")


def field_names(template: str) -> tuple[str, ...]:
    """Return the names of the fields of a template, each once."""
    return tuple(dict.fromkeys(match[1] for match in _FIELD.finditer(template) if match[1]))


def filled(template: str, values: Mapping[str, str]) -> str:
    """Return a template with values in place of its fields. A field without a value stays as it is."""
    return _FIELD.sub(lambda match: values.get(match[1], match[0]) if match[1] else match[0], template)


def check_template(template: str, column: str | None = None) -> None:
    """Raise ValueError if a prompt template has no field for the question.

    Args:
        template: the template.
        column: the column of the question, if a config can name it.
    """
    if QUESTION not in field_names(template):
        meaning = f", which stands for the text of the column {column!r} (task.question_column)" if column else ""
        raise ValueError(f"prompt_template must contain {{question}}{meaning}")
