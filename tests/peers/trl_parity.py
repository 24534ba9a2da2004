"""Our losses and gradients equal those that TRL's own trainers compute, on a tiny random model and random batches.

Both sides get the same token ids and weights, and each pads and computes log-probabilities in its own way: TRL pads
prompts left and completions right and has a fused head; ours has rows that start at 0 and drops masked targets.
TRL 1.16.0 has no conservative DPO (its `sigmoid` ignores label smoothing);
tests/learners/objective/test_preferences.py compares it with its formula.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from learners.objective.joint import preference_term, token_weights
from learners.objective.logprobs import token_logprobs
from learners.objective.losses import LossOutput, cispo_loss, gspo_loss, kl_loss, policy_loss
from learners.objective.preferences import pair_scores
from learners.samples.batching import PairTargets
from rlsys.config.objective import PreferenceConfig
from rlsys.config.schema import FromScratchConfig
from rlsys.models.scratch import build_from_scratch

TOLERANCE = 1e-5  # both sides in fp32, with sums in another order
PAD, FIRST_WORD, WORDS = 0, 4, 64
MAX_TOKENS = 12
TEMPERATURE = 0.7
CLIP = {"clip_low": 0.2, "clip_high": 0.28}
KL_COEF = 0.04


@dataclass(frozen=True)
class Trl:
    """TRL, and what its trainers are built from."""

    library: Any
    folder: Path
    tokenizer: Any
    policy: torch.nn.Module
    reference: torch.nn.Module

    def common(self) -> dict[str, Any]:
        plain = {"bf16": False, "gradient_checkpointing": False, "report_to": []}
        return {"output_dir": str(self.folder / "out"), "use_cpu": True, **plain}


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trl]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("trl")
    config = FromScratchConfig(hidden_size=32, layers=2, heads=1, intermediate_size=64)
    words = [f"word{i}" for i in range(WORDS)]
    for seed, name in enumerate(("policy", "reference")):
        build_from_scratch(config, words, seed, folder / name)
    with patch.dict(os.environ):  # TRL sets some on import
        imports = importlib.import_module("trl.import_utils")
        # It would also load vLLM where that is installed: seconds, for nothing that a loss needs.
        with patch.object(imports, "is_vllm_available", lambda *_, **__: False):
            yield Trl(
                library=importlib.import_module("trl"),
                folder=folder,
                tokenizer=AutoTokenizer.from_pretrained(folder / "policy"),
                # in training mode, as TRL finds a model in its loop; there is no dropout
                policy=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32).train(),
                reference=AutoModelForCausalLM.from_pretrained(folder / "reference", dtype=torch.float32),
            )


def random_ids(generator: torch.Generator, low: int, high: int) -> list[int]:
    length = int(torch.randint(low, high + 1, (), generator=generator))
    return torch.randint(FIRST_WORD, FIRST_WORD + WORDS, (length,), generator=generator).tolist()


def our_logprobs(
    model: torch.nn.Module, rows: list[tuple[list[int], list[int]]], temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability of every completion token of (prompt, completion) rows, and its row."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(rows):
        ids[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        mask[row, len(prompt) : len(prompt) + len(completion)] = True
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    trained = mask[:, 1:]
    targets = ids[:, 1:][trained]
    logprobs, *_ = token_logprobs(logits[trained], targets, torch.full(targets.shape, temperature))
    return logprobs, trained.nonzero()[:, 0]


def assert_equal(ours: Tensor, our_model: torch.nn.Module, theirs: Tensor, their_model: torch.nn.Module) -> None:
    """Losses, and gradients of all parameters as one vector."""
    gradients = []
    for loss, model in ((ours, our_model), (theirs, their_model)):
        found = torch.autograd.grad(loss, [parameter for _, parameter in sorted(model.named_parameters())])
        gradients.append(torch.cat([part.flatten() for part in found]))
    assert ours.item() == pytest.approx(theirs.item(), rel=TOLERANCE)
    assert gradients[1].norm() > 1e-3
    assert (gradients[0] - gradients[1]).norm() < TOLERANCE * gradients[1].norm()


# --- preferences ---


@pytest.mark.parametrize(
    ("loss_type", "loss", "length_norm"),
    [("sigmoid", "dpo", False), ("sigmoid_norm", "dpo", True), ("ipo", "ipo", True)],
)
def test_preference_losses(trl, loss_type, loss, length_norm):
    from datasets import Dataset

    beta, generator = 0.3, torch.Generator().manual_seed(1)
    pairs = [
        {
            "prompt_ids": random_ids(generator, 2, 5),
            "chosen_ids": random_ids(generator, 1, 8),
            "rejected_ids": random_ids(generator, 1, 8),
        }
        for _ in range(6)
    ]
    text = {"prompt": "word0", "chosen": "word1", "rejected": "word2"}
    trainer = trl.library.DPOTrainer(
        model=copy.deepcopy(trl.policy),
        ref_model=copy.deepcopy(trl.reference),
        args=trl.library.DPOConfig(loss_type=loss_type, beta=beta, **trl.common()),
        train_dataset=Dataset.from_list([text]),
        processing_class=trl.tokenizer,
    )
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(pairs))

    # chosen, rejected, chosen, ...: as `learners.samples.batching.PairTargets` has them
    rows = [(pair["prompt_ids"], pair[side]) for pair in pairs for side in ("chosen_ids", "rejected_ids")]
    logprobs, segments = our_logprobs(trl.policy, rows, 1.0)
    with torch.no_grad():
        reference = pair_scores(our_logprobs(trl.reference, rows, 1.0)[0].double(), segments, len(rows))
    targets = PairTargets(
        positions=torch.arange(len(logprobs)),
        segments=segments,
        reference=reference,
        smoothing=torch.zeros(len(pairs), dtype=torch.float64),
        weights=torch.full((len(pairs),), 1 / len(pairs), dtype=torch.float64),
    )
    ours = preference_term(logprobs, targets, PreferenceConfig(loss=loss, beta=beta, length_norm=length_norm))
    assert_equal(ours.loss, trl.policy, theirs, trainer.model)
    if not length_norm:
        found = {name: value.item() / len(pairs) for name, value in ours.metrics.items()}
        [margin], [accuracy] = (trainer._metrics["train"][f"rewards/{name}"] for name in ("margins", "accuracies"))
        assert beta * found["margin"] == pytest.approx(margin, rel=TOLERANCE)
        assert found["accuracy"] == pytest.approx(accuracy, rel=TOLERANCE)


# --- policy gradient ---


@dataclass(frozen=True)
class Rollouts:
    """Random completions, with old and reference log-probabilities at both sides of the policy's."""

    rows: list[tuple[list[int], list[int]]]
    advantages: Tensor
    old: Tensor
    reference: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """As TRL's generation hands them to the loss: prompts padded left, completions right."""
        count = len(self.rows)
        prompts, completions = (max(len(row[side]) for row in self.rows) for side in (0, 1))
        found = {
            "prompt_ids": torch.full((count, prompts), PAD),
            "prompt_mask": torch.zeros(count, prompts, dtype=torch.int64),
            "completion_ids": torch.full((count, completions), PAD),
            "completion_mask": torch.zeros(count, completions, dtype=torch.int64),
        }
        for row, (prompt, completion) in enumerate(self.rows):
            found["prompt_ids"][row, prompts - len(prompt) :] = torch.tensor(prompt)
            found["prompt_mask"][row, prompts - len(prompt) :] = 1
            found["completion_ids"][row, : len(completion)] = torch.tensor(completion)
            found["completion_mask"][row, : len(completion)] = 1
        mask = found["completion_mask"].bool()
        for name, values in (("old_per_token_logps", self.old), ("ref_per_token_logps", self.reference)):
            found[name] = torch.zeros(mask.shape).masked_scatter(mask, values)
        return {**found, "advantages": self.advantages, "num_items_in_batch": mask.sum()}


