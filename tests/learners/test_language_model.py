"""The learner's language model against plain torch: parts of the targets, shared rows, and models that cannot pack."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from joint_samples import mixed_items
from plain_rank import EVERY_TERM, NOTHING_SCORED, build, everything, plain_rank
from tiny_architectures import TOY_KINDS, toy_model
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2ForCausalLM

from learners.attention import can_pack, use_complete_attention
from learners.language_model import LanguageModel
from learners.objective.logprobs import OtherTokens
from learners.samples.batching import collate

pytestmark = pytest.mark.usefixtures("process_group")

CAPPED = Gemma2Config(
    vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0, layer_types=["full_attention"] * 2,
)  # fmt: skip


def gradients(model: LanguageModel, logprobs: Tensor, entropy: Tensor) -> Tensor:
    loss = (logprobs * torch.linspace(1, 2, len(logprobs))).sum() + (entropy * entropy).sum()
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def inputs(batch: Any) -> dict[str, Any]:
    at = torch.zeros(len(batch.targets), dtype=torch.bool)
    at[batch.policy.positions] = True
    return {
        "input_ids": batch.input_ids,
        "targets": batch.targets,
        "target_ids": batch.target_ids,
        "temperature": torch.linspace(0.5, 1.5, len(batch.targets), dtype=torch.float64),
        "entropy_at": at,
        "entropy_gradient": True,
        "depths": batch.depths,
        "attention": batch.attention,
    }


def tiny(kind: str) -> LanguageModel:
    torch.manual_seed(0)
    module = Gemma2ForCausalLM(CAPPED).double() if kind == "soft-capped" else build(Qwen2ForCausalLM, 0)
    use_complete_attention(module)
    return LanguageModel(module)


@pytest.mark.parametrize("kind", ["plain", "soft-capped"])
@pytest.mark.parametrize("parts", [1, 2, 7, 1000])
def test_values_and_gradients_are_those_of_the_whole_logits(kind: str, parts: int) -> None:
    model, batch = tiny(kind), collate(mixed_items(), 0)
    given = inputs(batch)
    logprobs, entropy, *_ = model(**given, parts=parts)
    logits = model.module(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[batch.targets]
    whole = torch.log_softmax(logits / given["temperature"].unsqueeze(-1), dim=-1)
    expected = whole.gather(-1, batch.target_ids.unsqueeze(-1)).squeeze(-1)
    expected_entropy = -(whole.exp() * whole).sum(dim=-1)[given["entropy_at"]]
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        gradients(model, logprobs, entropy), gradients(model, expected, expected_entropy), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["plain", "soft-capped"])
def test_shared_rows_have_the_values_and_gradients_of_rows_alone(kind: str) -> None:
    model, items = tiny(kind), mixed_items()
    alone, packed = collate(items, 0), collate(items, 0, [range(len(items) // 2), range(len(items) // 2, len(items))])
    assert packed.real_tokens < alone.real_tokens and packed.input_ids.shape[0] == 2
    results = [model(**inputs(batch)) for batch in (alone, packed)]
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
    # Norms and the softmax of soft-capped attention are in single precision.
    torch.testing.assert_close(*(gradients(model, *result[:2]) for result in results), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", [EVERY_TERM, NOTHING_SCORED], ids=["every term", "nothing scored"])
@pytest.mark.parametrize("updates", [1, 2])
def test_a_step_on_shared_rows_is_the_step_on_rows_alone(
    objective: dict[str, Any], updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learners.forward.CHUNK_LOGITS", 64 * 5)  # parts of 5 targets
    vectors, tokens = [], []
    for packs in (False, True):
        rank = plain_rank(objective, updates=updates, budget=400)
        if packs:
            rank.forward.describe(rank.policy.module)
            assert rank.forward._packs
            rank.forward._width = 1000  # long rows are cheap
        batch = everything()
        metrics = rank.train(dataclasses.replace(batch), 0, 1)
        vectors.append([model.vector() for model in (rank.policy, rank.critic) if model is not None])
        tokens.append(metrics["learner/tokens"])
    assert tokens[1] < tokens[0]
    for first, second in zip(*vectors, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


WINDOWS = {"gemma2", "gemma3_text", "mistral"}  # tokens see a window in some layers
STATES = {"mamba"}
NO_POSITIONS = {"bloom"}


@pytest.mark.parametrize("kind", TOY_KINDS)
def test_every_kind_of_model_runs_its_output_layer_apart_or_whole(kind: str) -> None:
    module = toy_model(kind)
    use_complete_attention(module)
    model = LanguageModel(module.eval())
    assert model._divides == (kind != "opt")  # its head calls a part of the body by name
    assert can_pack(module) == (kind not in WINDOWS | STATES | NO_POSITIONS)
    ids, places = torch.arange(12).reshape(2, 6), torch.tensor([1, 4, 8])
    arguments = {"target_ids": torch.tensor([3, 4, 5]), "temperature": torch.ones(3)}
    expected = module(input_ids=ids, use_cache=False).logits.flatten(0, 1)[places].log_softmax(-1)[range(3), [3, 4, 5]]
    for divides, parts in ((model._divides, 1), (model._divides, 2), (False, 2)):
        model._divides = divides
        logprobs, *_ = model(input_ids=ids, targets=places, parts=parts, **arguments)
        torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_changes_the_states_before_its_output_layer_computes_whole_logits() -> None:
    class Changed(Qwen2ForCausalLM):
        def forward(self, **inputs: Any) -> Any:
            output = super().forward(**inputs)
            output.logits = output.logits + output.logits.mean(1, keepdim=True)  # over positions
            return output

    model = LanguageModel(build(Changed, 0).eval())
    assert not model._divides
    ids = torch.arange(6)[None]
    arguments = {"target_ids": ids[0, 1:], "temperature": torch.ones(5)}
    logprobs, *_ = model(input_ids=ids, targets=torch.arange(5), parts=2, **arguments)
    whole = model.module(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    torch.testing.assert_close(logprobs, whole[range(5), ids[0, 1:]], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("window", "packs"), [(4, False), (None, True)])
def test_a_model_with_a_window_never_shares_rows(window: int | None, packs: bool) -> None:
    model = toy_model("mistral", sliding_window=window)
    use_complete_attention(model)
    assert can_pack(model) == packs


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_other_tokens_have_the_values_and_gradients_of_the_whole_logits_in_any_parts(parts: int) -> None:
    model, batch = tiny("plain"), collate(mixed_items(), 0)
    given, last = inputs(batch), len(batch.targets) - 1
    others = OtherTokens(torch.tensor([0, 2, last]), torch.tensor([[3, 1], [2, 5], [4, 4]]))
    found = model(**given, parts=parts, others=others)[2]
    logits = model.module(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[batch.targets]
    whole = torch.log_softmax(logits / given["temperature"].unsqueeze(-1), dim=-1)
    expected = whole[others.rows.unsqueeze(-1), others.ids]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    scales = torch.arange(6.0).view(3, 2).to(found)
    weights = [each for each in model.parameters() if each.requires_grad]
    pair = [torch.autograd.grad((each * scales).sum(), weights, allow_unused=True) for each in (found, expected)]
    for ours, theirs in zip(*pair, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
