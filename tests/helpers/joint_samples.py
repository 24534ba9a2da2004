"""A tiny model, samples of every kind, and a whole update on plain torch, for tests of the joint loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from learners.objective.joint import joint_loss, total_loss, weigh_items
from learners.objective.logprobs import OtherTokens, token_logprobs
from learners.samples.batching import collate
from learners.samples.planning import plan_micro_batches
from learners.samples.policy import policy_samples
from learners.samples.types import PackItem, Pair, PolicyTokens, Sample, pair_samples
from rlsys.config.objective import ObjectiveConfig
from rlsys.types import Preference, Prompt, Step, Trajectory, TrajectoryGroup, VersionSpan

VOCABULARY = 11
MAX_TOKENS = 12
TEMPERATURE = 0.7
WEIGHTS = {"policy": 1.0, "kl": 0.3, "preference": 0.5, "sft": 0.7}
Plan = Sequence[Sequence[Sequence[int]]]


class TinyCausalModel(nn.Module):
    """Embedding, running mean over the past, output layer: causal, and every weight matters."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shape = (VOCABULARY, 6)
        self.embedding = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        self.output = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))

    def forward(self, input_ids: Tensor) -> Tensor:
        counts = torch.arange(1, input_ids.shape[1] + 1).unsqueeze(-1)
        hidden = self.embedding[input_ids].cumsum(dim=1) / counts
        return torch.tanh(hidden) @ self.output.T


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def flags(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.bool_)


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def policy_sample(tokens: Sequence[int], mask: Sequence[int], advantages: Sequence[float], **figures: Any) -> Sample:
    """Return a sample of the policy term; behavior log-probabilities are -2 by default."""
    figures.setdefault("behavior_logprobs", np.full(len(tokens), -2.0, dtype=np.float32))
    return Sample(
        token_ids=ids(*tokens), policy=PolicyTokens(mask=flags(*mask), advantages=floats(*advantages), **figures)
    )


def sft_sample(tokens: Sequence[int], mask: Sequence[int]) -> Sample:
    return Sample(token_ids=ids(*tokens), sft_mask=flags(*mask))


def random_policy_samples(count: int, seed: int = 5, *, reference: bool = True, old: bool = True) -> list[Sample]:
    """Return prompts of 1 to 4 tokens with completions of 1 to 12; above 3 one token inside is untrained."""
    rng, samples = np.random.default_rng(seed), []
    for _ in range(count):
        prompt, completion = int(rng.integers(1, 5)), int(rng.integers(1, 13))
        mask = np.arange(prompt + completion) >= prompt
        if completion > 3:
            mask[prompt + 2] = False
        figures = {
            name: np.where(mask, -rng.uniform(1, 4, mask.shape), 0).astype(np.float32)
            for name, wanted in (("behavior_logprobs", True), ("reference_logprobs", reference), ("old_logprobs", old))
            if wanted
        }
        tokens = rng.integers(0, VOCABULARY, len(mask)).tolist()
        samples.append(policy_sample(tokens, mask, rng.normal(size=len(mask)), **figures))
    return samples


def random_preferences(count: int, seed: int = 6) -> list[Preference]:
    """Return pairs whose sides share the prompt and a few more tokens."""
    rng, pairs = np.random.default_rng(seed), []
    for _ in range(count):
        prompt, shared = int(rng.integers(1, 4)), int(rng.integers(1, 5))
        common = rng.integers(0, VOCABULARY, prompt + shared)
        tails = [rng.integers(0, VOCABULARY, rng.integers(1, 7)) for _ in range(2)]
        tails[0][0], tails[1][0] = 3, 4
        chosen, rejected = (np.concatenate([common, tail]).astype(np.int32) for tail in tails)
        pairs.append(
            Preference(
                chosen_ids=chosen,
                rejected_ids=rejected,
                prompt_length=prompt,
                common=len(common),
                chosen_reference=float(-rng.uniform(5, 9)),
                rejected_reference=float(-rng.uniform(5, 9)),
            )
        )
    return pairs


def pair_item(
    pair: Preference, *, mask_prefix: bool = True, sft: bool = True, mask_prefix_sft: bool = False
) -> PackItem:
    assert pair.chosen_reference is not None and pair.rejected_reference is not None
    samples = pair_samples(pair, mask_prefix=mask_prefix, sft=sft, mask_prefix_sft=mask_prefix_sft)
    return PackItem(
        samples=samples, pair=Pair(reference=(pair.chosen_reference, pair.rejected_reference), smoothing=0.1)
    )


def mixed_items() -> list[PackItem]:
    """Return policy samples, one without targets, demonstrations, and pairs with a supervised chosen side."""
    policy = [*random_policy_samples(11), *searched_samples()]
    assert policy[0].policy is not None
    nothing = replace(policy[0].policy, mask=np.zeros_like(policy[0].policy.mask))
    demonstrations = [
        sft_sample(sample.token_ids.tolist(), sample.targets) for sample in random_policy_samples(4, seed=8)
    ]
    items = [PackItem(samples=(sample,)) for sample in (*policy, replace(policy[0], policy=nothing), *demonstrations)]
    return items + [pair_item(pair) for pair in random_preferences(5)]


