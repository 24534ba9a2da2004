"""Adapters by numbers computed by hand, their files, and what they refuse."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config.schema import FromScratchConfig, LoraConfig
from rlsys.errors import ConfigError
from rlsys.models.adapters import (
    WITHOUT_ADAPTERS,
    AdapterSpec,
    adapter_spec,
    check_adapter,
    choose_layers,
    merge_adapter,
    read_adapter,
    tensor_name,
)
from rlsys.models.folder import ModelFolder, is_adapter, is_policy, weights_digest
from rlsys.models.scratch import UnbuiltModel, build_from_scratch
from rlsys.models.tensors import empty_model

pytestmark = pytest.mark.heavy
SIZE = FromScratchConfig(hidden_size=64, layers=2, heads=2, intermediate_size=128, max_positions=64)
VOCABULARY = ("<answer>", "</answer>")
LINEAR = {"model.layers.0.self_attn.q_proj": (4, 3), "model.layers.0.mlp.down_proj": (3, 5)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_from_scratch(SIZE, VOCABULARY, 0, folder)
    return folder


def chosen(*targets: str, **settings: Any) -> AdapterSpec:
    return choose_layers(LINEAR, ["model.embed_tokens"], LoraConfig(target_modules=targets, **settings), Path("base"))


def test_names_shapes_and_size_by_hand() -> None:
    spec = chosen("q_proj", rank=2, alpha=3.0)
    assert spec.tensors == {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (2, 3),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (4, 2),
    }
    assert spec.parameters == 2 * 3 + 4 * 2


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (("q_proj",), ["model.layers.0.self_attn.q_proj"]),
        (("mlp.down_proj",), ["model.layers.0.mlp.down_proj"]),
        (("q_proj", "down_proj"), list(LINEAR)),
    ],
)
def test_targets_are_ends_of_names_in_whole_parts(targets: tuple[str, ...], layers: list[str]) -> None:
    assert list(chosen(*targets).layers) == layers


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("proj", "model.lora.target_modules proj: expected linear layers of base below the output layer (down_proj, "),
        ("attn.q_proj", "found no layer of this name"),
        ("embed_tokens", "found model.embed_tokens, which cannot have an adapter"),
    ],
)
def test_a_target_that_the_model_lacks_is_named(target: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen("q_proj", target)
    assert message in caught.value.message and "\n" not in caught.value.message


def test_a_model_has_adapters_below_its_output_layer(model: Path) -> None:
    spec = check_adapter(ModelFolder(model), LoraConfig(merge=True))
    assert len(spec.layers) == 2 * 7 and not any("lm_head" in layer for layer in spec.layers)
    for name in ("lm_head", "embed_tokens", "mlp"):
        with pytest.raises(ConfigError, match="which cannot have an adapter"):
            check_adapter(ModelFolder(model), LoraConfig(target_modules=(name,)))
    # A model that is not built yet has the same layers.
    assert check_adapter(UnbuiltModel(SIZE, VOCABULARY, model), LoraConfig()).layers == spec.layers


def test_a_model_that_vllm_serves_without_adapters_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, StableLmConfig

    GPT2Config(n_layer=1).save_pretrained(tmp_path / "gpt2")
    StableLmConfig(num_hidden_layers=1).save_pretrained(tmp_path / "stablelm")
    for kind in ("gpt2", "stablelm"):
        with pytest.raises(ConfigError, match="^model.lora: vLLM serves .* without adapters; take it out$"):
            adapter_spec(empty_model(tmp_path / kind), LoraConfig(), tmp_path / kind)


@pytest.mark.long
def test_the_list_of_models_without_adapters_is_that_of_vllm() -> None:
    program = """
import json, sys
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.interfaces import supports_lora
found = {}
for name in json.loads(sys.argv[1]):
    found[name] = bool(supports_lora(ModelRegistry.models[name].load_model_cls()))
