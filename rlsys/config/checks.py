"""Check the rules that involve several sections of a config, one function for each rule.

A rule raises ValueError with one line that names the fields. `Config` applies `RULES` in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rlsys.config.patterns import resolve
from rlsys.errors import ConfigError
from rlsys.types import StageName

if TYPE_CHECKING:
    from rlsys.config.schema import Config


def stages_are_distinct(config: Config) -> None:
    """Raise if a stage is named twice."""
    if len(set(config.stages)) != len(config.stages):
        raise ValueError("stages names a stage twice")


def completion_leaves_room_for_prompt(config: Config) -> None:
    """Raise if the longest completion alone fills the context of an engine."""
    if config.sampling.max_tokens >= config.actors.max_model_len:
        raise ValueError(
            f"sampling.max_tokens {config.sampling.max_tokens} leaves no room for a prompt "
            f"in actors.max_model_len {config.actors.max_model_len}"
        )


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


def search_samples_like_training(config: Config) -> None:
    """Raise if the policy writes trees under another distribution than the learner assumes."""
    if not config.search.fraction or config.search.model is not None:
        return
    for name in ("temperature", "top_p"):
        searched, sampled = getattr(config.search, name), getattr(config.sampling, name)
        if searched not in (None, sampled):
            raise ValueError(
                f"search.{name} {searched} differs from sampling.{name} {sampled}, at which the learner trains "
                f"what the policy writes (search.fraction above 0): leave search.{name} out or make them equal"
            )


def overlong_buffer_fits_completion(config: Config) -> None:
    """Raise if the overlong buffer is longer than a completion."""
    buffer, limit = config.objective.policy.overlong_buffer, config.sampling.max_tokens
    if buffer > limit:
        raise ValueError(f"objective.policy.overlong_buffer {buffer} exceeds sampling.max_tokens {limit}")


def searched_groups_train_by_token(config: Config) -> None:
    """Raise if the policy loss averages over sequences although groups come from trees.

    The rows of a searched group share prefixes, and each row trains only the tokens that earlier rows do not train. So
    a row is not a whole sequence.
    """
    policy = config.objective.policy
    if not (config.search.fraction and policy.used):
        return
    for name, value, expected in (
        ("policy.aggregation", policy.aggregation, "token_mean"),
        ("policy.surrogate", policy.surrogate if policy.surrogate == "gspo" else "clip", "clip"),
        ("kl.in_reward", config.objective.kl.in_reward, False),
    ):
        if value != expected:
            raise ValueError(
                f"search.fraction {config.search.fraction:g} needs objective.{name} {expected}, found {value}"
            )


def online_has_a_term(config: Config) -> None:
    """Raise if no term of the online stage has a weight."""
    objective = config.objective
    if "online" in config.stages and not (objective.policy.used or objective.preference.used or objective.sft.used):
        raise ValueError(
            "stage online: the weights of objective.policy, objective.preference and objective.sft are all 0; raise one"
        )


def sampled_prompts_train_the_policy(config: Config) -> None:
    """Raise if online prompts are sampled although only the policy term trains on them."""
    if "online" in config.stages and not config.objective.policy.used and config.search.fraction < 1:
        raise ValueError(
            "objective.policy.weight 0: the sampled prompts of stage online would train nothing; set "
            f"search.fraction to 1 (now {config.search.fraction:g}), or use the stages warm_start, sft or preference"
        )


def critic_has_sampled_prompts(config: Config) -> None:
    """Raise if a critic has no sampled prompts to learn from."""
    if "online" in config.stages and config.objective.value.used and config.search.fraction == 1:
        raise ValueError(
            "objective.value.weight has no effect: the critic learns from sampled prompts alone, and "
            "search.fraction 1 leaves none; lower search.fraction, or set objective.policy.estimator to another "
            "than gae and objective.value.weight to 0"
        )


def critic_warmup_ends(config: Config) -> None:
    """Raise if the warm-up of the critic lasts for the whole online stage."""
    warmup, steps = config.objective.value.warmup_steps, config.train.max_steps
    if "online" in config.stages and warmup >= steps:
        raise ValueError(
            f"objective.value.warmup_steps {warmup} leaves the policy no step of stage "
            f"online: expected fewer than train.max_steps, {steps}"
        )


def online_trains_in_every_step(config: Config) -> None:
    """Raise if a step of the online stage has no term with a weight."""
    if "online" in config.stages:
        _check_every_step(config, "online", ("policy", "value", "preference", "sft"))


def online_has_pairs(config: Config) -> None:
    """Raise if a term of the online stage needs preference pairs and gets none."""
    term = _term_with_pairs(config)
    if term is None:
        return
    pairs, from_file = config.objective.preference.pairs, config.objective.preference.source == "file"
    if not from_file and not config.search.fraction:
        raise ValueError(
            f"{term} has no pairs in stage online: set search.fraction above 0, or objective.preference.source to file"
        )
    extracted = config.extract.chosen != "none" if pairs == "chains" else config.extract.step_preferences
    if not from_file and not extracted:
        field = "chosen" if pairs == "chains" else "step_preferences"
        raise ValueError(f"{term} has no pairs in stage online: extract.{field} leaves them out")
    if from_file and not config.preference.path and "search" not in _before(config, "online"):
        raise ValueError("objective.preference.source file needs preference.path, or a stage search before")


def preference_file_is_read(config: Config) -> None:
    """Raise if a run that trains on preference pairs never reads the file it names."""
    from_file = config.objective.preference.source == "file"
    if _term_with_pairs(config) and not from_file and config.preference.path and "preference" not in config.stages:
        raise ValueError(
            "preference.path is never read: stage online takes its pairs from the trees of the step; set "
            "objective.preference.source to file, or leave preference.path out"
        )


def sft_has_trees(config: Config) -> None:
    """Raise if the SFT term of the online stage needs chains of trees and gets none."""
    sft = config.objective.sft
    extracted = config.search.fraction > 0 and config.extract.supervised != "none"
    if "online" in config.stages and sft.used and sft.source == "trees" and not extracted:
        raise ValueError("objective.sft.source trees needs search.fraction above 0 and extract.supervised")


def search_is_not_last(config: Config) -> None:
    """Raise if the stage `search` is the last one."""
    if config.stages[-1] == "search":
        raise ValueError("stage search trains nothing: let another follow, or use `rlsys search`")


def offline_stages_have_data(config: Config) -> None:
    """Raise if the stage `sft` or `preference` has neither a file nor an earlier stage `search`."""
    for stage in ("sft", "preference"):
        if stage in config.stages and not getattr(config, stage).path and "search" not in _before(config, stage):
            raise ValueError(f"stage {stage} has no data: set {stage}.path, or put the stage search before it")


def search_is_read(config: Config) -> None:
    """Raise if no stage after `search` reads the extracted data."""
    if "search" not in config.stages:
        return
    after = config.stages[config.stages.index("search") + 1 :]
    if not any(s in ("sft", "preference") or (s == "online" and config.pairs_online) for s in after):
        raise ValueError(
            "stage search extracts what no stage after it reads: let sft, preference, or online with "
            "objective.preference.source file follow, or take search out of stages"
        )


def preference_has_a_term(config: Config) -> None:
    """Raise if no term of the stage `preference` has a weight."""
    objective = config.objective
    if "preference" in config.stages and not (objective.preference.used or objective.sft.used):
        raise ValueError("stage preference: objective.preference.weight and objective.sft.weight are 0; raise one")


def preference_trains_in_every_step(config: Config) -> None:
    """Raise if a step of the stage `preference` has no term with a weight."""
    if "preference" in config.stages:
        _check_every_step(config, "preference", ("preference", "sft"))


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


RULES: tuple[Callable[[Config], None], ...] = (
    stages_are_distinct,
    completion_leaves_room_for_prompt,
    tensor_parallel_needs_cuda,
    deadlines_are_nested,
    offload_needs_zero,
    bf16_needs_zero,
    search_samples_like_training,
    overlong_buffer_fits_completion,
    searched_groups_train_by_token,
    online_has_a_term,
    sampled_prompts_train_the_policy,
    critic_has_sampled_prompts,
    critic_warmup_ends,
    online_trains_in_every_step,
    online_has_pairs,
    preference_file_is_read,
    sft_has_trees,
    search_is_not_last,
    offline_stages_have_data,
    search_is_read,
    preference_has_a_term,
    preference_trains_in_every_step,
    model_reaches_context,
    patterns_are_searchable,
)
"""All rules, in the order in which they are checked. The first one that is broken is reported."""


def _before(config: Config, stage: StageName) -> tuple[StageName, ...]:
    return config.stages[: config.stages.index(stage)]


def _term_with_pairs(config: Config) -> str | None:
    """Return the term of the online stage that trains on preference pairs, or None."""
    preference, sft = config.objective.preference, config.objective.sft
    if "online" not in config.stages:
        return None
    if preference.used:
        return "objective.preference.weight"
    return "objective.sft.weight with source chosen" if sft.used and sft.source == "chosen" else None


def _check_every_step(config: Config, stage: StageName, terms: tuple[str, ...]) -> None:
    """Raise if a step has no weight above 0. Weights are linear, so the last and the first step decide."""
    last, objective = config.max_steps(stage) - 1, config.objective
    for step, end, field in ((last, "last", "final_weight"), (0, "first", "weight")):
        trained = [name for name in terms if name != "policy" or step >= objective.value.warmup_steps]
        if not any(getattr(objective, name).weight_at(step, last + 1) > 0 for name in trained):
            names = ", ".join(f"objective.{name}" for name in trained)
            raise ValueError(f"stage {stage}: nothing is trained in its {end} step: raise {field} of one of {names}")
