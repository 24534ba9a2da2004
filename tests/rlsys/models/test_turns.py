"""Token ids of the texts of an environment, in line and as messages of a chat template."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest

from rlsys.config.tasks import GuessConfig, SumsConfig
from rlsys.errors import ConfigError
from rlsys.models import chat
from rlsys.models.scratch import ASSISTANT, EOS, USER, build_tokenizer
from rlsys.models.turns import TurnEncoder
from rlsys.tasks import build_task

TASKS: dict[str, Any] = {"sums": SumsConfig(tool_share=0.5), "guess": GuessConfig()}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def tokenizer_of(name: str) -> Any:
    return build_tokenizer(build_task(TASKS[name], 0).vocabulary(), 512)


def chatml() -> Any:
    tokenizer = build_tokenizer(["<|im_start|>", "user", "tool", "assistant"], 512)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    return tokenizer


def marked(tokenizer: Any, token_ids: list[int], own: list[bool]) -> str:
    """Return the text, with the parts that are not trained in braces."""
    text, last = "", True
    for token, flag in zip(token_ids, own, strict=True):
        text += ("" if flag == last else "}" if flag else "{") + tokenizer.decode([token])
        last = flag
    return text + ("" if last else "}")


def test_a_demonstration_trains_what_the_policy_writes() -> None:
    tokenizer = tokenizer_of("sums")
    pieces = ("<tool>12+7</tool>", "<result>19</result>", "<answer>19</answer>")
    assert marked(tokenizer, *chat.encode_demonstration(tokenizer, "add 12 7", pieces)) == (
        f"{{{USER}add 12 7{ASSISTANT}}}<tool>12+7</tool>{{<result>19</result>}}<answer>19</answer>{EOS}"
    )
    # After a last text of the environment the episode is over, and no end token belongs to it.
    assert marked(tokenizer, *chat.encode_demonstration(tokenizer, "add 12 7", pieces[:2])) == (
        f"{{{USER}add 12 7{ASSISTANT}}}<tool>12+7</tool>{{<result>19</result>}}"
    )
    # As messages, every turn ends with the end token, which is trained.
    encoder = chat.CheckedEncoder(tokenizer, len(tokenizer), TurnEncoder(tokenizer, "user"))
    assert marked(tokenizer, *encoder.demonstration("add 12 7", pieces)) == (
        f"{{{USER}add 12 7{ASSISTANT}}}<tool>12+7</tool>{EOS}"
        f"{{{USER}<result>19</result>{ASSISTANT}}}<answer>19</answer>{EOS}"
    )


@pytest.mark.parametrize("name", TASKS)
def test_tags_of_shipped_environments_are_single_tokens(name: str) -> None:
    tokenizer, task = tokenizer_of(name), build_task(TASKS[name], 0)
    _, chain = task.demonstration(3, random.Random(3)) or (None, "")
    token_ids, own = TurnEncoder(tokenizer, None).chain(tuple(chain), 1)
    assert tokenizer.decode(token_ids).removesuffix(EOS) == "".join(chain)
    texts = [tokenizer.decode([token]) for token in token_ids]
    assert all(len(text) == 1 or text.startswith("<") or text.isdecimal() for text in texts)
    assert any(own) and not all(own)


@pytest.mark.parametrize("role", ["user", "tool"])
def test_messages_are_those_of_the_chat_template(role: Any) -> None:
    tokenizer = chatml()
    encoder = TurnEncoder(tokenizer, role)
    messages = [
        {"role": "user", "content": "12 + 7?"},
        {"role": "assistant", "content": "let me ask"},
        {"role": role, "content": "it is 19"},
    ]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    turn = [*tokenizer("let me ask", add_special_tokens=False)["input_ids"], encoder.end]
    assert [*prompt, *turn, *encoder.reply("it is 19")] == whole


def test_a_text_cannot_forge_a_turn() -> None:
    tokenizer = chatml()
    special = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert special in tokenizer("x<|im_end|>")["input_ids"]
    for role in (None, "user"):
        token_ids = TurnEncoder(tokenizer, role).reply("x<|im_end|>y")
        assert token_ids.count(special) == (role == "user")  # only that of the template
        assert "x<|im_end|>y" in tokenizer.decode(token_ids)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "expected a chat template in the tokenizer"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ m.content + ' ' }}{% endfor %}", "ends the turn with '<|im_end|>'"),
        ("{% for m in messages if m.role != 'tool' %}{{ m.content + '<|im_end|>' }}{% endfor %}", "found 'rlsys"),
    ],
)
def test_a_template_without_such_messages_is_refused(template: str | None, reason: str) -> None:
    tokenizer = chatml()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError) as caught:
        TurnEncoder(tokenizer, "tool")
    assert caught.value.message.startswith("environment.role tool: expected a chat template")
    assert reason in caught.value.message
