"""Tiny models of several architectures with random weights, and the properties in which model folders differ."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAD, END, SECOND_END = "<pad>", "<eos>", "<end>"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PADDING = 40  # tokens that a padded vocabulary has beyond the tokenizer
SHARD = "64KB"
SIZE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
TOY_SIZE: dict[str, Any] = {
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
}
"""Size of a model that no tokenizer needs to fit."""

# Kinds of bodies: other names (gpt2: transformer, gpt_neox, mamba: backbone), tied and untied output layers, outputs of
# another width than the layers (opt), a bias on the output layer (phi), soft-capped and scaled logits (gemma2, cohere),
# buffers that are weights (apertus). Without a token classifier in transformers: all from gemma3_text on.
TOY_KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "llama": {},
    "mistral": {},
    "qwen3": {},
    "gemma2": {},
    "gpt2": {},
    "gpt_neox": {},
    "phi": {},
    "phi3": {"original_max_position_embeddings": 64},
    "bloom": {"n_layer": 2, "n_head": 2},
    "gemma3_text": {},
    "olmo2": {},
    "granite": {},
    "cohere": {},
    "apertus": {},
    "mamba": {},
    "opt": {"ffn_dim": 16, "word_embed_proj_dim": 8},
}


def toy_model(kind: str, **changes: Any) -> Any:
    """Return a causal language model of one of `TOY_KINDS` with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**TOY_SIZE, **TOY_KINDS[kind], **changes}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model folder to make.

    Attributes:
        kind: model_type of transformers.
        changes: settings of its config besides `SIZE`.
        tied: whether the output layer is the embedding.
        sharded: whether the weights are in several files.
        ends: number of tokens that end a completion.
        pads: whether the tokenizer has a padding token.
        padded_vocabulary: whether the model has more tokens than the tokenizer.
    """

    kind: str
    changes: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    sharded: bool = False
    ends: int = 1
    pads: bool = True
    padded_vocabulary: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind} {'tied' if self.tied else 'untied'}"


def build_architecture(architecture: Architecture, folder: Path) -> None:
    """Write the model and a byte-level tokenizer in Hugging Face format."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    tokenizer = _tokenizer(architecture)
    tokenizer.save_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (END, SECOND_END)[: architecture.ends]]
    tokens = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": ends}
    config = AutoConfig.for_model(
        architecture.kind,
        **{
            **SIZE,
            **tokens,
            "vocab_size": len(tokenizer) + PADDING * architecture.padded_vocabulary,
            "tie_word_embeddings": architecture.tied,
            **architecture.changes,
        },
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(folder, max_shard_size=SHARD if architecture.sharded else "5GB")


def _tokenizer(architecture: Architecture) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [END, SECOND_END, *([PAD] if architecture.pads else [])]
    entries = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={entry: number for number, entry in enumerate(entries)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD if architecture.pads else None,
        chat_template=TEMPLATE,
        model_max_length=SIZE["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
