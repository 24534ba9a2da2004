"""Models as the learner loads them: training mode without training noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from learners.deepspeed.model import load_critic, load_model

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


def test_a_critic_starts_at_values_of_zero_and_is_restored_from_its_own_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    qwen2().save_pretrained(tmp_path / "policy")
    torch.manual_seed(1)  # the library draws a head that the folder lacks
    critic = load_critic(tmp_path / "policy", "fp32", "cpu").train()
    values = logits(critic, 0)
    assert values.shape == (1, 16, 1)
    assert torch.equal(values, torch.zeros_like(values))
    policy = dict(load_model(tmp_path / "policy", "fp32", "cpu").named_parameters())
    body = {name: value for name, value in critic.named_parameters() if name in policy}
    assert body and all(torch.equal(value, policy[name]) for name, value in body.items())
    # A saved critic is restored with its head, and without dropout.
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter += 0.1
    critic.save_pretrained(tmp_path / "critic")
    restored = load_critic(tmp_path / "critic", "fp32", "cpu").train()
    assert logits(critic, 0).abs().max() > 0
    assert torch.equal(logits(restored, 0), logits(critic, 1))
    assert load_critic(tmp_path / "critic", "bf16", "cpu").dtype == torch.bfloat16
