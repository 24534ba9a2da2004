"""A learner rank with plain torch in place of DeepSpeed, and training data of every kind."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from joint_samples import group, ids, random_preferences, searched, trajectory
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from learners import rank as rank_module
from learners.attention import use_complete_attention
from learners.deepspeed.critic import Critic
from learners.deepspeed.engine import TrainedModel
from learners.deepspeed.reference import ReferencePolicy
from learners.language_model import LanguageModel
from learners.rank import LearnerRank
from learners.settings import RankSettings
from rlsys.config.objective import ObjectiveConfig
from rlsys.config.schema import LearnerConfig, OptimizerConfig
from rlsys.config.stages import StageSettings
from rlsys.types import Demonstration, StageName, TeacherTokens, TrainingBatch, Trajectory, TrajectoryGroup

TEMPERATURE = 0.8
RATE = 0.5
SIZE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EVERY_TERM: dict[str, Any] = {
    "policy": {"estimator": "gae", "entropy_coef": 0.01, "dual_clip": 3.0},
    "kl": {"weight": 0.1},
    "value": {"weight": 0.5},
    "preference": {"weight": 0.3, "label_smoothing": 0.1},
    "sft": {"weight": 0.7, "source": "trees"},
    "ranking": {"weight": 0.6},
    "distill": {"weight": 0.4, "divergence": "top_k", "top_k": 3, "beta": 0.5},
    "custom": {"weight": 0.2, "fn": "plugged:z_loss"},
    "grad_norm_interval": 1,
}

# One update without reference policy or critic needs no scores, which are stored in fp32.
NOTHING_SCORED: dict[str, Any] = {
    "policy": {"estimator": "dr_grpo", "entropy_coef": 0.01},
    "preference": {"weight": 0.3, "source": "file"},
    "sft": {"weight": 0.7, "source": "demonstrations"},
    "grad_norm_interval": 1,
}


class PlainModel:
    """The interface of `TrainedModel`, with gradient descent in double precision."""

    last_layer = TrainedModel.last_layer

    def __init__(self, module: nn.Module, settings: RankSettings) -> None:
        self.module, self.settings, self.updates = module, settings, 0
        self.bare = LanguageModel(module) if isinstance(module, PreTrainedModel) else module
        self.name = type(module).__name__

    def __call__(self, **inputs: Any) -> Any:
        return self.bare(**inputs)

    def backward(self, loss: Tensor, loss_name: str, tags: Mapping[str, int]) -> None:
        assert math.isfinite(loss.item()), loss_name
        loss.backward()

    def take_snapshot(self) -> None:
        self.snapshot = copy.deepcopy(self.module.state_dict()), self.updates

    def roll_back(self) -> None:
        state, self.updates = self.snapshot
        self.module.load_state_dict(state)

    def discard_gradients(self) -> None:
        self.module.zero_grad()

    def check_finite(self) -> None:
        """Check nothing: there is one rank, and `backward` has checked the loss."""

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
    """Build a tiny model of a transformers class in double precision."""
    torch.manual_seed(seed)
    model = kind(Qwen2Config(**{**SIZE, **changes})).double()
    use_complete_attention(model)
    return model


def build_critic(seed: int) -> Critic:
    """Build a tiny critic in double precision, whose values are not 0."""
    critic = Critic(build(Qwen2ForCausalLM, seed))
    nn.init.normal_(critic.score.weight, std=0.02)
    return critic.eval()


def plain_rank(
    objective: Mapping[str, Any], *, stage: StageName = "online", updates: int = 1, budget: int = 64, steps: int = 11
) -> LearnerRank:
    """Build a rank without DeepSpeed and without a process group of its own."""
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
        patch.setattr(rank_module, "join_process_group", lambda settings: None)
        rank = LearnerRank(settings)
    optimizer = OptimizerConfig()
    rank.stage = StageSettings(stage=stage, steps=steps, updates_per_step=updates, optimizer=optimizer)
    rank.policy = PlainModel(build(Qwen2ForCausalLM, 0), settings)
    if settings.objective.value.used:
        rank.critic = PlainModel(build_critic(1), settings)
    rank.reference = ReferencePolicy(build(Qwen2ForCausalLM, 2), settings)
    return rank


def sampled(count: int, seed: int = 0) -> list[TrajectoryGroup]:
    """Return groups of four sampled trajectories of random length, with rewards 0 and 1."""
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
    """Return a searched group with pairs and a demonstration."""
    pairs = tuple(replace(pair, chosen_reference=None, rejected_reference=None) for pair in random_preferences(2))
    chains = ([1, 2], "ok", 1.0), ([1, 3], "wrong", 0.0), ([4], "ok", 1.0)
    return replace(searched(*chains, forced=[2], samples={1: 2}), pairs=pairs, demonstrations=(chain([1, 2, 7, 8], 2),))


def with_teacher(group: TrajectoryGroup, k: int, seed: int = 0) -> TrajectoryGroup:
    """Return the group with random scores of a teacher for every token that the policy chose.

    With k = 1 they are of the tokens themselves, and higher than those of the sampler.
    """
    rng = np.random.default_rng(seed)

    def scores(scored: Trajectory) -> TeacherTokens:
        length, vocabulary = len(scored.token_ids), SIZE["vocab_size"]
        if k == 1:
            logprobs, tokens = rng.uniform(-1, 0, (length, 1)), scored.token_ids[:, None]
        else:
            logprobs = np.log(rng.dirichlet(np.ones(vocabulary), size=length)[:, :k])
            tokens = np.stack([rng.permutation(vocabulary)[:k] for _ in range(length)]).astype(np.int32)
        return TeacherTokens(mask=scored.loss_mask, ids=tokens, logprobs=logprobs.astype(np.float32))

    return replace(group, trajectories=tuple(replace(each, teacher=scores(each)) for each in group.trajectories))


def chain(tokens: Sequence[int], start: int) -> Demonstration:
    return Demonstration(token_ids=ids(*tokens), loss_mask=np.arange(len(tokens)) >= start)


def everything() -> TrainingBatch:
    """Return a batch with data for every term."""
    return TrainingBatch(
        groups=tuple(with_teacher(group, 3) for group in (*sampled(3), tree(), tree())),
        pairs=tuple(random_preferences(3)),
        demonstrations=(chain([5, 6, 7], 1), chain([5, 6, 7, 8, 9], 2)),
    )


def distribution(module: nn.Module, tokens: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Return [T - 1, V] log-probabilities of the token after each token but the last."""
    return (module(torch.tensor([list(map(int, tokens))])).logits[0, :-1] / temperature).log_softmax(-1)


def logprob(module: nn.Module, tokens: Sequence[int], start: int, temperature: float = 1.0) -> Tensor:
    """Return the log-probabilities of the tokens from `start` on."""
    following = torch.tensor(list(map(int, tokens[1:])))
    return distribution(module, tokens, temperature).gather(-1, following[:, None])[start - 1 :, 0]


def spoil(module: nn.Module) -> None:
    """Make every row with token 8 NaN, also before it: attention multiplies the NaN by 0, which gives NaN."""
    with torch.no_grad():
        module.get_input_embeddings().weight[8] = math.nan
