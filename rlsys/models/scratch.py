"""Tiny Qwen2 models made from scratch, with a tokenizer whose vocabulary holds a task's words.

torch and transformers are imported inside the functions, so that importing this module stays light.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rlsys.config.schema import FromScratchConfig
from rlsys.directory import RunDirectory
from rlsys.errors import ConfigError
from rlsys.models.chat import end_token_id
from rlsys.models.folder import ModelFolder, json_digest

PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<user>", "<assistant>"
SPECIAL_TOKENS = (PAD, EOS, USER, ASSISTANT)

# A rotary base this low makes nearby positions in short sequences easy to tell apart. With it and initial weights of
# about 1/sqrt(hidden_size), a tiny model learns to copy a word letter by letter in 300 steps. With the usual base of
# 10000 and weights of 0.02, it copies only a third of the words after the same training.
ROPE_BASE = 100.0

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}<eos>"
    "{% else %}<user>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class UnbuiltModel(ModelFolder):
    """A model from scratch without files: it has a tokenizer and a size, but no weights and no digest.

    Args:
        config: sizes of the model.
        vocabulary: strings that become single tokens.
        path: the folder that a run would write the model to; nothing is read from it.
    """

    def __init__(self, config: FromScratchConfig, vocabulary: Sequence[str], path: Path) -> None:
        super().__init__(path, "model.from_scratch")
        self._config = config
        self._vocabulary = vocabulary

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that `build_from_scratch` would write."""
        return build_tokenizer(self._vocabulary, self._config.max_positions)

    @cached_property
    def end_token_ids(self) -> list[int]:
        """The end token of the tokenizer."""
        return [end_token_id(self.tokenizer)]

    @cached_property
    def vocabulary(self) -> int:
        """Number of tokens of the tokenizer."""
        return len(self.tokenizer)

    @cached_property
    def parameters(self) -> int:
        """Number of parameters of the Qwen2 of this size."""
        config, hidden = self._config, self._config.hidden_size
        embeddings = len(self.tokenizer) * hidden * (1 if config.tie_embeddings else 2)
        attention = 4 * hidden * hidden + 3 * hidden  # queries, keys and values have biases
        layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden  # two norms
        return embeddings + config.layers * layer + hidden

    @property
    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Numbers of outputs and inputs of the linear layers of the Qwen2 of this size, by name."""
        config = self._config
        hidden, inner = config.hidden_size, config.intermediate_size
        sizes = {
            **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"},
            **{f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")},
            "mlp.down_proj": (hidden, inner),
        }
        return {
            f"model.layers.{number}.{name}": size for number in range(config.layers) for name, size in sizes.items()
        }


def scratch_model(config: FromScratchConfig, vocabulary: Sequence[str], seed: int, run_dir: Path) -> ModelFolder:
    """Return the model from scratch of a run directory, built if it is missing or was built from other settings.

    Args:
        config: sizes of the model.
        vocabulary: strings that become single tokens.
        seed: seed of the initial weights.
        run_dir: the run directory that gets the model.

    Raises:
        ConfigError: the disk is full.
    """
    folder, record = RunDirectory(run_dir).model, RunDirectory(run_dir).model_digest
    settings_digest = json_digest([config.model_dump(), vocabulary, seed])
    if not record.exists() or record.read_text() != settings_digest:
        unfinished = run_dir / ".model"
        shutil.rmtree(unfinished, ignore_errors=True)
        _build(config, vocabulary, seed, unfinished)
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
        record.write_text(settings_digest)
    return ModelFolder(folder)


def _build(config: FromScratchConfig, vocabulary: Sequence[str], seed: int, folder: Path) -> None:
    """Call `build_from_scratch`, and turn the three ways in which its libraries report a full disk into ConfigError."""
    try:
        build_from_scratch(config, vocabulary, seed, folder)
    except Exception as error:
        if type(error) is Exception or isinstance(error, OSError | SafetensorError):  # tokenizers raises the first
            raise ConfigError(
                f"run.dir: the model of model.from_scratch cannot be written to {folder}: {error}; free disk space, or "
                "choose another run.dir"
            ) from error
        raise


def build_from_scratch(config: FromScratchConfig, vocabulary: Sequence[str], seed: int, folder: Path) -> None:
    """Write a tiny Qwen2 and its tokenizer in Hugging Face format. The same arguments give the same bytes.

    Args:
        config: sizes of the model.
        vocabulary: strings that become single tokens.
        seed: seed of the initial weights.
        folder: created if missing.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(vocabulary, config.max_positions)
    tokenizer.save_pretrained(folder)
    build_qwen2(config, len(tokenizer), seed, tokenizer).save_pretrained(folder)


def build_qwen2(config: FromScratchConfig, vocab_size: int, seed: int, tokenizer: Any) -> Any:
    """Return a Qwen2 with seeded initial weights; the global random generator is unchanged."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    model_config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        initializer_range=config.hidden_size**-0.5,
        tie_word_embeddings=config.tie_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(model_config)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None
    )
    return model


def build_tokenizer(vocabulary: Sequence[str], max_positions: int) -> Any:
    """Return a byte-level tokenizer with the entries of the vocabulary as added tokens.

    The class is Qwen2Tokenizer, because AutoTokenizer of transformers uses it for every Qwen2 model, even if the
    folder names another class. Its pre-tokenizer does not split added tokens. The longest matching entry wins. A word
    matches only between non-letters: `in` is one token in `letters in x`, but not in `begin`. Text outside the
    vocabulary becomes bytes, so no text is lost.
    """
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    base = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={entry: number for number, entry in enumerate(base)},
        merges=[],
        unk_token=None,
        pad_token=PAD,
        eos_token=EOS,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_positions,
    )
    longer = [entry for entry in dict.fromkeys(vocabulary) if len(entry) > 1]
    tokenizer.add_tokens(
        [AddedToken(entry, normalized=False, special=False, single_word=_is_word(entry)) for entry in longer]
    )
    return tokenizer


def _is_word(entry: str) -> bool:
    return entry[0].isalnum() and entry[-1].isalnum()
