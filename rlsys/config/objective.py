"""The schema of the section `objective`: the terms of the joint loss and their settings."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from rlsys.config.section import Section
from rlsys.overlong import OverlongShaping
from rlsys.plugins import PluginName

BuiltInEstimator = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gae"]
ESTIMATORS: tuple[str, ...] = get_args(BuiltInEstimator)
Estimator = BuiltInEstimator | PluginName
TreeEstimator = Literal["sibling_mean", "treerl", "treepo", "backed_up", "group"]
KlEstimator = Literal["k1", "k2", "k3"]


def linear(first: float, last: float | None, step: int, steps: int) -> float:
    """Return first + (last - first) min(1, step / (steps - 1)); `first` if there is no last value."""
    if last is None:
        return first
    return first + (last - first) * (min(1.0, step / (steps - 1)) if steps > 1 else 1.0)


class Component(Section):
    weight: float = Field(default=0.0, ge=0)
    """Weight of this term in the joint loss. 0 leaves the term out, at no cost."""
    final_weight: float | None = Field(default=None, ge=0)
    """Weight in the last step of the stage, reached linearly from `weight`. null: the weight stays constant. At least
    one term must have a weight above 0 in the first step of the stage, and in the last."""

    @property
    def used(self) -> bool:
        """Whether the term has a weight above 0 in any step."""
        return self.weight > 0 or (self.final_weight or 0) > 0

    def weight_at(self, step: int, steps: int) -> float:
        """Return the weight in a training step.

        weight + (final_weight - weight) * min(1, step / (steps - 1))

        Args:
            step: the training step within the stage, from 0.
            steps: training steps of the stage.
        """
        return linear(self.weight, self.final_weight, step, steps)


class PolicyConfig(Component):
    weight: float = Field(default=1.0, ge=0)
    """Weight of the policy-gradient term of the stage online. 0 leaves the term out."""
    estimator: Estimator = "grpo"
    """Advantage estimator of sampled groups. grpo: reward minus the mean of the group, divided by its standard
    deviation; dr_grpo: grpo without the division; rloo: reward minus the mean of the other rewards in the group;
    reinforce_pp: rewards whitened over the step; reinforce_pp_baseline: reward minus the mean of the group, then
    whitened over the step; gae: generalised advantage estimation with a critic (objective.value). Or a function of your
    own, `module:function` or `file.py:function`, from the rewards of a group to its advantages (docs/extending.md)."""
    tree_estimator: TreeEstimator = "sibling_mean"
    """Advantage estimator of searched groups: sibling_mean (SPO), treerl, treepo, backed_up (DeepSearch), or group,
    which treats the chains as independent samples."""
    tree_std: bool = True
    """Whether the advantages of searched groups are divided by the standard deviation of the siblings (sibling_mean) or
    of the tree, as those of sampled groups are. With few chains below a node, this turns chance into large advantages;
    false leaves them as they are."""
    surrogate: Literal["clip", "gspo", "cispo"] = "clip"
    """Surrogate loss. clip: PPO's clipped ratio of each token; gspo: clipped ratio of the whole sequence; cispo:
    clipped importance weights, which drop no gradient."""
    clip_low: float = Field(default=0.2, ge=0, lt=1)
    """The lower bound of the probability ratio is 1 - clip_low."""
    clip_high: float = Field(default=0.28, ge=0)
    """The upper bound of the probability ratio is 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """If the advantage A is negative, the loss of a token is at most dual_clip * |A|. null: no bound. Only for the
    surrogate clip."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """token_mean: divide by the number of tokens; sequence_mean: average over the tokens of each sequence, then over
    sequences; constant: divide by rows * sampling.max_tokens."""
    decoupled: bool = True
    """true: probability ratios refer to the old policy (start of the step), and tokens get the truncated importance
    weights of importance_cap. false: ratios refer to the behavior policy, without importance weights."""
    importance_cap: float | None = Field(default=2.0, ge=1)
    """Truncated importance sampling: the loss of a token is multiplied by min(p_old / p_behavior, importance_cap).
    null: no importance weights."""
    teacher_share: float = Field(default=0.0, ge=0, lt=1)
    """Share s of the teacher in the denominator of the ratio (RLAD): p / (p_old^(1 - s) p_teacher^s). It needs a
    teacher, and objective.distill.divergence sampled. 0: the old policy alone."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus on the policy's tokens."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount factor per token, for the estimators gae and reinforce_pp."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation. 1: return minus value; 0: one-step temporal difference."""
    overlong_buffer: int = Field(default=0, ge=0)
    """Number of tokens before sampling.max_tokens over which the reward falls linearly. 0: no such penalty."""
    overlong_penalty: float = Field(default=1.0, ge=0)
    """Amount by which the reward has fallen at sampling.max_tokens."""

    def overlong_shaping(self, max_tokens: int) -> OverlongShaping:
        """Return the overlong shaping of rewards, for a value of sampling.max_tokens."""
        return OverlongShaping(max_tokens=max_tokens, buffer=self.overlong_buffer, factor=self.overlong_penalty)


