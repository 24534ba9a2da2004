"""Check the rules that involve several sections of a config, one function for each rule.

A rule raises ValueError with one line that names the fields. `Config` applies `RULES` in order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from rlsys.config.adapter_checks import adapter_has_no_critic, adapter_stays_on_its_device
from rlsys.config.data_checks import (
    answers_are_judged,
    divergence_has_scores,
    extracted_nodes_exist,
    masked_chains_are_rows,
)
from rlsys.config.device_checks import colocated_fit
from rlsys.config.environment_checks import environment_is_named, searched_turns_have_replies, turns_can_end
from rlsys.config.patterns import resolve
from rlsys.config.search_checks import (
    backtracking_has_its_keys,
    estimates_have_a_source,
    search_samples_like_training,
    searched_groups_train_by_token,
    tree_advantages_have_trees,
    unsolved_prompts_are_told,
)
from rlsys.config.search_values import ModelValueConfig, StepsValueConfig
from rlsys.config.stages import TERMS_OF_STAGE, stage_plan, stage_plans, term_with_pairs
from rlsys.config.tasks import WITHOUT_STEPS
from rlsys.config.teacher_checks import (
    distillation_has_a_teacher,
    distilled_rows_have_a_source,
    divergence_has_its_keys,
    teacher_scores_what_was_sampled,
    whole_teacher_fits,
)
from rlsys.errors import ConfigError
from rlsys.types import StageName

if TYPE_CHECKING:
    from rlsys.config.schema import Config

BATCH_TOKENS = 8192
"""Tokens of one engine step, unless actors.max_model_len is larger."""

Rule = Callable[["Config"], None]


def of_stage(stage: StageName) -> Callable[[Rule], Rule]:
    """Return a decorator of a rule that concerns only runs with a stage."""

    def decorate(rule: Rule) -> Rule:
        @functools.wraps(rule)
        def check(config: Config) -> None:
            if stage in config.stages:
                rule(config)

        return check

    return decorate


def completion_leaves_room_for_prompt(config: Config) -> None:
    """Raise if the longest completion alone fills the context of an engine."""
    if config.sampling.max_tokens >= config.actors.max_model_len:
        raise ValueError(
            f"sampling.max_tokens {config.sampling.max_tokens} leaves no room for a prompt "
            f"in actors.max_model_len {config.actors.max_model_len}"
        )


def batch_holds_sequences(config: Config) -> None:
    """Raise if an engine should decode more sequences at once than tokens fit into one of its batches."""
    value = config.search.value
    sections = (
        ("actors", config.actors),
        ("search.model", config.search.model),
        ("search.reviewer", config.search.reviewer),
        ("search.value", value if isinstance(value, ModelValueConfig) else None),
        ("teacher.model", config.teacher.model),
    )
    for name, section in sections:
        if section is None:
            continue
        limit = max(BATCH_TOKENS, section.max_model_len)
        if section.max_num_seqs > limit:
            raise ValueError(f"{name}.max_num_seqs {section.max_num_seqs} exceeds the {limit} tokens of a batch")


def tensor_parallel_needs_cuda(config: Config) -> None:
    """Raise if an engine is to use several CPUs as devices."""
    if config.actors.tensor_parallel_size > 1 and config.run.device != "cuda":
        raise ValueError("actors.tensor_parallel_size above 1 needs run.device: cuda")


def deadlines_are_nested(config: Config) -> None:
    """Raise if a healthy process could exceed a deadline."""
    for shorter, longer in (
        ("rewards.timeout_s", "actors.hang_timeout_s"),  # a verdict counts as progress
        ("actors.hang_timeout_s", "actors.rollout_timeout_s"),
        ("learner.hang_timeout_s", "learner.timeout_s"),
    ):
        low, high = (getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in (shorter, longer))
        if low > high:
            raise ValueError(f"{shorter} {low:g} exceeds {longer} {high:g}: raise the latter")


def offload_needs_zero(config: Config) -> None:
    """Raise if optimizer state is to be offloaded without ZeRO."""
    if config.learner.optimizer_offload and config.learner.zero_stage == 0:
        raise ValueError("learner.optimizer_offload needs learner.zero_stage 1, 2 or 3")


def bf16_needs_zero(config: Config) -> None:
    """Raise if a bf16 learner would have no fp32 master weights."""
    if config.learner.dtype == "bf16" and config.learner.zero_stage == 0:
        raise ValueError("learner.dtype bf16 needs learner.zero_stage 1, 2 or 3, which keep fp32 master weights")


def sequence_parallel_divides(config: Config) -> None:
    """Raise if ranks or heads cannot be dealt to groups of ranks that share rows."""
    size, ranks, scratch = config.learner.sequence_parallel, config.learner.ranks, config.model.from_scratch
    if ranks % size:
        raise ValueError(f"learner.ranks {ranks} must be a multiple of learner.sequence_parallel {size}")
    if scratch is not None and scratch.heads % size:
        raise ValueError(
            f"model.from_scratch.heads {scratch.heads} must be a multiple of learner.sequence_parallel {size}"
        )


def overlong_buffer_fits_completion(config: Config) -> None:
    """Raise if the overlong buffer is longer than a completion."""
    buffer, limit = config.objective.policy.overlong_buffer, config.sampling.max_tokens
    if buffer > limit:
        raise ValueError(f"objective.policy.overlong_buffer {buffer} exceeds sampling.max_tokens {limit}")


@of_stage("online")
def ratios_begin_at_one(config: Config) -> None:
    """Raise if the ratio to the behavior policy compares a distribution cut by top_p with a whole one.

    The actors report log-probabilities among the tokens that top_p leaves, and the learner among all tokens. So every
    ratio would begin below 1, at about top_p.
    """
    policy, top_p = config.objective.policy, config.sampling.top_p
    if policy.used and not policy.decoupled and top_p < 1:
        raise ValueError(
            f"objective.policy.decoupled false needs sampling.top_p 1, found {top_p:g}: the ratios to the behavior "
            "policy would begin below 1; set sampling.top_p to 1, or objective.policy.decoupled to true"
        )


@of_stage("online")
def kl_loss_has_a_gradient(config: Config) -> None:
    """Raise if the KL term is a loss whose expected gradient is 0."""
    kl = config.objective.kl
    if kl.used and kl.estimator == "k1" and not kl.in_reward:
        raise ValueError(
            "objective.kl.estimator k1 has an expected gradient of 0 as a loss, so the term would add only noise; set "
            "objective.kl.estimator to k2 or k3, or objective.kl.in_reward to true"
        )


@of_stage("online")
def online_has_a_term(config: Config) -> None:
    """Raise if no term of the online stage has a weight."""
    objective = config.objective
    if not any(getattr(objective, name).used for name in ("policy", "preference", "sft", "distill", "ranking")):
        raise ValueError(
            "stage online: the weights of objective.policy, objective.preference, objective.sft, objective.distill and "
            "objective.ranking are all 0; raise one"
        )


@of_stage("online")
def sampled_prompts_train_the_policy(config: Config) -> None:
    """Raise if online prompts are sampled although only the policy term trains on them."""
    objective = config.objective
    used = objective.policy.used or objective.distill.on_chains or objective.ranking.used
    if not used and config.search.fraction < 1:
        raise ValueError(
            "objective.policy.weight 0: the sampled prompts of stage online would train nothing; set "
            f"search.fraction to 1 (now {config.search.fraction:g}), or use the stages warm_start, sft or preference"
        )


@of_stage("online")
def critic_has_sampled_prompts(config: Config) -> None:
    """Raise if a critic has no sampled prompts to learn from."""
    if config.objective.value.used and config.search.fraction == 1:
        raise ValueError(
            "objective.value.weight has no effect: the critic learns from sampled prompts alone, and "
            "search.fraction 1 leaves none; lower search.fraction, or set objective.policy.estimator to another "
            "than gae and objective.value.weight to 0"
        )


@of_stage("online")
def critic_warmup_ends(config: Config) -> None:
    """Raise if the warm-up of the critic lasts for the whole online stage."""
    warmup, steps = config.objective.value.warmup_steps, config.train.max_steps
    if warmup >= steps:
        raise ValueError(
            f"objective.value.warmup_steps {warmup} leaves the policy no step of stage "
            f"online: expected fewer than train.max_steps, {steps}"
        )


@of_stage("online")
def online_trains_in_every_step(config: Config) -> None:
    """Raise if a step of the online stage has no term with a weight."""
    _check_every_step(config, "online")


@of_stage("online")
def online_has_pairs(config: Config) -> None:
    """Raise if a term of the online stage needs preference pairs and gets none."""
    term = term_with_pairs(config.objective)
    if term is None:
        return
    pairs, from_file = config.objective.preference.pairs, config.objective.preference.source == "file"
    if not from_file and not config.search.online:
        two_runs = ", or train the stage online in a run of its own" if "preference" in config.stages else ""
        raise ValueError(
            f"{term} has no pairs in stage online: set search.fraction above 0, or objective.preference.source to file"
            f"{two_runs}"
        )
    extracted = config.extract.chosen != "none" if pairs == "chains" else config.extract.step_preferences
    if not from_file and not extracted:
        field = "chosen" if pairs == "chains" else "step_preferences"
        raise ValueError(f"{term} has no pairs in stage online: extract.{field} leaves them out")
    if from_file and not config.preference.path and "search" not in _before(config, "online"):
        raise ValueError("objective.preference.source file needs preference.path, or a stage search before")


@of_stage("online")
def preference_file_is_read(config: Config) -> None:
    """Raise if a run that trains on preference pairs never reads the file it names."""
    unread = config.objective.preference.source != "file" and "preference" not in config.stages
    if term_with_pairs(config.objective) and config.preference.path and unread:
        raise ValueError(
            "preference.path is never read: stage online takes its pairs from the trees of the step; set "
            "objective.preference.source to file, or leave preference.path out"
        )


@of_stage("online")
def sft_has_trees(config: Config) -> None:
    """Raise if the SFT term of the online stage needs chains of trees and gets none."""
    sft = config.objective.sft
    extracted = config.search.online and config.extract.supervised != "none"
    if sft.used and sft.source == "trees" and not extracted:
        raise ValueError("objective.sft.source trees needs search.fraction above 0 and extract.supervised")


def search_is_not_last(config: Config) -> None:
    """Raise if the stage `search` is the last one."""
    if not stage_plans(config)[-1].trains:
        raise ValueError("stage search trains nothing: let another follow, or use `rlsys search`")


def offline_stages_have_data(config: Config) -> None:
    """Raise if an offline stage has neither a file nor an earlier stage `search`."""
    for plan in stage_plans(config):
        if plan.loop == "offline" and plan.reads_extracted and "search" not in _before(config, plan.name):
            name = plan.name
            raise ValueError(f"stage {name} has no data: set {plan.section}.path, or put the stage search before it")


@of_stage("search")
def search_is_read(config: Config) -> None:
    """Raise if no stage after `search` reads the extracted data."""
    after = stage_plans(config)[config.stages.index("search") + 1 :]
    if not any(plan.source("rows") or plan.source("pairs") for plan in after):
        raise ValueError(
            "stage search extracts what no stage after it reads: let sft, preference, or online with "
            "objective.preference.source file follow, or take search out of stages"
        )


@of_stage("preference")
def preference_has_a_term(config: Config) -> None:
    """Raise if no term of the stage `preference` has a weight."""
    objective = config.objective
    if not (objective.preference.used or objective.sft.used):
        raise ValueError("stage preference: objective.preference.weight and objective.sft.weight are 0; raise one")


@of_stage("preference")
def preference_trains_in_every_step(config: Config) -> None:
    """Raise if a step of the stage `preference` has no term with a weight."""
    _check_every_step(config, "preference")


def model_reaches_context(config: Config) -> None:
    """Raise if a model built from scratch has fewer positions than the engines use."""
    scratch = config.model.from_scratch
    if scratch and scratch.max_positions < config.actors.max_model_len:
        raise ValueError(
            f"actors.max_model_len {config.actors.max_model_len} exceeds "
            f"model.from_scratch.max_positions {scratch.max_positions}"
        )


def patterns_are_searchable(config: Config) -> None:
    """Raise if a transition table of the search cannot be searched."""
    try:
        resolve(config.search)
    except ConfigError as error:
        raise ValueError(str(error)) from None


def steps_can_be_checked(config: Config) -> None:
    """Raise if the task has no rules for the steps that the search is to check."""
    if isinstance(config.search.value, StepsValueConfig) and config.task.type in WITHOUT_STEPS:
        raise ValueError(
            f"search.value {{type: steps}}: a task of type {config.task.type} has no rules for steps; choose another "
            "type"
        )


RULES: tuple[Rule, ...] = (
    distillation_has_a_teacher,
    distilled_rows_have_a_source,
    divergence_has_its_keys,
    whole_teacher_fits,
    teacher_scores_what_was_sampled,
    completion_leaves_room_for_prompt,
    batch_holds_sequences,
    tensor_parallel_needs_cuda,
    colocated_fit,
    adapter_has_no_critic,
    adapter_stays_on_its_device,
    deadlines_are_nested,
    offload_needs_zero,
    bf16_needs_zero,
    sequence_parallel_divides,
    search_samples_like_training,
    overlong_buffer_fits_completion,
    searched_groups_train_by_token,
    unsolved_prompts_are_told,
    backtracking_has_its_keys,
    tree_advantages_have_trees,
    estimates_have_a_source,
    ratios_begin_at_one,
    kl_loss_has_a_gradient,
    online_has_a_term,
    sampled_prompts_train_the_policy,
    critic_has_sampled_prompts,
    critic_warmup_ends,
    online_trains_in_every_step,
    online_has_pairs,
    preference_file_is_read,
    sft_has_trees,
    masked_chains_are_rows,
    search_is_not_last,
    offline_stages_have_data,
    search_is_read,
    preference_has_a_term,
    preference_trains_in_every_step,
    model_reaches_context,
    patterns_are_searchable,
    steps_can_be_checked,
    answers_are_judged,
    extracted_nodes_exist,
    divergence_has_scores,
    environment_is_named,
    turns_can_end,
    searched_turns_have_replies,
)
"""All rules, in the order in which they are checked. The first one that is broken is reported."""


def _before(config: Config, stage: StageName) -> tuple[StageName, ...]:
    return config.stages[: config.stages.index(stage)]


def _check_every_step(config: Config, stage: StageName) -> None:
    """Raise if a step has no weight above 0. Weights are linear, so the last and the first step decide."""
    last, objective = stage_plan(config, stage).steps - 1, config.objective
    terms = [name for name in TERMS_OF_STAGE[stage] if name != "kl"]  # a KL term only goes with a policy term
    for step, end, field in ((last, "last", "final_weight"), (0, "first", "weight")):
        trained = [name for name in terms if name != "policy" or step >= objective.value.warmup_steps]
        if not any(getattr(objective, name).weight_at(step, last + 1) > 0 for name in trained):
            names = ", ".join(f"objective.{name}" for name in trained)
            raise ValueError(f"stage {stage}: nothing is trained in its {end} step: raise {field} of one of {names}")
