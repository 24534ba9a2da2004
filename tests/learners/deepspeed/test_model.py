"""Models as the learner loads them: training mode without training noise."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    ApertusConfig,
    ApertusForCausalLM,
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from learners.deepspeed.engine import TrainedModel
from learners.deepspeed.model import load_model
from learners.deepspeed.tensor_files import read_tensors, write_tensors
from rlsys.errors import ConfigError
from rlsys.models.folder import ModelFolder
from rlsys.models.tensors import persistent_buffers
from rlsys.models.weight_shapes import check_weight_shapes

IDS = torch.arange(16)[None]


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=17,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_dropout=0.1,  # a number on the attention module
        )
    )


def gpt2() -> PreTrainedModel:
    # nn.Dropout modules
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=17,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            resid_pdrop=0.1,
            embd_pdrop=0.1,
            attn_pdrop=0.1,
        )
    )


def opt() -> PreTrainedModel:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=17,
            hidden_size=16,
            ffn_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            dropout=0.1,
            attention_dropout=0.1,
            layerdrop=0.5,  # leaves whole layers out
        )
    )


def logits(model: PreTrainedModel, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("build", [qwen2, gpt2, opt])
def test_training_mode_computes_what_evaluation_mode_does(build, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build().save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = logits(plain.eval(), 0)
    plain.train()
    assert not torch.equal(logits(plain, 0), logits(plain, 1))  # the noise that would be there
    model = load_model(tmp_path, "fp32", "cpu").train()
    assert model.training
    assert torch.equal(logits(model, 0), expected)
    assert torch.equal(logits(model, 1), expected)


def glm4_moe() -> PreTrainedModel:
    # The choice of experts has a bias that is a buffer, and no gradient reaches it.
    return Glm4MoeForCausalLM(
        Glm4MoeConfig(
            vocab_size=17,
            hidden_size=16,
            intermediate_size=16,
            moe_intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_shared_experts=1,
            first_k_dense_replace=1,
            head_dim=8,
        )
    )


def apertus() -> PreTrainedModel:
    # Its activation function has constants that are buffers.
    return ApertusForCausalLM(
        ApertusConfig(vocab_size=17, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    )


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model as a learner does: tensors by name, and the config."""
    learner = SimpleNamespace(adapted=False, module=model, gather=lambda parameter: parameter.detach())
    write_tensors(TrainedModel.named_weights(learner), folder, "model", writes=True)
    model.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("build", [glm4_moe, apertus])
def test_buffers_that_are_weights_are_saved(build, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build()
    buffers = dict(persistent_buffers(model))
    assert buffers
    with torch.no_grad():
        for buffer in buffers.values():
            buffer += torch.rand_like(buffer)
    again = load_model(saved(model, tmp_path), "fp32", "cpu")
    assert set(dict(persistent_buffers(again))) == set(buffers)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in persistent_buffers(again))
    assert torch.equal(logits(again.eval(), 0), logits(model.eval(), 0))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM), f"tensor {NORM} is missing;"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors)[:3]], "tensor .* is missing, and 2 more;"),
        (lambda tensors: tensors.update(other=torch.ones(1)), "config.json has no place for tensor other;"),
        (
            lambda tensors: tensors.update({NORM: torch.ones(3)}),
            rf"tensor {NORM} has shape \[3\], config.json makes it \[16\];",
        ),
        (
            lambda tensors: tensors.update(other=tensors.pop(NORM)),
            f"tensor {NORM} is missing, and 1 more;",
        ),
    ],
)
def test_a_folder_with_other_tensors_than_the_model_is_refused_by_name(change, message: str, tmp_path: Path) -> None:
    folder = saved(qwen2(), tmp_path)
    load_model(folder, "fp32", "cpu")
    tensors = dict(read_tensors(folder, "model"))
    change(tensors)
    write_tensors(tensors.items(), folder, "model", writes=True)
    with pytest.raises(ConfigError, match=message) as refused:
        load_model(folder, "fp32", "cpu")
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("make", "name", "fits"),
    [
        (qwen2, "model.layers.0.self_attn.rotary_emb.inv_freq", True),
        (glm4_moe, "model.layers.46.eh_proj.weight", True),  # a layer that predicts several tokens
        (qwen2, "model.layers.46.eh_proj.weight", False),
        (qwen2, "v_head.summary.weight", False),
        (qwen2, "model.layers.0.self_attn.q_proj.lora_A.weight", False),
    ],
)
def test_check_and_learner_accept_the_same_folders(
    make: Callable[[], PreTrainedModel], name: str, fits: bool, tmp_path: Path
) -> None:
    folder = saved(make(), tmp_path)
    tensors = [*read_tensors(folder, "model"), (name, torch.ones(1))]
    write_tensors(tensors, folder, "model", writes=True)
    if fits:
        notes = check_weight_shapes(ModelFolder(folder))
        assert re.search(rf"1 tensors are not loaded, .* the first: {re.escape(name)}; exported policies", notes[0])
        load_model(folder, "fp32", "cpu")
        return
    for load in (lambda: check_weight_shapes(ModelFolder(folder)), lambda: load_model(folder, "fp32", "cpu")):
        with pytest.raises(ConfigError, match=rf"config.json has no place for tensor {name}"):
            load()


def test_a_lost_buffer_is_refused_by_name(tmp_path: Path) -> None:
    folder = saved(glm4_moe(), tmp_path)
    tensors = {name: value for name, value in read_tensors(folder, "model") if "e_score" not in name}
    write_tensors(tensors.items(), folder, "model", writes=True)
    with pytest.raises(ConfigError, match=r"tensor model\.layers\.1\.mlp\.gate\.e_score_correction_bias is missing;"):
        load_model(folder, "fp32", "cpu")


def test_a_tied_output_layer_may_be_in_the_folder_or_not(tmp_path: Path) -> None:
    config = qwen2().config
    config.tie_word_embeddings = True
    model = Qwen2ForCausalLM(config).eval()
    folder = saved(model, tmp_path)
    tensors = dict(read_tensors(folder, "model"))
    assert "lm_head.weight" not in tensors
    assert torch.equal(logits(load_model(folder, "fp32", "cpu"), 0), logits(model, 0))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_tensors(tensors.items(), folder, "model", writes=True)
    assert torch.equal(logits(load_model(folder, "fp32", "cpu"), 0), logits(model, 0))
