"""Tiny models made from scratch, and how text becomes token ids for any model.

torch and transformers are imported inside the functions, so that importing this module stays light.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlsys.config.schema import FromScratchConfig
from rlsys.errors import ConfigError

PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<user>", "<assistant>"
SPECIAL_TOKENS = (PAD, EOS, USER, ASSISTANT)

# A rotary base this low makes nearby positions easy to tell apart in short sequences: together with
# initial weights of about 1/sqrt(hidden_size), a tiny model learns to copy a word letter by letter in
# 300 steps; with the usual 10000 and 0.02 it copied a third of the words after the same training.
ROPE_BASE = 100.0

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}<eos>"
    "{% else %}<user>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_from_scratch(config: FromScratchConfig, vocabulary: Sequence[str], seed: int, folder: Path) -> None:
    """Write a tiny Qwen2 and its tokenizer in Hugging Face format. The same arguments give the same bytes.

    Args:
        config: sizes of the model.
        vocabulary: strings that become single tokens.
        seed: seed of the initial weights.
        folder: created where missing.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _build_tokenizer(vocabulary, config.max_positions)
    tokenizer.save_pretrained(folder)
    _build_qwen2(config, len(tokenizer), seed, tokenizer).save_pretrained(folder)


def _build_qwen2(config: FromScratchConfig, vocab_size: int, seed: int, tokenizer: Any) -> Any:
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


def _build_tokenizer(vocabulary: Sequence[str], max_positions: int) -> Any:
    """Bytes, and the entries of the vocabulary as added tokens.

    The class is Qwen2's own, because transformers' AutoTokenizer uses it for every Qwen2 model
    whatever the folder says, and its pre-tokenizer leaves added tokens alone. Longer entries win.
    A word is only matched where no other letter touches it: `in` is one token in `letters in x`,
    never inside `begin`. Text outside the vocabulary becomes bytes, so no text is lost.
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
    several = [entry for entry in dict.fromkeys(vocabulary) if len(entry) > 1]
    tokenizer.add_tokens(
        [AddedToken(entry, normalized=False, special=False, single_word=_is_word(entry)) for entry in several]
    )
    return tokenizer


def _is_word(entry: str) -> bool:
    return entry[0].isalnum() and entry[-1].isalnum()


def load_tokenizer(path: str | Path, field: str = "model.path") -> Any:
    """The tokenizer of a model folder or hub id.

    Args:
        field: the config field that names the model.
    Raises:
        ConfigError: there is none, or the folder asks for code of its own; names the field.
    """
    from transformers import AutoTokenizer

    refuse_code(Path(path), field)
    try:
        # Said, not left out: else transformers asks the terminal whether to run the code of a folder.
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"{field} {path}: expected a model with its tokenizer: {reason}") from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # A folder without tokenizer files gives an empty tokenizer of the model's class, not an error.
        raise ConfigError(f"{field} {path}: expected a model with its tokenizer, found no tokenizer files")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{field} {path}: the tokenizer has no end-of-sequence token")
    return tokenizer


def refuse_code(folder: Path, field: str) -> None:
    """Check that a model folder asks for nothing but data: no Python of its own, no weights that are pickles.

    Args:
        field: the config field that names the model.
    Raises:
        ConfigError: one of its configs has an `auto_map`, or its index names other files than its safetensors.
    """
    for path in sorted(folder.glob("*config*.json")):
        if _names_code(_json(path)):
            raise ConfigError(
                f"{field} {folder}: {path.name} names Python code of its own (auto_map), which is never run; take the "
                "key out where transformers has a class for this model, or choose another model"
            )
    for path in sorted(folder.glob("*.safetensors.index.json")):
        index = _json(path)
        files = index.get("weight_map") if isinstance(index, dict) else None
        for name in sorted(map(str, files.values())) if isinstance(files, dict) else ():
            if "/" in name or not name.endswith(".safetensors"):
                raise ConfigError(
                    f"{field} {folder}: {path.name} names {name!r}; expected *.safetensors in the same folder, other "
                    "weight formats are not read"
                )


def _json(path: Path) -> Any:
    """None where it is no JSON: whoever needs the file says so."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _names_code(values: Any) -> bool:
    """Whether there is an `auto_map` at any depth: composite models keep one in the config of a part."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.get("auto_map"):
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


def encode_prompt(tokenizer: Any, question: str) -> list[int]:
    """Token ids of a question as one user turn, ready for the answer; plain text without a chat template."""
    if not tokenizer.chat_template:
        return list(tokenizer(question)["input_ids"])
    messages = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def encode_demonstration(tokenizer: Any, question: str, chain: str) -> tuple[list[int], int]:
    """Token ids of prompt, chain and end token, and the length of the prompt, in tokens."""
    prompt = encode_prompt(tokenizer, question)
    completion = tokenizer(chain, add_special_tokens=False)["input_ids"]
    return [*prompt, *completion, end_token_id(tokenizer)], len(prompt)


def end_token_ids(tokenizer: Any, folder: Path) -> list[int]:
    """All tokens that end a completion: the tokenizer's, and those of the model's generation config.

    Chat models name the end of a turn in either place.
    """
    path = folder / "generation_config.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    several = found if isinstance(found, list) else [found]
    return list(dict.fromkeys([end_token_id(tokenizer), *(int(token) for token in several if token is not None)]))


def end_token_id(tokenizer: Any) -> int:
    """The token that ends a completion."""
    return int(tokenizer.eos_token_id)


def tensor_header(path: Path) -> dict[str, Any]:
    """Names, formats and shapes of the tensors in a safetensors file; nothing else of it is read.

    Raises:
        ConfigError: it is none, a Git LFS pointer or a download cut short, for example.
    """
    try:
        with path.open("rb") as file:  # 8 bytes of length, then JSON, then the tensors
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 2 <= length <= size - 8:
                raise ValueError("no header")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        if max((entry["data_offsets"][1] for entry in header.values()), default=0) != size - 8 - length:
            raise ValueError("cut short")
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"model.path: {path} is no whole safetensors file") from error
    return header


def tokenizer_digest(folder: str | Path) -> str:
    """sha256 of what decides the token ids of a text: tokenizer.json, chat template, eos and pad ids.

    Raises:
        ConfigError: the folder has no tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers written in Python have none
    parts = {
        "tokenizer": backend.to_str() if backend else sorted(tokenizer.get_vocab().items()),
        "chat_template": tokenizer.chat_template,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
