"""The tables of `rlsys extract` train in TRL as they are, and exported adapters open in peft."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from tree_samples import answer, ids, node, tree

from rlsys.commands.extract import find_source, run
from rlsys.config.files import dump_config, parse_config
from rlsys.config.schema import LoraConfig
from rlsys.data.inputs import prepare_model
from rlsys.models.adapters import adapter_spec
from rlsys.models.export import write_adapter, write_merged
from rlsys.models.folder import ModelFolder
from rlsys.models.tensors import empty_model
from rlsys.search.tree_json import tree_line

QUESTIONS = [f"a in ab{'c' * number}a" for number in range(8)]


@pytest.fixture(scope="module")
def trl() -> Iterator[Any]:
    with patch.dict(os.environ):  # TRL sets some on import
        imports = importlib.import_module("trl.import_utils")
        # It would also load vLLM where that is installed: seconds, for nothing that these trainers need.
        with patch.object(imports, "is_vllm_available", lambda *_, **__: False):
            yield importlib.import_module("trl")


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of the tables of a few trees, and that of the policy."""
    folder = tmp_path_factory.mktemp("search")
    values: dict[str, Any] = {
        "run": {"dir": str(folder)},
        "model": {"from_scratch": {"hidden_size": 32, "layers": 1, "heads": 1, "intermediate_size": 16}},
        "task": {"type": "letter_count"},
        "search": {"prompts": len(QUESTIONS)},
        "extract": {"step_min_visits": 2, "max_backtracks": None},
    }
    config = parse_config(values, "test")
    (folder / "config.yaml").write_text(dump_config(config))
    model = prepare_model(config, folder)
    (folder / "trees").mkdir()
    (folder / "trees" / "00000.jsonl").write_text("")
    codec = find_source(folder, []).codec
    lines = []
    for question in QUESTIONS:
        below = [
            node(0, "<thinking>ab</thinking>"),
            node(0, "<thinking>abab</thinking>"),
            answer(1, "<answer>2</answer>", "ok", samples=2),
            answer(2, "<answer>2</answer>", "ok"),
            answer(2, "<answer>3</answer>", "wrong", samples=3),
        ]
        encoded = [
            replace(n, token_ids=(own := ids("", *codec.encode(n.text))), logprobs=np.zeros(len(own), np.float32))
            for n in below
        ]
        prompt = {"policy": ids("", *codec.prompt(question))}
        digests = {"policy": codec.digest}
        lines.append(
            tree_line(
                tree(*encoded, prompt_id=question, question=question, tokenizers=digests, prompt_token_ids=prompt)
            )
        )
    (folder / "trees" / "00000.jsonl").write_text("".join(f"{line}\n" for line in lines))
    run(find_source(folder, []), folder / "data")
    return folder / "data", model.path


def options(kind: Any, folder: Path) -> Any:
    """Return the settings of one training step on the CPU."""
    return kind(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to=[], save_strategy="no", logging_steps=1, max_length=None,
    )  # fmt: skip


def load(table: str, data: Path, cache: Path) -> Any:
    """Return a table as `datasets.load_dataset` reads the folder of all tables by its README."""
    from datasets import load_dataset

    return load_dataset(str(data), table, split="train", cache_dir=str(cache))


def trained(trainer: Any, model: Path) -> float:
    """Make the step, and return its loss. At least one weight must change."""
    from transformers import AutoModelForCausalLM

    trainer.train()
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    return float(trainer.state.log_history[0]["loss"])


def test_supervised_rows_train_in_trl(trl: Any, extracted: tuple[Path, Path], tmp_path: Path) -> None:
    data, model = extracted
    rows = load("supervised", data, tmp_path / "cache")
    assert len(rows) == len(QUESTIONS)
    trainer = trl.SFTTrainer(
        str(model), args=options(trl.SFTConfig, tmp_path / "out"), train_dataset=rows,
        processing_class=ModelFolder(model).tokenizer,
    )  # fmt: skip
    # TRL encodes the texts again, and appends the end token: the same tokens as those of the search.
    for row, encoded in zip(rows, trainer.train_dataset, strict=True):
        assert encoded["input_ids"] == row["token_ids"]
        assert [label != -100 for label in encoded["labels"]] == row["loss_mask"]
    assert 3 < trained(trainer, model) < 8  # an untrained model: about log of the vocabulary


def test_preference_pairs_train_in_trl(trl: Any, extracted: tuple[Path, Path], tmp_path: Path) -> None:
    data, model = extracted
    rows = load("preferences", data, tmp_path / "cache")
    assert len(rows) == len(QUESTIONS)
    trainer = trl.DPOTrainer(
        str(model), args=options(trl.DPOConfig, tmp_path / "out"), train_dataset=rows,
        processing_class=ModelFolder(model).tokenizer,
    )  # fmt: skip
    for row, encoded in zip(rows, trainer.train_dataset, strict=True):
        for side in ("chosen_ids", "rejected_ids"):
            assert encoded["prompt_ids"] + encoded[side] == row[side]
    assert trained(trainer, model) == pytest.approx(np.log(2), abs=1e-3)  # policy and reference are equal


def test_an_exported_adapter_has_the_logits_of_the_merged_export_in_peft(
    extracted: tuple[Path, Path], tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model, lora = extracted[1], LoraConfig(rank=2, alpha=6.0)
    spec = adapter_spec(empty_model(model), lora, model)
    for name in ("adapter", "merged", "alone"):
        (tmp_path / name).mkdir()
    generator = torch.Generator().manual_seed(0)
    factors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in spec.tensors.items()}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    spec.save_pretrained(tmp_path / "adapter")
    for path in ModelFolder(model).tokenizer_files:
        (tmp_path / "adapter" / path.name).write_bytes(path.read_bytes())
    write_merged(model, tmp_path / "adapter", lora, tmp_path / "merged", "fp32")
    write_adapter(tmp_path / "adapter", tmp_path / "alone", str(model), None)
    tokens = torch.arange(4, 40)[None]
    with torch.no_grad():
        base, merged = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
            for folder in (model, tmp_path / "merged")
        )
        adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "alone", dtype=torch.float32)(tokens).logits
    assert (adapted - base).abs().max() > 0.1
    assert (adapted - merged).abs().max() < 1e-4  # sums in another order
