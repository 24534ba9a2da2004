"""The schema of the section `objective`: the terms of the joint loss, and what each is made of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlsys.config.section import Section

Estimator = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gae"]
TreeEstimator = Literal["sibling_mean", "treerl", "treepo", "backed_up", "group"]
KlEstimator = Literal["k1", "k2", "k3"]


class Component(Section):
    weight: float = Field(default=0.0, ge=0)
    """Weight of this term in the joint loss; 0 leaves it out, at no cost."""
    final_weight: float | None = Field(default=None, ge=0)
    """Weight in the last step of the stage, approached linearly from `weight`; null keeps `weight`. In the first and in
    the last step a term of the stage must have one above 0."""

    @property
    def used(self) -> bool:
        """Whether the term has any weight in any step."""
        return self.weight > 0 or (self.final_weight or 0) > 0

    def weight_at(self, step: int, steps: int) -> float:
        """Weight in a training step.

        weight + (final_weight - weight) * min(1, step / (steps - 1)),   step counted from 0 of `steps`
        """
        if self.final_weight is None:
            return self.weight
        progress = min(1.0, step / (steps - 1)) if steps > 1 else 1.0
        return self.weight + (self.final_weight - self.weight) * progress


class PolicyConfig(Component):
    weight: float = Field(default=1.0, ge=0)
    """Weight of the policy-gradient term of the online stage; 0 leaves it out."""
    estimator: Estimator = "grpo"
    """Advantages of sampled groups. grpo: reward minus the group's mean, over its standard deviation; dr_grpo: without
    the division; rloo: minus the mean of the others; reinforce_pp: the step's rewards, whitened; reinforce_pp_baseline:
    minus the group's mean, then whitened; gae: of a critic (objective.value)."""
    tree_estimator: TreeEstimator = "sibling_mean"
    """Advantages of searched groups: sibling_mean (SPO), treerl, treepo, backed_up (DeepSearch), or group: as if the
    chains were independent samples. Divided by the standard deviation where estimator is grpo."""
    surrogate: Literal["clip", "gspo", "cispo"] = "clip"
    """clip: PPO's; gspo: with the ratio of the whole sequence; cispo: clipped weights, no gradient is dropped."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """Lower bound of the probability ratio is 1 - clip_low."""
    clip_high: float = Field(default=0.28, ge=0)
    """Upper bound of the probability ratio is 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """With a negative advantage no term is above this times its size; null for no such bound. Only with clip."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """Divide by all tokens; average within then over sequences; or divide by rows * sampling.max_tokens."""
    decoupled: bool = True
    """Ratios are against the policy at the start of the step, and tokens are weighted by importance_cap's weight.
    False: ratios are against the policy that sampled the token, and there is no such weight."""
    importance_cap: float | None = Field(default=2.0, ge=1)
    """Truncated importance sampling: a token's loss is times min(p_start / p_sampler, this); null leaves it out."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus, over the policy's tokens."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount of a token's reward, for gae and reinforce_pp."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Trace of generalised advantage estimation: 1 is the return minus the value, 0 the temporal difference."""
    overlong_buffer: int = Field(default=0, ge=0)
    """Over the last so many tokens before sampling.max_tokens the reward falls linearly; 0 for no such shaping."""
    overlong_penalty: float = Field(default=1.0, ge=0)
    """How far it has fallen at sampling.max_tokens."""


class KlConfig(Component):
    estimator: KlEstimator = "k3"
    """k1: the log-ratio, for in_reward: as a loss its expected gradient is 0; k2: half its square, the one with the
    right gradient as a loss; k3: never negative, the one of GRPO."""
    in_reward: bool = False
    """Take the term off every token's reward instead of adding it to the loss (sampled groups only)."""


class ValueConfig(Component):
    clip: float | None = Field(default=0.2, gt=0)
    """A new value counts as at most so far from the old one; null for no bound."""
    warmup_steps: int = Field(default=0, ge=0)
    """First steps of the stage in which only the critic learns."""


class PreferenceConfig(Component):
    loss: Literal["dpo", "ipo"] = "dpo"
    """dpo: the logistic loss, conservative with a label_smoothing; ipo: the squared distance to 1 / (2 beta)."""
    beta: float = Field(default=0.1, gt=0)
    """Inverse temperature of the margin."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability that a preference is wrong (conservative DPO); the margin's optimum is logit(1 - this) / beta."""
    adaptive_smoothing: bool = False
    """Take it from the visits of the two branches instead, where a pair has them: 1 - 1/(1 + rejected/chosen)."""
    length_norm: bool = False
    """Compare means over a chain's trained tokens instead of sums."""
    mask_prefix_dpo: bool = True
    """Train no token before the first difference of the two chains. It changes nothing where sums are compared."""
    pairs: Literal["chains", "steps"] = "chains"
    """From trees: pairs of whole chains, or of sibling nodes."""
    source: Literal["search", "file"] = "search"
    """Online: the trees of the step (search.fraction), or the pairs of the stage `preference` (preference.path)."""


class SftConfig(Component):
    source: Literal["chosen", "trees", "demonstrations"] = "chosen"
    """Online: the chosen side of the step's pairs, the chains that extract.supervised takes from the step's trees, or
    the task's own demonstrations. The stage `preference` trains on the chosen side."""
    rows_per_step: int = Field(default=64, ge=1)
    """Demonstrations of one online step, for `demonstrations`."""
    mask_prefix_sft: bool = False
    """Train the chosen side only from its first difference to the rejected one on."""


class ObjectiveConfig(Section):
    policy: PolicyConfig = PolicyConfig()
    """Policy gradient on sampled and searched trajectories."""
    kl: KlConfig = KlConfig()
    """Divergence from the policy that the stage began with."""
    value: ValueConfig = ValueConfig()
    """The critic, for the estimator gae; its optimizer is train.critic_optimizer."""
    preference: PreferenceConfig = PreferenceConfig()
    """Better and worse chains of one prompt."""
    sft: SftConfig = SftConfig()
    """Negative log-likelihood of chains to imitate; its weight is the alpha of the paper."""
    grad_norm_interval: int = Field(default=10, ge=0)
    """Steps between measurements of every term's own gradient norm, in the last transformer layer; 0 for never."""

    @model_validator(mode="after")
    def _consistent(self) -> ObjectiveConfig:
        policy, preference, kl = self.policy, self.preference, self.kl
        if kl.used and not policy.used:
            raise ValueError("kl.weight has no effect: the term is of the policy term's tokens, and policy.weight is 0")
        if kl.in_reward and not kl.used:
            raise ValueError("kl.in_reward has no effect with kl.weight 0: raise it, or leave in_reward out")
        if policy.dual_clip is not None and policy.surrogate != "clip":
            raise ValueError(f"policy.dual_clip needs policy.surrogate clip, found {policy.surrogate}")
        if policy.used and policy.estimator == "gae" and not self.value.used:
            raise ValueError("policy.estimator gae needs a critic: set value.weight above 0")
        if self.value.used and policy.estimator != "gae":
            raise ValueError(f"value.weight is for policy.estimator gae, found {policy.estimator}")
        if self.value.used and not policy.used:
            raise ValueError("value.weight trains a critic for the policy term, whose policy.weight is 0")
        if self.value.warmup_steps and not self.value.used:
            raise ValueError("value.warmup_steps is for a critic: set value.weight above 0, or leave it out")
        smoothed = preference.label_smoothing or preference.adaptive_smoothing
        if preference.loss == "ipo" and smoothed:
            raise ValueError("preference.label_smoothing and adaptive_smoothing are for loss dpo, found ipo")
        return self