@pytest.fixture(scope="module")
def rollouts(trl: Trl) -> Rollouts:
    generator = torch.Generator().manual_seed(2)
    rows = [(random_ids(generator, 2, 5), random_ids(generator, 1, MAX_TOKENS)) for _ in range(8)]
    with torch.no_grad():
        logprobs, _ = our_logprobs(trl.policy, rows, TEMPERATURE)
    old, reference = (logprobs - 0.4 * torch.randn(len(logprobs), generator=generator) for _ in range(2))
    return Rollouts(rows, torch.randn(len(rows), generator=generator), old, reference)


@dataclass(frozen=True)
class Form:
    """Settings of TRL's trainer, and the same thing of ours."""

    settings: dict[str, Any]
    aggregation: str
    loss: str = "policy"
    kl: bool = False


FORMS = {
    "grpo": Form({"loss_type": "grpo"}, "sequence_mean"),
    "bnpo": Form({"loss_type": "bnpo"}, "token_mean"),
    "dapo": Form({"loss_type": "dapo"}, "token_mean"),
    "dr_grpo": Form({"loss_type": "dr_grpo"}, "constant"),
    # by default TRL multiplies k3 by the ratio, which GRPO as published does not
    "grpo with k3": Form(
        {"loss_type": "grpo", "beta": KL_COEF, "use_bias_correction_kl": False}, "sequence_mean", kl=True
    ),
    "dual clip": Form({"loss_type": "dapo", "delta": 1.5}, "token_mean", "dual clip"),
    "gspo": Form({"loss_type": "grpo", "importance_sampling_level": "sequence"}, "sequence_mean", "gspo"),
    # TRL's only bound of CISPO is the ratio itself
    "cispo": Form({"loss_type": "cispo", "epsilon_high": 1.28}, "token_mean", "cispo"),
}


