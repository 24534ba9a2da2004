"""Templates of prompts: which texts in braces are fields, and what fills them."""

from __future__ import annotations

import pytest

from rlsys.tables.messages import with_system_prompt, with_template
from rlsys.tables.templates import check_template, field_names, filled
from rlsys.types import Message

SYSTEM, USER = Message(role="system", content="Be brief."), Message(role="user", content="1 + 1?")


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{question}", ("question",)),
        ("{topic}: {question} {topic}", ("topic", "question")),
        ("{extra_info.index}{question}", ("extra_info.index", "question")),
        (r"{question} in \boxed{}, \boxed{x}, \frac{a}{b}", ("question",)),
        (r"\boxed{{question}}", ("question",)),
        ('{"answer": 3} {two words} {1} {}', ()),
    ],
)
def test_fields(template: str, names: tuple[str, ...]) -> None:
    assert field_names(template) == names


def test_values_are_put_in_once_and_unknown_fields_stay() -> None:
    assert filled(r"{a} {b} {c} \text{a}", {"a": "{b}", "b": r"\1"}) == r"{b} \1 {c} \text{a}"


def test_a_template_needs_the_question() -> None:
    check_template("{question}")
    with pytest.raises(ValueError, match=r"must contain \{question\}"):
        check_template(r"\boxed{question}")


def test_a_system_prompt_stands_before_every_question_without_one() -> None:
    assert with_system_prompt("1 + 1?", "Be brief.") == (SYSTEM, USER)
    assert with_system_prompt((USER,), "Be brief.") == (SYSTEM, USER)
    assert with_system_prompt((SYSTEM, USER), "Other.") == (SYSTEM, USER)
    assert with_system_prompt("1 + 1?", None) == "1 + 1?"


def test_columns_fill_the_last_message_of_the_user() -> None:
    question = (SYSTEM, USER, Message(role="assistant", content="2"), USER)
    templated = with_template(question, "{topic}: {question}", {"topic": "sums", "question": "not this"})
    assert [message.content for message in templated if isinstance(message, Message)] == [
        "Be brief.", "1 + 1?", "2", "sums: 1 + 1?",
    ]  # fmt: skip