print(json.dumps(found))
"""
    names = [*sorted(WITHOUT_ADAPTERS), "Qwen2ForCausalLM", "LlamaForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM"]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(names)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    served = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, supported in served.items() if not supported} == WITHOUT_ADAPTERS


def write(spec: AdapterSpec, folder: Path, seed: int = 0) -> dict[str, np.ndarray]:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(seed)
    folder.mkdir()
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in spec.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    spec.save_pretrained(folder)
    return tensors


def test_a_merged_model_has_the_sum_of_the_weights(model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    lora = LoraConfig(rank=3, alpha=1.5, target_modules=("k_proj", "down_proj"))
    spec = adapter_spec(empty_model(model), lora, model)
    tensors = write(spec, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    merge_adapter(model, tmp_path / "adapter", lora, tmp_path / "merged", "fp32")
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {f"{layer}.weight" for layer in spec.layers}
    for name, value in before.items():
        expected = value
        if name in changed:
            a, b = (tensors[tensor_name(name.removesuffix(".weight"), factor)] for factor in ("lora_A", "lora_B"))
            expected = value + 0.5 * (b.astype(np.float64) @ a)  # alpha / rank
            assert np.abs(after[name] - value).max() > 0.1
        np.testing.assert_allclose(after[name], expected, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["model_type"] == "qwen2"
    assert is_policy(tmp_path / "merged") and not is_adapter(tmp_path / "merged")


def test_a_folder_tells_its_base_and_settings(model: Path, tmp_path: Path) -> None:
    lora = LoraConfig(rank=3, alpha=1.5, target_modules=("k_proj", "mlp.down_proj"))
    write(adapter_spec(empty_model(model), lora, model), tmp_path / "adapter")
    assert is_adapter(tmp_path / "adapter") and is_policy(tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter") == (model, lora)
    config = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ConfigError, match="gone is no folder of a model"):
        read_adapter(tmp_path / "adapter")
    config.write_text(json.dumps({**values, "r": 0}))
    with pytest.raises(ConfigError, match="expected a LoRA adapter as rlsys writes it"):
        read_adapter(tmp_path / "adapter")


def test_the_digest_depends_on_values_and_scale_not_on_the_place_of_the_base(model: Path, tmp_path: Path) -> None:
    lora = LoraConfig(rank=2, target_modules=("k_proj",))
    spec = adapter_spec(empty_model(model), lora, model)
    elsewhere = AdapterSpec(lora=lora, base=Path("/elsewhere"), layers=spec.layers)
    scaled = AdapterSpec(lora=LoraConfig(rank=2, alpha=1.0, target_modules=("k_proj",)), base=model, layers=spec.layers)
    for name, each, seed in (("a", spec, 0), ("b", elsewhere, 0), ("c", scaled, 0), ("d", spec, 1)):
        write(each, tmp_path / name, seed)
    first, second, *others = (weights_digest(tmp_path / name) for name in "abcd")
    assert first == second
    assert len({first, *others}) == 3


def test_a_layer_by_hand() -> None:
    import torch
    from torch import nn

    from learners.deepspeed.adapter import AdapterSwitch, LoraLinear

    layer = nn.Linear(2, 2).double()
    switch = AdapterSwitch()
    adapted = LoraLinear(layer, 1, 1.5, switch)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        layer.bias.copy_(torch.tensor([0.5, -0.5]))
        adapted.lora_A.weight.copy_(torch.tensor([[2.0, -1.0]]))
        adapted.lora_B.weight.copy_(torch.tensor([[1.0], [-3.0]]))
    x = torch.tensor([[1.0, 3.0]], dtype=torch.float64)
    # W x + b = [1 + 6 + 0.5, 3 + 12 - 0.5] = [7.5, 14.5]; A x = 2 - 3 = -1; 1.5 B A x = [-1.5, 4.5]
    output = adapted(x)
    assert output.tolist() == [[6.0, 19.0]]
    # d sum(y) / dB = 1.5 A x = -1.5 for each output; dA = 1.5 (1 - 3) x = -3 x
    output.sum().backward()
    assert adapted.lora_B.weight.grad.tolist() == [[-1.5], [-1.5]]
    assert adapted.lora_A.weight.grad.tolist() == [[-3.0, -9.0]]
    switch.reference = True
    assert adapted(x).tolist() == [[7.5, 14.5]]
    # The reference may have an adapter of its own: A x = 3, 1.5 B A x = [0, 9].
    adapted.set_reference(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [2.0]]))
    assert adapted(x).tolist() == [[7.5, 23.5]]
    switch.reference = False
    assert adapted(x).tolist() == [[6.0, 19.0]]


def test_a_new_adapter_is_seeded_and_has_the_spread_of_peft() -> None:
    from learners.deepspeed.adapter import new_factors

    spec = AdapterSpec(lora=LoraConfig(rank=64), base=Path("base"), layers={"q": (8, 400), "v": (8, 100)})
    tensors, again, other = new_factors(spec, 0), new_factors(spec, 0), new_factors(spec, 1)
    for layer, inputs in (("q", 400), ("v", 100)):
        a, b = (tensors[tensor_name(layer, factor)] for factor in ("lora_A", "lora_B"))
        assert not b.any()
        bound = 1 / math.sqrt(inputs)  # a uniform distribution of this bound has the deviation bound / sqrt(3)
        assert float(a.abs().max()) <= bound
        assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert all(value.equal(again[name]) for name, value in tensors.items())
    assert not any(value.equal(other[name]) for name, value in tensors.items() if "lora_A" in name)


PEERS = Path(sys.prefix) / "trl"  # `make install` puts requirements-trl.lock there
PEFT = """
import json, sys
from pathlib import Path
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
folder, model = Path(sys.argv[1]), Path(sys.argv[2])
ids = torch.arange(5, 45)[None]
base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
ours = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
logits = ours(ids).logits
logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).sum().backward()
gradients = {name.replace(".default", ""): p.grad.tolist() for name, p in ours.named_parameters() if p.requires_grad}
base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=["k_proj", "down_proj"], bias="none"))
theirs.save_pretrained(folder / "theirs")
spread = {n: p.abs().max().item() for n, p in theirs.named_parameters() if p.requires_grad and "lora_A" in n}
(folder / "peft.json").write_text(json.dumps({"logits": logits.tolist(), "gradients": gradients, "spread": spread}))
"""


def test_peft_reads_the_files_and_computes_the_same(model: Path, tmp_path: Path) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    from learners.deepspeed.adapter import add_adapter
    from learners.deepspeed.parameters import trained_parameters

    assert (PEERS / "peft").is_dir(), f"{PEERS} lacks peft: run make install"
    lora = LoraConfig(rank=4, alpha=6.0, target_modules=("k_proj", "down_proj"))
    write(adapter_spec(empty_model(model), lora, model), tmp_path / "adapter")
    path = os.pathsep.join(filter(None, [str(PEERS), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", PEFT, str(tmp_path), str(model)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    peft = json.loads((tmp_path / "peft.json").read_text())
    ours = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    add_adapter(ours, lora, tmp_path / "adapter", seed=0)
    ids = torch.arange(5, 45)[None]
    logits = ours(ids).logits
    torch.testing.assert_close(logits, torch.tensor(peft["logits"]), rtol=1e-5, atol=1e-5)
    logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).sum().backward()
    gradients = {f"base_model.model.{name}": parameter.grad for name, parameter in trained_parameters(ours)}
    assert gradients.keys() == peft["gradients"].keys()
    for name, gradient in gradients.items():
        expected = torch.tensor(peft["gradients"][name])
        assert float((gradient - expected).norm() / expected.norm()) < 1e-5, name
    # peft's own new adapter has the same names, shapes and bound.
    with safe_open(tmp_path / "theirs" / "adapter_model.safetensors", "pt") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    spec = adapter_spec(empty_model(model), lora, model)
    assert shapes == spec.tensors
    assert read_adapter(tmp_path / "theirs")[1].model_dump() == {
        **lora.model_dump(),
        "target_modules": tuple(
            json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["target_modules"]
        ),
    }
    for name, largest in peft["spread"].items():
        inputs = spec.layers[name.removeprefix("base_model.model.").partition(".lora_A")[0]][1]
        assert 0.8 / math.sqrt(inputs) < largest <= 1 / math.sqrt(inputs)
