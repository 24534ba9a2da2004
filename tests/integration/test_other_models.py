"""A model with a tokenizer of its own, in which thought tags are several tokens, trained asynchronously."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_runs import TINY, Command, last_checkpoint, write_config

from rlsys.config.tasks import LetterCountConfig
from rlsys.run.metrics import read_rows
from rlsys.tasks import build_task
from rlsys.tasks.tags import tag_strings

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def train_tokenizer(texts: list[str]) -> Any:
    """Byte-level BPE as Qwen's, trained on texts without the tags."""
    import json

    from tokenizers import ByteLevelBPETokenizer
    from transformers import Qwen2Tokenizer

    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator(texts, vocab_size=300, min_frequency=2, show_progress=False)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        unk_token=None,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        extra_special_tokens=[SPECIAL[1]],
        chat_template=CHAT_TEMPLATE,
    )


def build_model(folder: Path, task: LetterCountConfig) -> Any:
    """An untied Qwen2 with random weights and the tokenizer; the tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    problems = build_task(task, 0)
    examples = [problems.demonstration(i, random.Random(i)) for i in range(200)]
    texts = [text for example in examples if example for text in (example[0].question, example[1])]
    for tag in tag_strings():
        texts = [text.replace(tag, " ") for text in texts]
    tokenizer = train_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            initializer_range=0.1,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    return tokenizer


@pytest.mark.long
def test_bpe_tags_of_several_tokens_and_staleness_of_one(start: Callable[..., Command], tmp_path: Path) -> None:
    tokenizer = build_model(tmp_path / "model", LetterCountConfig(**TINY["task"]))
    assert len(tokenizer("<thinking>")["input_ids"]) > 1 and len(tokenizer("</answer>")["input_ids"]) > 1
    config = {
        **TINY,
        "model": {"path": str(tmp_path / "model")},
        "actors": {**TINY["actors"], "max_model_len": 192},
        "sampling": {"max_tokens": 96},
        "learner": {"ranks": 2, "zero_stage": 3, "micro_batch_tokens": 2048},
        "warm_start": {**TINY["warm_start"], "max_steps": 40},
        "train": {**TINY["train"], "max_steps": 4, "max_staleness": 1},
    }
    run = tmp_path / "run"
    start("train", write_config(tmp_path, config)).finish().assert_gone(within_s=5)

    rows = read_rows(run / "metrics.jsonl")
    warm = [row["objective/sft_loss"] for row in rows if row["stage"] == "warm_start"]
    assert warm[-1] < warm[0] / 2
    online = [row for row in rows if row["stage"] == "online" and row["step"] > 0]
    assert [row["weights/version"] for row in online] == [41, 42, 43, 44]
    # A step ends before its publish does: the next row holds the gap.
    gaps = [row["weights/probe_gap_max"] for row in online if "weights/probe_gap_max" in row]
    assert len(gaps) == 3 and max(gaps) <= 5e-4
    # Two steps' worth of prompts are issued before the first step: its own are fresh, those of the second
    # were begun with the weights before. Later ones depend on timing, within the bound.
    staleness = [row["rollout/staleness_max"] for row in online]
    assert staleness[:2] == [0, 1] and max(staleness) <= 1
    assert online[0]["learner/logprob_gap_max"] <= 5e-4
    # An answer is found in the text, however its tags were tokenised.
    assert min(row["rollout/no_answer_rate"] for row in online) < 1
    policy = last_checkpoint(run) / "policy"
    assert (policy / "tokenizer.json").read_text() == (tmp_path / "model" / "tokenizer.json").read_text()