def our_policy_loss(form: Form, logprobs: Tensor, rows: Tensor, rollouts: Rollouts) -> LossOutput:
    lengths = [len(completion) for _, completion in rollouts.rows]
    row_weights = token_weights(lengths, aggregation=form.aggregation, max_tokens=MAX_TOKENS)
    weights = torch.from_numpy(row_weights).float()[rows]
    columns = (logprobs, rollouts.old, rollouts.advantages[rows], weights)
    match form.loss:
        case "gspo":
            return gspo_loss(*columns, rows, **CLIP)
        case "cispo":
            return cispo_loss(*columns, clip_low=1.0, clip_high=0.28)
        case "dual clip":
            return policy_loss(*columns, **CLIP, dual_clip=1.5)
    out = policy_loss(*columns, **CLIP)
    if not form.kl:
        return out
    divergence = kl_loss(logprobs, rollouts.reference, weights, estimator="k3")
    return LossOutput(out.loss + KL_COEF * divergence.loss, out.metrics | divergence.metrics)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_policy_losses(trl, rollouts, form):
    from datasets import Dataset

    bounds = {"epsilon": CLIP["clip_low"], "epsilon_high": CLIP["clip_high"], "beta": 0.0}
    sizes = {"num_generations": 2, "per_device_train_batch_size": 8, "max_completion_length": MAX_TOKENS}
    trainer = trl.library.GRPOTrainer(
        model=copy.deepcopy(trl.policy),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.library.GRPOConfig(temperature=TEMPERATURE, **(bounds | sizes | form.settings), **trl.common()),
        train_dataset=Dataset.from_list([{"prompt": "word0"}]),
        processing_class=trl.tokenizer,
    )
    trainer.current_gradient_accumulation_steps = 1  # the training loop sets it
    theirs = trainer.compute_loss(trainer.model, rollouts.inputs())

    logprobs, rows = our_logprobs(trl.policy, rollouts.rows, TEMPERATURE)
    ours = our_policy_loss(form, logprobs, rows, rollouts)
    assert_equal(ours.loss, trl.policy, theirs, trainer.model)

    reported = trainer._metrics["train"]
    if form.loss == "policy":
        for side in ("low", "high"):
            count = ours.metrics[f"clipped_{side}"].item()
            assert count > 0  # or the clip would not be compared
            assert count / len(rows) == pytest.approx(reported[f"clip_ratio/{side}_mean"][0], rel=TOLERANCE)
    if form.kl:
        assert ours.metrics["kl"].item() / len(rows) == pytest.approx(reported["kl"][0], rel=TOLERANCE)
    if form.loss == "dual clip":
        assert ours.metrics["dual_clipped"].item() > 0
    if form.loss == "gspo":
        assert ours.metrics["clipped_low"].item() + ours.metrics["clipped_high"].item() > 0
