"""Critics of any causal language model: values of 0 at the start, and the same values after saving and loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_architectures import TOY_KINDS, toy_model
from torch import Tensor
from transformers import AutoModelForTokenClassification

from learners.deepspeed.critic import Critic, load_critic
from learners.deepspeed.model import load_model
from learners.deepspeed.tensor_files import read_tensors, write_tensors
from rlsys.errors import CheckpointError, ConfigError
from rlsys.models.tensors import persistent_buffers

IDS = torch.arange(16)[None]


def policy(kind: str, folder: Path) -> Path:
    toy_model(kind).save_pretrained(folder)
    return folder


def save(critic: Critic, folder: Path) -> Path:
    """Write the critic as a checkpoint does."""
    write_tensors([*critic.named_parameters(), *persistent_buffers(critic)], folder, "model", writes=True)
    return folder


def values(critic: Critic) -> Tensor:
    with torch.no_grad():
        return critic(input_ids=IDS)


def descend(critic: Critic, steps: int = 5) -> list[float]:
    """Fit the values to 1 by gradient descent, and return the losses."""
    losses = []
    for _ in range(steps):
        loss = (critic(input_ids=IDS) - 1).square().mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(critic.parameters(), gradients, strict=True):
                if gradient is not None:
                    parameter -= 0.01 * gradient
    return losses


@pytest.mark.parametrize("kind", TOY_KINDS)
def test_a_critic_starts_at_values_of_zero_learns_and_is_restored(kind: str, tmp_path: Path) -> None:
    folder = policy(kind, tmp_path / "policy")
    critic = load_critic(folder, "fp32", "cpu").train()
    assert torch.equal(values(critic), torch.zeros(1, 16))
    body = dict(load_model(folder, "fp32", "cpu").named_parameters())
    shared = {name: value for name, value in critic.named_parameters() if name in body}
    assert shared and all(torch.equal(value, body[name]) for name, value in shared.items())
    assert set(dict(critic.named_parameters())) - set(body) == {"score.weight", "score.bias"}
    losses = descend(critic)
    assert losses[0] == 1.0 and losses[-1] < losses[0]
    assert values(critic).abs().max() > 0
    restored = load_critic(folder, "fp32", "cpu", saved=save(critic, tmp_path / "critic")).train()
    assert torch.equal(values(restored), values(critic))


@pytest.mark.parametrize("kind", ["qwen2", "phi3"])
def test_values_and_names_are_those_of_a_token_classifier(kind: str, tmp_path: Path) -> None:
    # So checkpoints of earlier versions can be resumed, with the same bits.
    critic = load_critic(policy(kind, tmp_path / "policy"), "fp32", "cpu").train()
    descend(critic)
    critic.config.save_pretrained(save(critic, tmp_path / "critic"))
    classifier, loading_info = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "critic", output_loading_info=True
    )
    assert not any(loading_info.values())
    with torch.no_grad():
        assert torch.equal(classifier.eval()(input_ids=IDS, use_cache=False).logits[..., 0], values(critic))
    assert [name for name, _ in classifier.named_parameters()] == [name for name, _ in critic.named_parameters()]


def test_a_critic_has_the_data_type_of_the_learner_and_can_compute_activations_again(tmp_path: Path) -> None:
    folder = policy("olmo2", tmp_path)
    critic = load_critic(folder, "bf16", "cpu")
    assert {parameter.dtype for parameter in critic.parameters()} == {torch.bfloat16}
    plain, checkpointed = (load_critic(folder, "fp32", "cpu").train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert checkpointed.model.gradient_checkpointing
    assert descend(checkpointed) == descend(plain)


def test_a_critic_has_the_attention_of_its_policy(tmp_path: Path) -> None:
    critic = load_critic(policy("gemma2", tmp_path), "fp32", "cpu")
    assert critic.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("score.weight"), r"the critic lacks \['score\.weight'\]"),
        (lambda tensors: tensors.update(other=torch.ones(1)), r"tensor other \(1,\) has no place in the critic"),
        (
            lambda tensors: tensors.update({"score.weight": torch.ones(1, 3)}),
            r"tensor score\.weight \(1, 3\) has no place in the critic",
        ),
    ],
)
def test_a_saved_critic_with_other_tensors_is_refused(change, message: str, tmp_path: Path) -> None:
    folder = policy("qwen2", tmp_path / "policy")
    critic = save(load_critic(folder, "fp32", "cpu"), tmp_path / "critic")
    tensors = dict(read_tensors(critic, "model"))
    change(tensors)
    write_tensors(tensors.items(), critic, "model", writes=True)
    with pytest.raises(CheckpointError, match=message):
        load_critic(folder, "fp32", "cpu", saved=critic)


def test_a_model_without_a_body_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = policy("qwen2", tmp_path)
    monkeypatch.setattr("transformers.Qwen2ForCausalLM.base_model_prefix", "other")
    with pytest.raises(ConfigError, match="objective.value needs a model whose output layer can be replaced"):
        load_critic(folder, "fp32", "cpu")