def searched_samples() -> list[Sample]:
    """Return samples of a tree that share nodes, with old and reference log-probabilities."""
    tree = searched(([1, 2], "ok", 1.0), ([1, 3], "wrong", 0.0), ([4], "ok", 1.0), forced=[2], samples={1: 2})
    no_scorer: Any = None  # no scores are needed
    (samples,) = policy_samples([tree], ObjectiveConfig(), max_tokens=MAX_TOKENS, kl_weight=0.0, scorer=no_scorer)
    changed = []
    for sample in samples:
        assert sample.policy is not None
        known = sample.policy.behavior_logprobs - 2
        policy = replace(sample.policy, behavior_logprobs=known, old_logprobs=known, reference_logprobs=known - 0.5)
        changed.append(replace(sample, token_ids=sample.token_ids % VOCABULARY, policy=policy))
    return changed


def one_by_one(items: Sequence[PackItem]) -> Plan:
    return [[[number] for number in range(len(items))]]


def planned(items: Sequence[PackItem], ranks: int, budget: int) -> Plan:
    lengths, heights = [item.length for item in items], [len(item.samples) for item in items]
    return plan_micro_batches(lengths, ranks=ranks, budget_tokens=budget, sample_counts=heights)


def update(
    items: Sequence[PackItem],
    objective: ObjectiveConfig,
    *,
    weights: Mapping[str, float] = WEIGHTS,
    plan: Plan | None = None,
    pad_id: int = 0,
    weigh: bool = True,
) -> tuple[dict[str, float], Tensor]:
    """Compute the losses by term and as "total", and the gradient, summed over ranks and micro-batches in float64.

    weigh: False if the items have their weights already.
    """
    model = TinyCausalModel()
    items = weigh_items(items, objective.policy, MAX_TOKENS, objective.distill.on_policy_share)[0] if weigh else items
    losses: dict[str, float] = dict.fromkeys(("total", *weights), 0.0)
    for numbers in (numbers for share in plan or one_by_one(items) for numbers in share):
        batch = collate([items[number] for number in numbers], pad_id)
        logprobs, entropy, others, softened = target_logprobs(model, batch)
        terms = joint_loss(logprobs, entropy, batch, objective, others, softened=softened)
        terms = {name: term for name, term in terms.items() if name in weights}
        loss = total_loss(terms, weights, logprobs)
        loss.backward()
        losses["total"] += loss.item()
        for name, term in terms.items():
            losses[name] += term.loss.item()
    gradients = [parameter.grad for parameter in model.parameters()]
    return losses, torch.cat([torch.zeros(66) if gradient is None else gradient.flatten() for gradient in gradients])


def target_logprobs(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute log-probabilities as the learner does: the policy's targets at the sampling temperature."""
    logits = model(batch.input_ids).flatten(0, 1)[batch.targets]
    temperature = torch.ones(len(batch.targets), dtype=torch.float64)
    at = torch.zeros(len(batch.targets), dtype=torch.bool)
    if batch.policy is not None:
        temperature[batch.policy.positions] = TEMPERATURE
        at[batch.policy.positions] = True
    others = OtherTokens(batch.distill.positions, batch.distill.ids) if batch.distill else None
    soft = torch.zeros_like(at)
    if batch.sft is not None:
        soft[batch.sft.positions] = True
    gradient = {"entropy_at": at, "entropy_gradient": True}
    return token_logprobs(logits, batch.target_ids, temperature, others=others, softened_at=soft, **gradient)


# --- groups ---


def trajectory(tokens: Sequence[int], mask: Sequence[int], reward: float, **changes: Any) -> Trajectory:
    """Return a trajectory, judged by default, with behavior log-probabilities of -position / 10."""
    figures: dict[str, Any] = {"outcome": "ok" if reward > 0 else "wrong", "finish_reason": "stop", **changes}
    places = np.arange(len(tokens)) / 10
    return Trajectory(
        token_ids=ids(*tokens),
        loss_mask=flags(*mask),
        behavior_logprobs=np.where(flags(*mask), -places, 0).astype(np.float32),
        versions=(VersionSpan(start=1, version=0),),
        reward=reward,
        answered=True,
        **figures,
    )


def group(*trajectories: Trajectory, **others: Any) -> TrajectoryGroup:
    prompt = Prompt(prompt_id="p", token_ids=ids(1, 2), answer="")
    return TrajectoryGroup(prompt=prompt, trajectories=trajectories, **others)


def searched(
    *chains: tuple[Sequence[int], str, float], forced: Sequence[int] = (), samples: Mapping[int, int] | None = None
) -> TrajectoryGroup:
    """Return trajectories over nodes of two tokens, 10 n and 10 n + 1, after a prompt of two.

    forced: nodes whose first token the policy did not choose.
    """
    trajectories = []
    for nodes, outcome, reward in chains:
        tokens = [1, 2, *(token for node in nodes for token in (10 * node, 10 * node + 1))]
        mask = [False, False, *(flag for node in nodes for flag in (node not in forced, True))]
        steps = tuple(
            Step(
                node=node,
                parent=parent,
                start=2 + 2 * place,
                stop=4 + 2 * place,
                type="thinking",
                samples=(samples or {}).get(node, 1),
                visits=0,
                value=None,
            )
            for place, (parent, node) in enumerate(zip((0, *nodes), nodes, strict=False))
        )
        trajectories.append(trajectory(tokens, mask, reward, outcome=outcome, steps=steps))
    return group(*trajectories, searched=True)
