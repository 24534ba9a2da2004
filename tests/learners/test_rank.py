"""A whole training step on one rank, with plain torch in place of DeepSpeed."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from joint_samples import group, ids, policy_sample, random_preferences, searched, sft_sample, trajectory
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForTokenClassification

from learners import rank as learner_rank
from learners.deepspeed.engine import TrainedModel
from learners.objective import logprobs
from learners.objective.schedule import learning_rate
from learners.rank import LearnerRank
from learners.samples.batching import collate
from learners.samples.types import PackItem
from learners.settings import RankSettings
from rlsys.config.files import parse_config
from rlsys.config.objective import ObjectiveConfig
from rlsys.config.schema import LearnerConfig, OptimizerConfig
from rlsys.config.stages import TERMS, StageSettings, stage_plan
from rlsys.errors import LearnerLostError, NonFiniteLossError
from rlsys.run.metrics import METRICS
from rlsys.transfer.object_store import ObjectStoreSender
from rlsys.types import Demonstration, Preference, StageName, StepPreference, TrainingBatch, TrajectoryGroup

pytestmark = pytest.mark.usefixtures("process_group")

TEMPERATURE = 0.8
RATE = 0.5
ENTROPY_COEF = 0.5
BAND = 1e-3  # far less than a value moves in an update
SIZE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


class PlainModel:
    """What `TrainedModel` does, by gradient descent in double precision."""

    last_layer = TrainedModel.last_layer

    def __init__(self, module: nn.Module, settings: RankSettings) -> None:
        self.module, self.settings, self.updates = module, settings, 0
        self.name = type(module).__name__

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def backward(self, loss: Tensor, what: str, at: Mapping[str, int]) -> None:
        assert math.isfinite(loss.item()), what
        loss.backward()

    def take_snapshot(self) -> None:
        self.snapshot = copy.deepcopy(self.module.state_dict()), self.updates

    def roll_back(self) -> None:
        state, self.updates = self.snapshot
        self.module.load_state_dict(state)

    def discard_gradients(self) -> None:
        self.module.zero_grad()

    def check_finite(self) -> None:
        """Nothing to agree on: there is one rank, and `backward` has looked."""

    def update(self) -> tuple[float, float]:
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), math.inf))
        with torch.no_grad():
            for parameter in self.module.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
                parameter.grad = None
        self.updates += 1
        return norm, RATE

    def vector(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.module.parameters()])


def build(kind: Any, seed: int, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return kind(Qwen2Config(**SIZE, **changes)).double()


def learner(
    objective: Mapping[str, Any], *, stage: StageName = "online", updates: int = 1, budget: int = 64, steps: int = 11
) -> LearnerRank:
    settings = RankSettings(
        rank=0,
        ranks=1,
        device="cpu",
        store="",
        seed=0,
        pad_token_id=0,
        temperature=TEMPERATURE,
        max_tokens=10,
        learner=LearnerConfig(ranks=1, micro_batch_tokens=budget),
        objective=ObjectiveConfig(**objective),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner_rank, "join_process_group", lambda settings: None)
        found = LearnerRank(settings)
    optimizer = OptimizerConfig()
    found.stage = StageSettings(stage=stage, steps=steps, updates_per_step=updates, optimizer=optimizer)
    found.policy = PlainModel(build(Qwen2ForCausalLM, 0), settings)
    if settings.objective.value.used:
        critic = build(Qwen2ForTokenClassification, 1, num_labels=1, classifier_dropout=0.0, hidden_dropout=0.0)
        found.critic = PlainModel(critic.eval(), settings)
    found.reference = build(Qwen2ForCausalLM, 2)
    return found


def sampled(count: int, seed: int = 0) -> list[TrajectoryGroup]:
    rng = np.random.default_rng(seed)
    return [
        group(
            *(
                trajectory([1, 2, *rng.integers(3, 60, length)], [0, 0, *[1] * length], float(n % 2))
                for n, length in enumerate(rng.integers(1, 9, 4))
            )
        )
        for _ in range(count)
    ]


def tree() -> TrajectoryGroup:
    pairs = tuple(replace(pair, chosen_reference=None, rejected_reference=None) for pair in random_preferences(2))
    found = searched(([1, 2], "ok", 1.0), ([1, 3], "wrong", 0.0), ([4], "ok", 1.0), forced=[2], samples={1: 2})
    return replace(found, pairs=pairs, demonstrations=(chain([1, 2, 7, 8], 2),))


def chain(tokens: Sequence[int], start: int) -> Demonstration:
    return Demonstration(token_ids=ids(*tokens), loss_mask=np.arange(len(tokens)) >= start)


def everything() -> TrainingBatch:
    return TrainingBatch(
        groups=(*sampled(3), tree(), tree()),
        pairs=tuple(random_preferences(3)),
        demonstrations=(chain([5, 6, 7], 1), chain([5, 6, 7, 8, 9], 2)),
    )


EVERY_TERM: dict[str, Any] = {
    "policy": {"estimator": "gae", "entropy_coef": 0.01, "dual_clip": 3.0},
    "kl": {"weight": 0.1},
    "value": {"weight": 0.5},
    "preference": {"weight": 0.3, "label_smoothing": 0.1},
    "sft": {"weight": 0.7, "source": "trees"},
    "grad_norm_interval": 1,
}


def test_everything_that_is_logged_is_registered_and_finite() -> None:
    found = learner(EVERY_TERM, updates=2).train(everything(), 0, 1)
    assert set(found) <= set(METRICS)
    assert all(math.isfinite(value) for value in found.values())
    for term in TERMS:
        figures = ["loss", "weight", "denominator", "share", "grad_norm"] + ["grad_share"] * (term != "value")
        assert {f"objective/{term}_{figure}" for figure in figures} <= set(found)
    assert sum(found[f"objective/{term}_share"] for term in TERMS) == pytest.approx(1, rel=1e-12)
    assert found["objective/value_weight"] == 0.5
    assert found["learner/updates"] == 2
    assert found["learner/empty_terms"] == 0
    assert found["learner/ratio_max"] > 1  # the second update no longer starts from the old policy


# One update without reference policy or critic needs no scoring pass, which stores what it finds in fp32.
NOTHING_SCORED: dict[str, Any] = {
    "policy": {"estimator": "dr_grpo", "entropy_coef": 0.01},
    "preference": {"weight": 0.3, "source": "file"},
    "sft": {"weight": 0.7, "source": "demonstrations"},
    "grad_norm_interval": 1,
}


@pytest.mark.parametrize(("objective", "updates", "rtol"), [(EVERY_TERM, 2, 1e-6), (NOTHING_SCORED, 1, 1e-12)])
def test_micro_batches_change_nothing_but_the_padding(objective: dict[str, Any], updates: int, rtol: float) -> None:
    def run(budget: int) -> tuple[dict[str, float], list[Tensor]]:
        made = learner(objective, updates=updates, budget=budget)
        found = made.train(everything(), 0, 1)
        return found, [model.vector() for model in (made.policy, made.critic) if model is not None]

    expected, vectors = run(9999)
    found, found_vectors = run(16)
    assert found.pop("learner/padding_share") < expected.pop("learner/padding_share")
    assert found == pytest.approx(expected, rel=1e-6)  # norms of terms, and values, are summed in fp32
    for ours, theirs in zip(found_vectors, vectors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol / 1000)


def distribution(module: nn.Module, tokens: Sequence[int], temperature: float = 1.0) -> Tensor:
    """[T - 1, V] log-probabilities of what may follow each token but the last."""
    return (module(torch.tensor([list(map(int, tokens))])).logits[0, :-1] / temperature).log_softmax(-1)


def logprob(module: nn.Module, tokens: Sequence[int], start: int, temperature: float = 1.0) -> Tensor:
    """Of the tokens from `start` on, one by one."""
    following = torch.tensor(list(map(int, tokens[1:])))
    return distribution(module, tokens, temperature).gather(-1, following[:, None])[start - 1 :, 0]


def last_layer_norm(module: Any, loss: Tensor) -> float:
    gradients = torch.autograd.grad(loss, list(module.model.layers[-1].parameters()), retain_graph=True)
    return math.sqrt(sum(float(found.square().sum()) for found in gradients))


def test_gradient_norms_of_terms_are_those_of_plain_torch() -> None:
    groups, pairs = sampled(2), random_preferences(3)
    rows = [chain([5, 6, 7], 1), chain([5, 6, 7, 8, 9], 2)]
    objective = {
        "policy": {"estimator": "dr_grpo", "importance_cap": None, "entropy_coef": ENTROPY_COEF},
        "kl": {"weight": 0.25, "estimator": "k2"},
        "preference": {"weight": 0.5, "source": "file", "beta": 0.3},
        "sft": {"weight": 2.0, "source": "demonstrations"},
        "grad_norm_interval": 1,
    }
    made = learner(objective, budget=24)  # several micro-batches
    module, reference = copy.deepcopy(made.policy.module), made.reference
    found = made.train(TrainingBatch(groups=tuple(groups), pairs=tuple(pairs), demonstrations=tuple(rows)), 0, 1)

    policy, kl, tokens = torch.zeros(()), torch.zeros(()), 0
    for row in (row for part in groups for row in part.trajectories):
        own = logprob(module, row.token_ids, 2, TEMPERATURE)
        other = logprob(reference, row.token_ids, 2, TEMPERATURE).detach()
        policy = policy - (row.reward - 0.5) * (own - own.detach()).exp().sum()
        likely = distribution(module, row.token_ids, TEMPERATURE)[1:]
        policy = policy + ENTROPY_COEF * (likely.exp() * likely).sum()
        kl = kl + (own - other).square().sum() / 2
        tokens += len(own)
    preference = torch.zeros(())
    for pair in pairs:
        chosen = logprob(module, pair.chosen_ids, pair.common).sum() - pair.chosen_reference
        rejected = logprob(module, pair.rejected_ids, pair.common).sum() - pair.rejected_reference
        preference = preference - nn.functional.logsigmoid(0.3 * (chosen - rejected)) / 3
    sft = -torch.cat([logprob(module, rows[0].token_ids, 1), logprob(module, rows[1].token_ids, 2)]).mean()

    losses = {"policy": policy / tokens, "kl": 0.25 * kl / tokens, "preference": 0.5 * preference, "sft": 2 * sft}
    norms = {term: last_layer_norm(module, loss) for term, loss in losses.items()}
    for term, norm in norms.items():
        assert found[f"objective/{term}_grad_norm"] == pytest.approx(norm, rel=1e-5), term
        assert found[f"objective/{term}_grad_share"] == pytest.approx(norm / sum(norms.values()), rel=1e-5)
    assert found["objective/kl_loss"] == pytest.approx(losses["kl"].item() / 0.25, rel=1e-5)
    # And the whole: one step of gradient descent on the sum.
    gradient = torch.autograd.grad(sum(losses.values()), list(module.parameters()))
    norm = math.sqrt(sum(float(found.square().sum()) for found in gradient))
    assert found["learner/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert found["learner/loss"] == pytest.approx(sum(loss.item() for loss in losses.values()), rel=1e-5)
    expected = torch.cat([(p - RATE * g).flatten() for p, g in zip(module.parameters(), gradient, strict=True)])
    torch.testing.assert_close(made.policy.vector(), expected, rtol=1e-5, atol=1e-7)


def test_kl_in_the_reward_is_that_of_plain_torch() -> None:
    objective = {
        "policy": {"estimator": "dr_grpo", "importance_cap": None},
        "kl": {"weight": 0.5, "in_reward": True, "estimator": "k1"},
    }
    groups = sampled(2)
    made = learner(objective)
    module, reference = copy.deepcopy(made.policy.module), made.reference
    found = made.train(TrainingBatch(groups=tuple(groups)), 0, 1)
    # Every reward less 0.5 times the summed log-ratios of its tokens, then less the mean of its group.
    loss, tokens = torch.zeros(()), 0
    for part in groups:
        own = [logprob(module, row.token_ids, 2, TEMPERATURE) for row in part.trajectories]
        other = [logprob(reference, row.token_ids, 2, TEMPERATURE) for row in part.trajectories]
        gaps = torch.stack([(a - b).sum().detach() for a, b in zip(own, other, strict=True)])
        rewards = torch.tensor([row.reward for row in part.trajectories]) - 0.5 * gaps
        for advantage, mine in zip(rewards - rewards.mean(), own, strict=True):
            loss = loss - advantage * mine.sum()
            tokens += len(mine)
    gradient = torch.autograd.grad(loss / tokens, list(module.parameters()))
    expected = torch.cat([(p - RATE * g).flatten() for p, g in zip(module.parameters(), gradient, strict=True)])
    torch.testing.assert_close(made.policy.vector(), expected, rtol=1e-5, atol=1e-7)
    norm = math.sqrt(sum(float(part.square().sum()) for part in gradient))
    assert found["learner/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert "objective/kl_loss" not in found


def test_measuring_the_gradient_norms_changes_nothing() -> None:
    vectors = []
    for interval in (0, 1):
        made = learner({**EVERY_TERM, "grad_norm_interval": interval}, updates=2)
        found = made.train(everything(), 0, 1)
        assert ("objective/sft_grad_norm" in found) == bool(interval)
        vectors.append(made.policy.vector())
    assert torch.equal(*vectors)
    assert "objective/sft_grad_norm" not in learner({**EVERY_TERM, "grad_norm_interval": 2}).train(everything(), 1, 2)


@pytest.mark.parametrize(
    ("batch", "stage", "terms"),
    [
        (TrainingBatch(demonstrations=(chain([5, 6, 7], 1),)), "sft", {"sft"}),
        (TrainingBatch(demonstrations=(chain([5, 6, 7], 1),)), "warm_start", {"sft"}),
        (TrainingBatch(pairs=tuple(random_preferences(3))), "preference", {"preference", "sft"}),
        (TrainingBatch(groups=tuple(sampled(2))), "online", {"policy", "kl"}),
        (TrainingBatch(groups=(tree(), tree())), "online", {"policy", "kl", "preference", "sft"}),
        (TrainingBatch(), "online", set()),
    ],
)
def test_a_step_of_one_kind_alone(batch: TrainingBatch, stage: StageName, terms: set[str]) -> None:
    # Terms that nothing is there for add nothing, and their count says so.
    made = learner({**EVERY_TERM, "policy": {}, "value": {}}, stage=stage)
    before = made.policy.vector()
    found = made.train(batch, 0, 1)
    assert torch.equal(made.policy.vector(), before) == (not terms)
    for term in ("policy", "kl", "preference", "sft"):
        assert bool(found.get(f"objective/{term}_denominator", 0)) == (term in terms)
        assert bool(found.get(f"objective/{term}_loss", 0)) == (term in terms)
    empty = {"online": 4, "preference": 2}.get(stage, 1) - len(terms)
    assert (found["learner/empty_terms"], found["learner/updates"]) == (empty, float(bool(terms)))


def test_more_updates_than_groups() -> None:
    made = learner({"policy": {"estimator": "dr_grpo"}}, updates=4)
    found = made.train(TrainingBatch(groups=tuple(sampled(2))), 0, 1)
    assert (found["learner/updates"], made.policy.updates) == (2.0, 2)
    tokens = sum(int(row.loss_mask.sum()) for part in sampled(2) for row in part.trajectories)
    assert found["objective/policy_denominator"] == tokens / 4  # the mean over the updates, empty ones too
    assert found["learner/empty_terms"] == 0.5


def test_an_update_in_which_nothing_can_be_trained_is_none() -> None:
    # A tree that another model has grown.
    foreign = group(trajectory([1, 2, 9], [0, 0, 0], 1.0), trajectory([1, 2, 8], [0, 0, 0], 0.0))
    for objective in ({}, {"policy": {"estimator": "gae"}, "value": {"weight": 1.0}, "kl": {"weight": 0.1}}):
        made = learner(objective, updates=1)
        before = made.policy.vector()
        found = made.train(TrainingBatch(groups=(foreign, foreign)), 0, 1)
        assert (found["learner/updates"], made.policy.updates) == (0, 0)
        assert torch.equal(made.policy.vector(), before)


def test_a_term_that_fades_out_or_in_is_no_stumbling_block() -> None:
    for kl in ({"weight": 0.1, "final_weight": 0.0}, {"weight": 0.0, "final_weight": 0.1}):
        made = learner({"kl": kl}, steps=3)
        weights = []
        for step in range(3):
            found = made.train(TrainingBatch(groups=tuple(sampled(2))), step, step + 1)
            weights.append(found.get("objective/kl_weight", 0.0))
            assert ("learner/kl" in found) == bool(weights[-1])
        assert sorted(weights) == [0.0, 0.05, 0.1]


# --- critic ---


def test_the_critic_learns_from_sampled_groups_alone() -> None:
    groups = sampled(3)
    tokens = sum(int(row.loss_mask.sum()) for part in groups for row in part.trajectories)
    objective = {"policy": {"estimator": "gae"}, "value": {"weight": 0.5}}
    alone, beside = learner(objective), learner(objective)
    expected = alone.train(TrainingBatch(groups=tuple(groups)), 0, 1)
    found = beside.train(TrainingBatch(groups=(*groups, tree())), 0, 1)
    assert found["objective/value_denominator"] == tokens
    assert found["objective/policy_denominator"] > tokens
    for name in ("objective/value_loss", "objective/value_grad_norm", "value/mean", "value/explained_variance"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    torch.testing.assert_close(beside.critic.vector(), alone.critic.vector(), rtol=1e-6, atol=1e-8)


def test_the_values_loss_is_that_of_plain_torch() -> None:
    groups = sampled(2)
    made = learner({"policy": {"estimator": "gae", "gae_lambda": 1.0}, "value": {"weight": 0.5}}, budget=24)
    critic = copy.deepcopy(made.critic.module)
    found = made.train(TrainingBatch(groups=tuple(groups)), 0, 1)
    # With lambda 1 and gamma 1 the return of every token is the reward of its trajectory.
    errors = []
    for row in (row for part in groups for row in part.trajectories):
        values = critic(torch.tensor(row.token_ids[None], dtype=torch.int64)).logits[0, 1:-1, 0]
        errors.append(values - row.reward)
    loss = torch.cat(errors).square().mean() / 2
    assert found["objective/value_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["value/squared_error"] == pytest.approx(2 * loss.item(), rel=1e-5)
    gradient = torch.autograd.grad(0.5 * loss, list(critic.parameters()), allow_unused=True)
    norm = math.sqrt(sum(float(part.square().sum()) for part in gradient if part is not None))
    assert found["objective/value_grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_in_a_second_update_the_band_around_the_old_values_acts() -> None:
    # Two equal groups, one for each update, so that it does not matter which comes first.
    (found_group,) = sampled(1)
    value = {"weight": 0.5, "clip": BAND}
    made = learner({"policy": {"estimator": "gae", "gae_lambda": 1.0}, "value": value}, updates=2)
    critic = copy.deepcopy(made.critic.module)
    found = made.train(TrainingBatch(groups=(found_group, found_group)), 0, 1)
    rows = [torch.tensor(row.token_ids[None], dtype=torch.int64) for row in found_group.trajectories]
    # The return of every token is the reward of its trajectory.
    returns = torch.cat(
        [torch.full((row.shape[1] - 2,), part.reward) for row, part in zip(rows, found_group.trajectories, strict=True)]
    )
    old, losses, clipped = None, [], 0
    for _ in range(2):
        values = torch.cat([critic(row).logits[0, 1:-1, 0] for row in rows])
        old = values.detach() if old is None else old
        errors = (values - returns).square()
        inside = (torch.minimum(torch.maximum(values, old - BAND), old + BAND) - returns).square()
        clipped = int((inside > errors).sum())
        losses.append(torch.maximum(errors, inside).mean() / 2)
        gradients = torch.autograd.grad(0.5 * losses[-1], list(critic.parameters()), allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(critic.parameters(), gradients, strict=True):
                parameter -= 0 if gradient is None else RATE * gradient
    assert 0 < clipped < len(returns)
    assert found["value/clipped_fraction"] == clipped / (2 * len(returns))
    assert found["objective/value_loss"] == pytest.approx(sum(loss.item() for loss in losses) / 2, rel=1e-5)
    expected = torch.cat([parameter.detach().flatten() for parameter in critic.parameters()])
    torch.testing.assert_close(made.critic.vector(), expected, rtol=1e-5, atol=1e-7)


def test_in_the_warm_up_only_the_critic_moves() -> None:
    objective = {
        "policy": {"estimator": "gae"},
        "value": {"weight": 0.5, "warmup_steps": 1},
        "kl": {"weight": 0.1},
        "grad_norm_interval": 1,
    }
    made = learner(objective, updates=2)
    policy, critic = made.policy.vector(), made.critic.vector()
    made.reference = None  # nothing may ask it
    found = made.train(TrainingBatch(groups=tuple(sampled(4))), 0, 1)
    assert torch.equal(made.policy.vector(), policy)
    assert not torch.equal(made.critic.vector(), critic)
    assert (made.policy.updates, made.critic.updates) == (0, 2)
    assert not [name for name in found if "policy" in name or "kl" in name]
    # A mean over the updates, as ever: half of 0.5 * squared error, whose mean is over the tokens of both.
    assert found["learner/loss"] == pytest.approx(0.5 * found["objective/value_loss"], rel=1e-12)
    assert found["objective/value_loss"] == pytest.approx(found["value/squared_error"] / 2, rel=0.2)
    made.reference = build(Qwen2ForCausalLM, 2)
    made.train(TrainingBatch(groups=tuple(sampled(4))), 1, 2)
    assert made.policy.updates == 2


def test_the_learning_rates_of_policy_and_critic_reach_their_ends_with_the_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 5 steps of 3 updates, 2 of them the critic's alone: 9 updates of the policy and 15 of the critic. By the last one
    # each has fallen to a tenth.
    optimizer = {"warmup_updates": 0, "schedule": "linear", "final_fraction": 0.1}
    values = {
        "model": {"path": "unused"},
        "task": {"type": "letter_count"},
        "train": {
            "max_steps": 5,
            "updates_per_step": 3,
            "groups_per_step": 3,
            "optimizer": {**optimizer, "learning_rate": 0.5},
            "critic_optimizer": {**optimizer, "learning_rate": 0.25},
        },
        "objective": {"policy": {"estimator": "gae"}, "value": {"weight": 0.5, "warmup_steps": 2}},
        "run": {"dir": "unused"},
        "stages": ["online"],
    }
    built: dict[str, tuple[OptimizerConfig, int]] = {}

    def build(name: str, *arguments: Any) -> SimpleNamespace:
        built[name] = arguments[-2:]
        return SimpleNamespace(destroy=lambda: None)

    monkeypatch.setattr(learner_rank, "TrainedModel", build)
    for name in ("load_model", "load_critic", "saved_config", "restore_model"):
        monkeypatch.setattr(learner_rank, name, lambda *arguments: SimpleNamespace(config=None))
    made = learner({})
    made._release = lambda: None
    made.start_stage(stage_plan(parse_config(values, "test"), "online").settings, Path("unused"), None, None)
    assert {name: total for name, (_, total) in built.items()} == {"policy": 9, "critic": 15}
    last = {name: learning_rate(config, total - 1, total) for name, (config, total) in built.items()}
    assert last == {"policy": pytest.approx(0.05, rel=1e-12), "critic": pytest.approx(0.025, rel=1e-12)}
    # And so many updates are made: of the policy in the last three steps.
    stage, made = made.stage, learner(values["objective"])
    made.stage = stage
    for step in range(5):
        made.train(TrainingBatch(groups=tuple(sampled(3))), step, step + 1)
    assert (made.policy.updates, made.critic.updates) == (9, 15)


# --- scores ---


def test_the_temperature_is_of_the_policys_own_tokens_alone() -> None:
    made = learner({})
    module = made.policy.module
    rows = [policy_sample([5, 6, 7], [0, 1, 1], [0, 1, 1]), sft_sample([5, 6, 7], [0, 1, 1])]
    batch = collate([PackItem(samples=(row,)) for row in rows], 0)
    found, entropy = made.forward.logprobs(made.policy, batch, entropy=True)
    expected = [logprob(module, [5, 6, 7], 1, temperature) for temperature in (TEMPERATURE, 1.0)]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-7, atol=0)  # 0.8 in fp32
    likely = distribution(module, [5, 6, 7], TEMPERATURE)
    torch.testing.assert_close(entropy, -(likely.exp() * likely).sum(dim=-1).detach(), rtol=1e-7, atol=0)
    assert not torch.allclose(*expected)


def test_the_entropy_is_that_of_the_policys_targets_in_updates_and_of_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted: list[int] = []
    chunk = logprobs._chunk_entropy
    monkeypatch.setattr(logprobs, "_chunk_entropy", lambda found: counted.append(len(found)) or chunk(found))
    made = learner({**EVERY_TERM, "grad_norm_interval": 0}, updates=2)  # every model is asked for scores too
    found = made.train(everything(), 0, 1)
    assert sum(counted) == 2 * found["objective/policy_denominator"]
    counted.clear()
    batch = TrainingBatch(pairs=tuple(random_preferences(3)), demonstrations=(chain([5, 6, 7], 1),))
    learner({**NOTHING_SCORED, "sft": {"weight": 1.0}}, stage="preference").train(batch, 0, 1)
    learner({}, stage="sft").train(batch, 0, 1)
    rows = [policy_sample([5, 6, 7], [0, 1, 1], [0] * 3)]
    for ask in (made.scorer.old_logprobs, made.scorer.reference_logprobs, made.scorer.values):
        ask(rows)
    made.score_pairs(random_preferences(2))
    made.score([ids(5, 6, 7)])
    assert counted == []


def test_scores_of_rows_stand_at_their_tokens() -> None:
    made = learner({}, budget=16)
    rows = [
        policy_sample([5, 6, 7, 8, 9], [0, 1, 0, 1, 0], [0] * 5),
        policy_sample([5, 6], [0, 0], [0] * 2),
        policy_sample([9, 8, 7], [1, 1, 1], [0] * 3),
    ]
    found = made.scorer.old_logprobs(rows)
    own, last = (logprob(made.policy.module, row.token_ids, 1, TEMPERATURE) for row in (rows[0], rows[2]))
    assert [scores.shape for scores in found] == [(5,), (2,), (3,)]
    assert found[0].tolist() == pytest.approx([0, own[0].item(), 0, own[2].item(), 0], rel=1e-6)
    assert found[1].tolist() == [0, 0]
    assert found[2].tolist() == pytest.approx([0, *last.tolist()], rel=1e-6)  # the first token has no prediction
    assert made.scorer.old_logprobs([]) == []
    assert made.scorer.old_logprobs([rows[1]])[0].tolist() == [0, 0]  # nothing to score in any row


def test_scores_of_pairs_are_sums_without_a_temperature() -> None:
    made = learner({})
    pairs: list[Preference] = random_preferences(4)
    for found, module in (
        (made.score_pairs(pairs), made.policy.module),
        (made.scorer.reference_pair_scores(pairs), made.reference),
    ):
        for pair, scores in zip(pairs, found, strict=True):
            sides = (pair.chosen_ids, pair.rejected_ids)
            expected = [logprob(module, tokens, pair.common).sum().item() for tokens in sides]
            assert scores == pytest.approx(expected, rel=1e-6)


def spoil(module: nn.Module) -> None:
    """NaN in every row that holds token 8, before it too: attention weighs it by 0 there, and 0 times NaN is NaN."""
    with torch.no_grad():
        module.get_input_embeddings().weight[8] = math.nan


@pytest.mark.parametrize(
    ("ask", "spoilt", "what"),
    [
        ("old_logprobs", "policy", "log-probabilities of the policy"),
        ("reference_logprobs", "reference", "log-probabilities of the reference policy"),
        ("values", "critic", "values of the critic"),
    ],
)
def test_a_score_that_is_not_finite_is_named_and_never_becomes_a_zero(ask: str, spoilt: str, what: str) -> None:
    made = learner(EVERY_TERM)
    models = {"policy": made.policy.module, "reference": made.reference, "critic": made.critic.module}
    spoil(models.pop(spoilt))
    rows = [policy_sample([5, 6, 7], [0, 1, 1], [0] * 3), policy_sample([5, 8, 9], [0, 1, 1], [0] * 3)]
    with pytest.raises(NonFiniteLossError, match=f"^{what}: 2 of 4 not finite; nothing was updated or published$"):
        getattr(made.scorer, ask)(rows)
    for other in {"old_logprobs", "reference_logprobs", "values"} - {ask}:
        assert len(getattr(made.scorer, other)(rows)) == 2


def test_pairs_without_finite_scores_are_named() -> None:
    made = learner({})
    pair = replace(random_preferences(1)[0], chosen_ids=ids(1, 8, 9), rejected_ids=ids(1, 3), prompt_length=1, common=1)
    spoil(made.policy.module)
    with pytest.raises(NonFiniteLossError, match=r"^log-probabilities of preference pairs under the policy: 2 of 3 "):
        made.score_pairs([pair])
    assert len(made.scorer.reference_pair_scores([pair])) == 1
    spoil(made.reference)
    with pytest.raises(NonFiniteLossError, match=r"^log-probabilities of preference pairs under the reference policy"):
        made.scorer.reference_pair_scores([pair])


def test_a_critic_that_is_not_finite_ends_the_step_before_an_update() -> None:
    made = learner(EVERY_TERM)
    before = made.policy.vector()
    with torch.no_grad():
        made.critic.module.score.weight.fill_(math.nan)
    with pytest.raises(NonFiniteLossError, match="^values of the critic: "):
        made.train(everything(), 0, 1)
    assert torch.equal(made.policy.vector(), before) and made.policy.updates == made.critic.updates == 0


@pytest.mark.parametrize("spoilt", ["policy", "critic"])
def test_no_model_is_updated_where_one_of_them_is_not_finite(spoilt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = learner(EVERY_TERM)
    models = [made.policy, made.critic]
    before = [model.vector() for model in models]

    def refuse() -> None:
        raise NonFiniteLossError(f"gradient of the {spoilt} is not finite")

    monkeypatch.setattr(getattr(made, spoilt), "check_finite", refuse)
    with pytest.raises(NonFiniteLossError, match=f"gradient of the {spoilt} is not finite"):
        made.train(everything(), 0, 1)
    assert [model.updates for model in models] == [0, 0]
    assert all(torch.equal(model.vector(), vector) for model, vector in zip(models, before, strict=True))


def test_a_later_update_that_is_not_finite_undoes_the_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    made, untouched = learner(EVERY_TERM, updates=2), learner(EVERY_TERM, updates=2)
    models = [made.policy, made.critic]
    before = [model.vector() for model in models]
    seen: list[Tensor] = []

    def refuse_the_second() -> None:
        seen.append(made.policy.vector())
        if len(seen) == 2:
            raise NonFiniteLossError("gradient of the policy is not finite")

    with monkeypatch.context() as patch:
        patch.setattr(made.policy, "check_finite", refuse_the_second)
        with pytest.raises(NonFiniteLossError, match="gradient of the policy is not finite"):
            made.train(everything(), 0, 1)
    assert not torch.equal(*seen)  # the first update was made
    assert [model.updates for model in models] == [0, 0]
    assert all(torch.equal(model.vector(), vector) for model, vector in zip(models, before, strict=True))
    assert made.train(everything(), 0, 1) == untouched.train(everything(), 0, 1)
    for model, other in zip(models, (untouched.policy, untouched.critic), strict=True):
        assert torch.equal(model.vector(), other.vector())


@pytest.mark.parametrize(
    ("objective", "step", "updates", "copied"),
    [
        ({}, 0, 1, set()),
        ({}, 0, 2, {"policy"}),
        (EVERY_TERM, 0, 1, {"policy", "critic"}),
        ({**EVERY_TERM, "value": {"weight": 0.5, "warmup_steps": 1}, "preference": {}, "sft": {}}, 0, 1, set()),
        ({**EVERY_TERM, "value": {"weight": 0.5, "warmup_steps": 1}, "preference": {}, "sft": {}}, 0, 2, {"critic"}),
    ],
)
def test_only_models_that_may_have_to_be_put_back_are_copied(
    objective: dict[str, Any], step: int, updates: int, copied: set[str]
) -> None:
    made = learner(objective, updates=updates)
    made.train(TrainingBatch(groups=tuple(sampled(3))), step, step + 1)
    models = {"policy": made.policy, "critic": made.critic}
    assert {name for name, model in models.items() if hasattr(model, "snapshot")} == copied


def test_a_model_that_cannot_be_read_is_an_error_of_all_ranks(tmp_path: Path) -> None:
    made = learner({})
    made._release = lambda: None
    with pytest.raises(LearnerLostError, match="^learner rank 0: .*nothing-here"):
        made.start_stage(made.stage, tmp_path / "nothing-here", None, None)


def test_a_bucket_that_cannot_be_put_away_is_an_error_of_all_ranks() -> None:
    made, put = learner({}), []
    made.policy.gather = lambda parameter: parameter.detach()

    def refuse(data: np.ndarray) -> int:
        put.append(data.nbytes)
        if len(put) == 2:
            raise RuntimeError("the object store is full")
        return len(put)

    with pytest.raises(LearnerLostError, match="learner rank 0: RuntimeError: the object store is full"):
        made.send(ObjectStoreSender(refuse, 1000), 3)
    offer = made.send(ObjectStoreSender(lambda data: data.nbytes, 10**9), 3)
    tensors = dict(made.policy.module.named_parameters())
    assert offer.payload == (offer.manifest.bytes,)
    assert set(offer.manifest.names) >= set(tensors)


def test_pairs_of_which_one_side_begins_with_the_other_are_counted() -> None:
    def pair(chosen: Sequence[int], rejected: Sequence[int]) -> StepPreference:
        values = {"chosen_value": 1.0, "rejected_value": 0.0, "chosen_visits": 1, "rejected_visits": 1}
        return StepPreference(prefix_ids=ids(1, 2), chosen_ids=ids(*chosen), rejected_ids=ids(*rejected), **values)

    found = replace(tree(), step_preferences=(pair([3, 4], [3, 5]), pair([3], [3, 5]), pair([3, 4], [3])))
    batch = TrainingBatch(groups=(found, replace(found, step_preferences=found.step_preferences[:2])))
    figures = {
        pairs: learner({"preference": {"weight": 1.0, "pairs": pairs}}).train(batch, 0, 1)
        for pairs in ("steps", "chains")
    }
    assert figures["steps"]["preference/left_out"] == 3
    assert figures["steps"]["objective/preference_denominator"] == 2
    assert set(figures["steps"]) <= set(METRICS)
    assert "preference/left_out" not in figures["chains"]


def test_the_policy_that_a_stage_begins_with_has_a_margin_of_zero() -> None:
    # The pairs of a step's trees are compared with the reference policy; here it is the policy itself.
    made = learner({"preference": {"weight": 1.0}, "policy": {"weight": 0.0}})
    made.reference = copy.deepcopy(made.policy.module)
    found = made.train(TrainingBatch(groups=(tree(), tree())), 0, 1)
    assert found["preference/margin"] == pytest.approx(0.0, abs=1e-5)
    assert found["objective/preference_loss"] == pytest.approx(math.log(2), rel=1e-6)
