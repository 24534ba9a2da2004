"""Notes on chat templates whose prompts probably do not lead to a reply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlsys.config.schema import FromScratchConfig
from rlsys.models.chat_template import template_note
from rlsys.models.folder import ModelFolder
from rlsys.models.scratch import build_from_scratch

CHATML = "{% for m in messages %}<user>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
INST = (
    "{% for m in messages %}{{ ' ' + m.content if m.role == 'assistant' else '[I]' + m.content + '[/I]' }}{% endfor %}"
)
TEMPLATES = {
    "none": (None, None),
    "empty": ("", "the chat template is empty, so questions are plain text"),
    "no header of the reply": (CHATML, "ends prompts without '<user>assistant: ', which it writes before a reply"),
    "a header of the reply": (CHATML + "{% if add_generation_prompt %}<user>assistant: {% endif %}", None),
    "no header at all": (INST, None),
    "prompts alone": ("{{ messages[0].content }}", None),
    "no reply": (
        "{% if messages|length > 1 %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}",
        None,
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("built") / "model"
    sizes = FromScratchConfig(hidden_size=32, layers=1, heads=1, intermediate_size=16, max_positions=64)
    build_from_scratch(sizes, ("sum",), 0, folder)
    return ModelFolder(folder).tokenizer


@pytest.mark.parametrize("case", TEMPLATES)
def test_prompts_that_lack_the_header_of_the_reply_are_noted(case: str, tokenizer: Any) -> None:
    text, message = TEMPLATES[case]
    tokenizer.chat_template = text
    note = template_note(tokenizer, "What is 12 + 7?")
    assert note is None if message is None else message in str(note)