class KlConfig(Component):
    estimator: KlEstimator = "k3"
    """Estimator of the KL divergence. k1: the log-ratio, meant for in_reward, because as a loss its expected gradient
    is 0 and refused; k2: half the squared log-ratio, which has the right gradient as a loss; k3: never negative, used
    by GRPO, at most 10 nats a token."""
    in_reward: bool = False
    """Subtract the term from the reward of every token instead of adding it to the loss. Only for sampled groups."""


class ValueConfig(Component):
    clip: float | None = Field(default=0.2, gt=0)
    """Largest change of a value in the value loss (PPO's value clipping). null: no bound."""
    warmup_steps: int = Field(default=0, ge=0)
    """Number of first training steps of the stage in which the critic learns and the policy term has no weight."""


class PreferenceConfig(Component):
    loss: Literal["dpo", "ipo"] = "dpo"
    """dpo: the logistic loss, conservative DPO with label_smoothing; ipo: the squared distance of the margin to 1 / (2
    beta)."""
    beta: float = Field(default=0.1, gt=0)
    """Inverse temperature of the preference margin."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability eps that a preference is wrong (conservative DPO). The optimal margin is logit(1 - eps) / beta."""
    adaptive_smoothing: bool = False
    """For pairs with visit counts, use 1 - 1/(1 + rejected/chosen) visits of the two branches instead of
    label_smoothing."""
    length_norm: bool = False
    """Compare mean log-probabilities of the trained tokens instead of sums."""
    mask_prefix_dpo: bool = True
    """Do not train the common prefix of the two chains. It has no effect if sums are compared (length_norm false)."""
    pairs: Literal["chains", "steps"] = "chains"
    """Pairs from trees: chains are pairs of whole chains, steps are pairs of sibling nodes."""
    source: Literal["search", "file"] = "search"
    """Source of the pairs in the stage online. search: the trees of the step (search.fraction); file: preference.path,
    or the pairs that an earlier stage search has extracted."""


class SftConfig(Component):
    source: Literal["chosen", "trees", "demonstrations", "file"] = "chosen"
    """Source of the chains in the stage online. chosen: the chosen side of the step's pairs; trees: the chains that
    extract.supervised selects from the step's trees; demonstrations: the demonstrations of the task; file: the rows of
    sft.path, or those that an earlier stage search has extracted. The stage preference always trains on the chosen
    side."""
    rows_per_step: int = Field(default=64, ge=1)
    """Rows in one online training step, for the sources demonstrations and file."""
    curiosity: float = Field(default=0.0, ge=0)
    """Weight, for each token, of 1/2 (log p - log p~)^2, where p~ is the policy at a temperature that makes an
    uncertain token more uncertain (CurioSFT: 1). In all stages with the term."""
    mask_prefix_sft: bool = False
    """Do not train the prefix that the chosen side shares with the rejected side."""
    mask_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the tokens of imitated chains that the model does not see (Masked Thought): the padding token stands in
    their place, and they are trained all the same. For the stages warm_start and sft, and in the stage online for the
    sources trees, demonstrations and file."""


class DistillConfig(Component):
    weight: float = Field(default=0.0, ge=0)
    """Weight of the term. 0 leaves it out; the teacher then only serves policy.teacher_share."""
    divergence: Literal["sampled", "top_k", "whole"] = "sampled"
    """Divergence between the policy's and the teacher's distributions of the next token. sampled: the reverse
    divergence, estimated from the sampled tokens alone; top_k: the generalised Jensen-Shannon divergence (GKD) over the
    top_k most probable tokens of the teacher, and all others as one more token; whole: the same over all tokens, from
    teacher.in_learner or the policy that the stage began with (no teacher.model)."""
    top_k: int = Field(default=16, ge=1, le=1024)
    """For top_k: number of tokens of the teacher at every place."""
    on_policy_share: float = Field(default=1.0, ge=0, le=1)
    """For top_k and whole: lambda of GKD, the share of the policy's own chains in the term. The rest, 1 - lambda, is
    over rows: those of the stages warm_start and sft, and in the stage online those of objective.sft.source
    demonstrations or file. Each share has its own denominator."""
    beta: float = Field(default=0.0, ge=0, le=1)
    """For top_k and whole. 0: forward divergence, from teacher to policy; 1: reverse divergence; between them: both, to
    the mixture of beta times the teacher and 1 - beta times the policy."""
    interpolation: float = Field(default=1.0, gt=0, le=1)
    """For top_k and whole: share t of the teacher in the distribution to learn (TAID), proportional to
    p^(1 - t) q^t."""
    final_interpolation: float | None = Field(default=None, gt=0, le=1)
    """Share in the last step of the stage, reached linearly from `interpolation`. null: the share stays constant."""
    interpolation_rate: float = Field(default=0.0, ge=0, le=1)
    """Also let the share grow by interpolation_rate * sigmoid(m) * (1 - share) in a step, where m is a moving mean of
    the relative fall of the term's loss (TAID: 5e-4). It ends at final_interpolation. 0: linearly alone."""
    teacher_temperature: float = Field(default=1.0, gt=0)
    """For top_k: temperature of the teacher's top_k tokens, whose probability together stays the same (FIRST). Above 1
    makes a teacher less certain."""
    confidence_gate: bool = False
    """For top_k: multiply the loss of a token by sigmoid(entropy of the policy - entropy of the teacher), both over the
    top_k tokens and all others as one (TSD-KD)."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """For top_k: weight of the mean entropy of the policy on the tokens of entropy_share, which it lowers (TSD-KD)."""
    entropy_share: float = Field(default=0.1, gt=0, le=1)
    """Share of the tokens of each chain, those with the largest entropy of the policy, for entropy_coef."""

    @property
    def on_chains(self) -> bool:
        """Whether the term acts on the policy's own chains."""
        return self.used and self.on_policy_share > 0

    @property
    def on_rows(self) -> bool:
        """Whether the term acts on rows that the policy did not write."""
        return self.used and self.on_policy_share < 1

    @model_validator(mode="after")
    def _growth_has_an_end(self) -> DistillConfig:
        if self.interpolation_rate and (self.final_interpolation or 0) <= self.interpolation:
            raise ValueError("interpolation_rate needs a final_interpolation above interpolation")
        return self

    def interpolation_at(self, step: int, steps: int) -> float:
        """Return the share in a training step; see `Component.weight_at`."""
        return linear(self.interpolation, self.final_interpolation, step, steps)

    @property
    def scored_tokens(self) -> int | None:
        """Number of tokens that the teacher scores at every place; None for the sampled token alone."""
        return self.top_k if self.divergence == "top_k" else None


