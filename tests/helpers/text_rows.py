"""A tokenizer of characters with a chat template, and rows of messages."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from rlsys.data.rows import Reader

SYSTEM, USER = {"role": "system", "content": "S"}, {"role": "user", "content": "Q"}
GOOD, BAD = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Begins the answer with <think> and leaves the reasoning out of the reply, as some templates of reasoning models do.
REASONING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
SPECIAL = ("<s>", "<eos>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<think>")


@cache
def tokenizer(template: str | None = CHATML, end: str = "<|end|>", begins: bool = False) -> Any:
    """Return a tokenizer of single characters and the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    numbers = {text: number for number, text in enumerate([*SPECIAL, *characters])}
    model = Tokenizer(models.WordLevel(numbers, "~"))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    model.decoder = decoders.Fuse()
    model.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    if begins:
        model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"eos_token": end, "bos_token": "<s>", "unk_token": "~"}
    made = PreTrainedTokenizerFast(tokenizer_object=model, **names)
    made.chat_template = template
    return made


def write(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def reader(encoder: Any = None, longest: int = 99, ends: frozenset[int] = frozenset()) -> Reader:
    encoder = encoder or tokenizer()
    return Reader(encoder, len(encoder), longest, ends)
