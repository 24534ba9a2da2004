"""A tiny Qwen2 whose tokenizer is a byte-level BPE trained on given texts: tags are several tokens there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlsys.config.schema import FromScratchConfig
from rlsys.models.scratch import CHAT_TEMPLATE, EOS, PAD, SPECIAL_TOKENS, _build_qwen2


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
    """Write the model in Hugging Face format and answer with its tokenizer, as read back from the folder.

    The same arguments give the same bytes.

    Args:
        texts: what the BPE is trained on. "><", ".</" and ">" with line breaks become one token where they are
            frequent, as in Qwen's own vocabulary.
        vocab_size: entries of the vocabulary at most; 4 special tokens and 256 bytes come first.
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
    _build_qwen2(size, len(tokenizer), seed, tokenizer).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def _train(texts: Sequence[str], vocab_size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE over the pieces that Qwen2's pre-tokenizer cuts."""
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