class RankingConfig(Component):
    max_answers: int = Field(default=8, ge=1)
    """Largest number of right answers of a prompt that are ranked, and of wrong ones. All are in one forward pass."""


class CustomLossConfig(Component):
    fn: PluginName | None = None
    """Loss of your own on the tokens of the policy term, `module:function` or `file.py:function`
    (docs/extending.md)."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of every call, by name."""


class ObjectiveConfig(Section):
    policy: PolicyConfig = PolicyConfig()
    """Policy-gradient term on sampled and searched trajectories."""
    kl: KlConfig = KlConfig()
    """KL divergence from the reference policy, which is the policy that the stage began with."""
    value: ValueConfig = ValueConfig()
    """Value term of the critic, for the estimator gae. Its optimizer is train.critic_optimizer."""
    preference: PreferenceConfig = PreferenceConfig()
    """Preference term on pairs of a better and a worse chain of one prompt."""
    sft: SftConfig = SftConfig()
    """Supervised term: negative log-likelihood of chains. Its weight is the alpha of the Marco-o1 v2 paper."""
    distill: DistillConfig = DistillConfig()
    """Term that brings the policy to a teacher (section teacher) on sampled and searched trajectories."""
    ranking: RankingConfig = RankingConfig()
    """Term that ranks the right answers of a prompt above its wrong ones (AFT), in sampled and searched groups."""
    custom: CustomLossConfig = CustomLossConfig()
    """Term with a loss of your own."""
    grad_norm_interval: int = Field(default=10, ge=0)
    """Training steps between measurements of the gradient norm of each term, in the last transformer layer. 0:
    never."""

    @property
    def asks_a_teacher(self) -> bool:
        """Whether any term needs the scores of a teacher's engines or of a file."""
        needs_scores = self.distill.used and self.distill.divergence != "whole"
        return needs_scores or (self.policy.used and self.policy.teacher_share > 0)

    @property
    def scores_chains(self) -> bool:
        """Whether any term needs the scores of a teacher for the policy's own chains."""
        by_engines = self.distill.on_chains and self.distill.divergence != "whole"
        return by_engines or (self.policy.used and self.policy.teacher_share > 0)

    @model_validator(mode="after")
    def _consistent(self) -> ObjectiveConfig:
        policy, preference, kl = self.policy, self.preference, self.kl
        if kl.used and not policy.used:
            raise ValueError("kl.weight has no effect: it covers the policy term's tokens, and policy.weight is 0")
        if self.custom.used and not (policy.used and self.custom.fn):
            raise ValueError("custom.weight needs custom.fn and a policy.weight above 0, whose tokens it covers")
        if self.custom.fn and not self.custom.used:
            raise ValueError("custom.fn has no effect with custom.weight 0: raise it, or leave fn out")
        if kl.in_reward and not kl.used:
            raise ValueError("kl.in_reward has no effect with kl.weight 0: raise it, or leave in_reward out")
        if policy.dual_clip is not None and policy.surrogate != "clip":
            raise ValueError(f"policy.dual_clip needs policy.surrogate clip, found {policy.surrogate}")
        if policy.teacher_share and self.distill.divergence != "sampled":
            raise ValueError(
                "policy.teacher_share needs scores of the sampled tokens: set distill.divergence to sampled"
            )
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
