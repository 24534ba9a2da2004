"""Exported model folders: number formats, end tokens, and adapters merged or alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_architectures import Architecture, build_architecture

from rlsys.config.schema import LoraConfig
from rlsys.errors import ConfigError
from rlsys.models.adapters import adapter_spec, tensor_name
from rlsys.models.export import hub_id, weight_format, write_adapter, write_merged, write_whole
from rlsys.models.folder import ModelFolder
from rlsys.models.tensors import empty_model
from rlsys.models.weight_files import INDEX, loaded_tensors

LORA = LoraConfig(rank=3, alpha=6.0, target_modules=("q_proj", "down_proj"))
KINDS = [
    Architecture(kind="llama", sharded=True, ends=2, padded_vocabulary=True),
    Architecture(kind="qwen2", tied=True, pads=False),
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda each: each.name)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_architecture(request.param, folder)
    return folder


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    """An adapter folder as a stage exports it: factors, settings and the files of the tokenizer."""
    from safetensors.numpy import save_file

    folder = tmp_path / "adapter"
    folder.mkdir()
    spec, rng = adapter_spec(empty_model(model), LORA, model), np.random.default_rng(0)
    save_file(
        {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in spec.tensors.items()},
        folder / "adapter_model.safetensors",
    )
    spec.save_pretrained(folder)
    for path in ModelFolder(model).tokenizer_files:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def logits(folder: Path, adapter: Path | None = None) -> Any:
    """Return the logits of a few tokens; with an adapter, `alpha / rank * B A x` is added to each adapted layer."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter:
        factors = load_file(adapter / "adapter_model.safetensors")

        def add(a: Any, b: Any, _module: Any, inputs: Any, output: Any) -> Any:
            return output + LORA.alpha / LORA.rank * (inputs[0] @ a.T @ b.T)

        for name, layer in module.named_modules():
            if (a := factors.get(tensor_name(name, "lora_A"))) is not None:
                layer.register_forward_hook(partial(add, a, factors[tensor_name(name, "lora_B")]))
    with torch.no_grad():
        return module(torch.arange(3, 40)[None]).logits


def test_a_merged_model_has_the_logits_of_base_and_adapter(model: Path, adapter: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    target.mkdir()
    write_merged(model, adapter, LORA, target, "fp32")
    expected = logits(model, adapter)
    assert (expected - logits(model)).abs().max() > 0.1  # the adapter changes something
    assert (expected - logits(target)).abs().max() < 1e-4  # sums in another order
    assert not list(target.glob("adapter*")) and len(ModelFolder(target).tokenizer) == len(ModelFolder(model).tokenizer)


def test_a_model_in_another_format_has_every_tensor_rounded(model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    target = tmp_path / "bf16"
    target.mkdir()
    write_whole(model, target, "bf16")
    for path in model.glob("*.safetensors"):
        rounded = load_file(target / path.name)
        for name, tensor in load_file(path).items():
            assert torch.equal(rounded[name], tensor.to(torch.bfloat16))
    assert weight_format(target) == "bf16" and weight_format(model) == "fp32"
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    if (target / INDEX).exists():
        [before, after] = [json.loads((folder / INDEX).read_text()) for folder in (model, target)]
        assert after["weight_map"] == before["weight_map"]
        assert after["metadata"]["total_size"] == before["metadata"]["total_size"] // 2
    assert loaded_tensors(target).keys() == loaded_tensors(model).keys()


def test_without_another_format_every_file_is_a_copy(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    target.mkdir()
    write_whole(model, target, None)
    for path in model.iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes()
        assert (target / path.name).stat().st_nlink == 1  # a link could change the run


def test_end_tokens_of_the_training_are_named(tmp_path: Path) -> None:
    build_architecture(KINDS[0], tmp_path / "model")
    config = tmp_path / "model" / "generation_config.json"
    ends = ModelFolder(tmp_path / "model").end_token_ids
    for named, expected in ((None, ends[0]), ([ends[1]], ends)):  # without the tokenizer's own, which ends training's
        values = {} if named is None else {"eos_token_id": named, "temperature": 0.5}
        config.write_text(json.dumps(values)) if values else config.unlink()
        target = tmp_path / f"to {named}"
        target.mkdir()
        write_whole(tmp_path / "model", target, None)
        written = json.loads((target / "generation_config.json").read_text())
        assert written["eos_token_id"] == expected and written.get("temperature") == values.get("temperature")


def test_penalties_are_left_out_because_greedy_answers_of_rlsys_have_none(
    adapter: Path, model: Path, tmp_path: Path
) -> None:
    config = adapter / "generation_config.json"
    before = json.loads(config.read_text())
    config.write_text(json.dumps({**before, "repetition_penalty": 1.05, "temperature": 0.7}))
    for name, write in (
        ("alone", lambda target: write_adapter(adapter, target, "org/base", None)),
        ("merged", lambda target: write_merged(model, adapter, LORA, target, "fp32")),
    ):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
        assert json.loads((tmp_path / name / config.name).read_text()) == {**before, "temperature": 0.7}


def test_an_adapter_alone_names_its_base(adapter: Path, tmp_path: Path) -> None:
    target = tmp_path / "alone"
    target.mkdir()
    write_adapter(adapter, target, "org/base", "bf16")
    before, after = (json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, target))
    assert after == {**before, "base_model_name_or_path": "org/base"}
    assert weight_format(target) == "bf16"


def test_an_adapter_of_another_model_is_not_merged(adapter: Path, tmp_path: Path) -> None:
    build_architecture(Architecture(kind="llama", changes={"num_hidden_layers": 1}), tmp_path / "small")
    with pytest.raises(ConfigError, match=r"expected 4 layers of the adapter .* found 2: .*; use --adapter$"):
        write_merged(tmp_path / "small", adapter, LORA, tmp_path, "fp32")


def test_only_a_model_of_the_cache_of_the_hub_has_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    cached = tmp_path / "config.json"
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda name, _file: str(cached) if name == "org/base" else None
    )
    assert hub_id("org/base") == "org/base"
    assert hub_id("runs/model") is None and hub_id(str(tmp_path)) is None
