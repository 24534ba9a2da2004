"""A tiny Qwen2 model with a byte-level BPE trained on given texts. Tags are several tokens of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlsys.config.schema import FromScratchConfig
from rlsys.models.scratch import CHAT_TEMPLATE, EOS, PAD, SPECIAL_TOKENS, build_qwen2


def build_bpe_model(
    folder: Path,
    texts: Sequence[str],
    vocab_size: int = 400,
    *,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 2,
    intermediate_size: int = 128,
    max_positions: int = 512,
    seed: int = 0,
) -> Any:
    """Write the model in Hugging Face format, and return its tokenizer as read from the folder.

    The same arguments give the same bytes.

    Args:
        folder: Folder of the model.
        texts: Training texts of the BPE. If "><", ".</" and ">" with line breaks are frequent, they become one token,
            as in Qwen's own vocabulary.
        vocab_size: Maximal size of the vocabulary, including 4 special tokens and 256 bytes.
        hidden_size, layers, heads, intermediate_size, max_positions: Size of the model.
        seed: Seed of the weights.
    """
    from transformers import AutoTokenizer, Qwen2Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = _train(texts, vocab_size)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=None,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=list(SPECIAL_TOKENS[2:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_positions,
    )
    tokenizer.save_pretrained(folder)
    size = FromScratchConfig(
        hidden_size=hidden_size,
        layers=layers,
        heads=heads,
        intermediate_size=intermediate_size,
        max_positions=max_positions,
    )
    build_qwen2(size, len(tokenizer), seed, tokenizer).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _train(texts: Sequence[str], vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges of a byte-level BPE with the pre-tokenizer of Qwen2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2Tokenizer(vocab={"a": 0}, merges=[]).backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]
