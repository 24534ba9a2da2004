"""Adapters on DeepSpeed ranks: an update is that of plain torch, and partitioning and resuming do not change it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_learner_ranks import (
    PLAIN,
    build_models,
    digests,
    figures,
    plain_job,
    plain_loss,
    plain_step,
    relative,
    resumed,
    run_ranks,
    whole,
)

from rlsys.config.schema import LoraConfig
from rlsys.models.adapters import AdapterSpec, adapter_spec
from rlsys.models.tensors import empty_model
from rlsys.run.metrics import METRICS

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
LORA: dict[str, Any] = {"rank": 4, "alpha": 6.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"zero{stage}": {"zero_stage": stage} for stage in (0, 2, 3)},
    "bf16-2": {"zero_stage": 2, "dtype": "bf16"},
    "checkpointing": {"zero_stage": 3, "gradient_checkpointing": True},
}
PLAIN_VARIANTS = ("one-large", "two-small", "two-sequence")  # test_learner_ranks.py has them all


def spec_of(folder: Path) -> AdapterSpec:
    return adapter_spec(empty_model(folder / "model"), LoraConfig(**LORA), folder / "model")


def build_adapter(folder: Path, name: str, seed: int) -> None:
    """Write an adapter whose factors are both random."""
    rng, spec = np.random.default_rng(seed), spec_of(folder)
    (folder / name).mkdir()
    tensors = {key: (rng.standard_normal(shape) * 0.05).astype(np.float32) for key, shape in spec.tensors.items()}
    save_file(tensors, folder / name / "adapter_model.safetensors")
    spec.save_pretrained(folder / name)


def adapted(job: dict[str, Any]) -> dict[str, Any]:
    return {**job, "lora": LORA}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    build_models(folder)
    for seed, name in enumerate(("start", "anchor")):
        build_adapter(folder, name, seed)
    one, two = [adapted(whole(folder, "one", zero_stage=0))], []
    for name, learner in VARIANTS.items():
        two.append(
            {**adapted(whole(folder, name, **learner)), "spoil": "policy", "spoiled": f"{folder}/{name}-spoiled"}
        )
        two.append(adapted(resumed(folder, name, name, **learner)))
    for name in PLAIN_VARIANTS:
        variant = PLAIN[name]
        job = {"policy": str(folder / "start"), **adapted(plain_job(folder, name, variant))}
        job["reference"] = str(folder / "anchor")
        (one if variant["ranks"] == 1 else two).append(job)
    # A stage that begins with an adapter, and whose reference is the base model without one.
    one.append(
        {**job, "learner": {"zero_stage": 0}, "reference": str(folder / "model"), "save": {"2": f"{folder}/base"}}
    )
    for stage, ranks in ((0, one), (3, two)):
        job = adapted(plain_job(folder, f"new{stage}", {"zero_stage": stage, "max_grad_norm": 1.0}))
        ranks.append({**job, "reference": str(folder / "model")})
    run_ranks(folder, {"two": (2, two)}, {"one": (1, one)})
    return folder


def factors(path: Path) -> np.ndarray:
    """Return all tensors of an adapter as one vector."""
    tensors = load_file(path / "adapter_model.safetensors")
    return np.concatenate([tensors[name].astype(np.float64).ravel() for name in sorted(tensors)])


def merged_model(folder: Path, tensors: dict[str, Any]) -> Any:
    """Return a function that calls the base model with `W + alpha / rank * B A` in place of W."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval().requires_grad_(False)
    weights = dict(model.named_parameters())
    changed = (
        {
            f"{layer}.weight": weights[f"{layer}.weight"]
            + LORA["alpha"]
            / LORA["rank"]
            * tensors[f"base_model.model.{layer}.lora_B.weight"]
            @ tensors[f"base_model.model.{layer}.lora_A.weight"]
            for layer in spec_of(folder).layers
        }
        if tensors
        else {}
    )
    return lambda ids: torch.func.functional_call(model, changed, (ids,))


@pytest.mark.parametrize("name", [*PLAIN_VARIANTS, "base"])
def test_an_update_is_that_of_plain_torch(folder: Path, name: str) -> None:
    from safetensors.torch import load_file as load_tensors

    limit = PLAIN.get(name, PLAIN[PLAIN_VARIANTS[-1]])["max_grad_norm"]
    start = load_tensors(folder / "start" / "adapter_model.safetensors")
    anchor = load_tensors(folder / "anchor" / "adapter_model.safetensors") if name != "base" else {}
    trained = {key: value.requires_grad_() for key, value in start.items()}
    plain_loss(merged_model(folder, trained), merged_model(folder, anchor)).backward()
    norm = plain_step(list(trained.values()), limit)
    assert figures(folder, name)["learner/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert figures(folder, name)["learner/kl"] > 1e-4
    before = factors(folder / "start")
    after = np.concatenate([trained[key].detach().double().numpy().ravel() for key in sorted(trained)])
    assert relative(factors(folder / name / "policy") - before, after - before) < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_equals_undisturbed_byte_for_byte(folder: Path, name: str) -> None:
    expected = digests(folder / f"{name}-whole")
    files = {"policy/adapter_model.safetensors", "policy/adapter_config.json", "learner/exp_avg.safetensors"}
    assert files <= set(expected)
    assert not any("policy/model" in file for file in expected)
    assert digests(folder / f"{name}-resumed") == expected
    assert digests(folder / f"{name}-spoiled") == expected
    assert figures(folder, f"{name}-whole").keys() <= set(METRICS)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "bf16-2"])
def test_every_way_to_save_memory_makes_the_same_update(folder: Path, name: str) -> None:
    start = factors(folder / "one-half" / "policy")
    change, expected = (factors(folder / f"{each}-whole" / "policy") - start for each in (name, "one"))
    assert relative(change, expected) < 1e-4


def test_the_optimizer_holds_the_adapter_alone(folder: Path) -> None:
    layers = spec_of(folder).layers
    expected = {f"{layer}.{factor}.weight" for layer in layers for factor in ("lora_A", "lora_B")}
    for name in VARIANTS:
        moments = load_file(folder / f"{name}-whole" / "learner" / "exp_avg.safetensors")
        assert set(moments) == expected
        assert all(np.abs(value).max() > 0 for value in moments.values())
    masters = load_file(folder / "bf16-2-whole" / "learner" / "master.safetensors")
    assert {value.dtype for value in masters.values()} == {np.dtype("float32")}
    assert set(masters) == expected


@pytest.mark.parametrize("name", ["new0", "new3"])
def test_a_new_adapter_and_the_reference_without_one_are_equal_at_first(folder: Path, name: str) -> None:
    # The KL term compares the base model with itself: the square of fp32 rounding in passes over other rows.
    assert figures(folder, name)["learner/kl"] < 1e-12
    assert figures(folder, name)["learner/grad_norm"] > 0
    saved = json.loads((folder / name / "policy" / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"], saved["target_modules"]) == (4, 6.0, sorted(LORA["target_modules"]))
