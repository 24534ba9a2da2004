"""The rules across sections: each refuses its mistakes, and accepts configs that only look like them."""

from __future__ import annotations

import pytest
from minimal_config import minimal_with
from refused_environments import SEARCHED_ACCEPTED, SEARCHED_REFUSED
from refused_teachers import TEACHER, TEACHER_REFUSED

from rlsys.config.checks import RULES
from rlsys.errors import ConfigError

SEARCHED = ["search.fraction=0.5"]
ALL_SEARCHED = ["search.fraction=1.0"]
PAIRS = ["objective.preference.weight=1.0"]
FILE_PAIRS = [*PAIRS, "objective.preference.source=file"]
DEMONSTRATIONS = ["objective.policy.weight=0", "objective.sft={weight: 1.0, source: demonstrations}"]
GAE = ["objective.policy.estimator=gae", "objective.value.weight=0.5"]
STEPS = "search.value={type: steps}"
TREES = ["objective.sft={weight: 1.0, source: trees}"]
FALLING = ["objective.policy.final_weight=0"]
RISING = ["objective.policy={weight: 0, final_weight: 1.0}"]

# The mistakes that each rule refuses, as overrides of the minimal config, and a part of the message.
REFUSED: dict[str, list[tuple[list[str], str]]] = {
    **TEACHER_REFUSED,
    "completion_leaves_room_for_prompt": [
        (
            ["sampling.max_tokens=256"],
            "sampling.max_tokens 256 leaves no room for a prompt in actors.max_model_len 256",
        ),
    ],
    "batch_holds_sequences": [
        (["actors.max_num_seqs=8193"], "actors.max_num_seqs 8193 exceeds the 8192 tokens of a batch"),
        (
            ["search.reviewer={path: r, max_model_len: 9000, max_num_seqs: 9001}"],
            "search.reviewer.max_num_seqs 9001 exceeds the 9000 tokens of a batch",
        ),
        ([*TEACHER, "teacher.model.max_num_seqs=8193"], "teacher.model.max_num_seqs 8193 exceeds the 8192 tokens"),
    ],
    "tensor_parallel_needs_cuda": [
        (["actors.tensor_parallel_size=2"], "actors.tensor_parallel_size above 1 needs run.device: cuda"),
    ],
    "colocated_fit": [
        (
            ["placement=colocated", "actors.count=3", "learner.ranks=2"],
            "expected actors.count = learner.ranks, found 3 and 2",
        ),
        (["placement=colocated", "train.max_staleness=1"], "expected train.max_staleness 0, found 1"),
        (
            ["placement=colocated", "run.device=cuda", "actors.tensor_parallel_size=2"],
            "expected actors.tensor_parallel_size 1, found 2",
        ),
        (
            ["placement=colocated", "weight_sync.transport=collective"],
            "expected weight_sync.transport object_store, found collective",
        ),
        (
            ["placement=colocated", "run.device=cuda", "learner.zero_stage=0"],
            "expected learner.zero_stage 1, 2 or 3",
        ),
    ],
    "adapter_has_no_critic": [
        (["model.lora={}", *GAE], "model.lora cannot be combined with a critic"),
    ],
    "adapter_stays_on_its_device": [
        (
            ["model.lora={}", "placement=colocated", "run.device=cuda"],
            "model.lora cannot be combined with placement colocated on run.device cuda: choose placement spread",
        ),
    ],
    "deadlines_are_nested": [
        (["rewards.timeout_s=200"], "rewards.timeout_s 200 exceeds actors.hang_timeout_s 120"),
        (["actors.rollout_timeout_s=60"], "actors.hang_timeout_s 120 exceeds actors.rollout_timeout_s 60"),
        (["learner.timeout_s=60"], "learner.hang_timeout_s 300 exceeds learner.timeout_s 60"),
    ],
    "offload_needs_zero": [
        (
            ["learner={optimizer_offload: true, zero_stage: 0}"],
            "learner.optimizer_offload needs learner.zero_stage 1, 2 or 3",
        ),
    ],
    "bf16_needs_zero": [
        (["learner={dtype: bf16, zero_stage: 0}"], "learner.dtype bf16 needs learner.zero_stage 1, 2 or 3"),
    ],
    "sequence_parallel_divides": [
        (
            ["learner={ranks: 3, sequence_parallel: 2}"],
            "learner.ranks 3 must be a multiple of learner.sequence_parallel 2",
        ),
        (
            ["learner={ranks: 3, sequence_parallel: 3}", "model={path: null, from_scratch: {heads: 4}}"],
            "model.from_scratch.heads 4 must be a multiple of learner.sequence_parallel 3",
        ),
    ],
    "search_samples_like_training": [
        (
            [*SEARCHED, f"sampling.{name}=0.5", f"search.{name}=0.7"],
            f"search.{name} 0.7 differs from sampling.{name} 0.5",
        )
        for name in ("temperature", "top_p")
    ],
    "overlong_buffer_fits_completion": [
        (
            ["objective.policy.overlong_buffer=17", "sampling.max_tokens=16"],
            "objective.policy.overlong_buffer 17 exceeds sampling.max_tokens 16",
        ),
    ],
    "searched_groups_train_by_token": [
        (
            ["search.fraction=0.25", "objective.policy.aggregation=sequence_mean"],
            "search.unsolved) needs objective.policy.aggregation token_mean, found sequence_mean",
        ),
        (
            [*SEARCHED, "objective.policy.surrogate=gspo"],
            "search.unsolved) needs objective.policy.surrogate clip, found gspo",
        ),
        (
            [*SEARCHED, "objective.kl={weight: 0.1, in_reward: true}"],
            "search.unsolved) needs objective.kl.in_reward False, found True",
        ),
    ],
    "unsolved_prompts_are_told": [
        (
            ["search.unsolved=true"],
            "search.unsolved has no effect: it needs train.dynamic_sampling_rounds of at least 1",
        ),
    ],
    "backtracking_has_its_keys": [
        (
            ["search={backtracking: false, backtrack_to: surprise}"],
            "search.backtrack_to surprise has no effect: set search.backtracking to true",
        ),
        (["search={backtracking: false, max_backtracks: 3}"], "search.max_backtracks 3 has no effect"),
    ],
    "tree_advantages_have_trees": [
        (["objective.policy.tree_std=false"], "objective.policy.tree_std has no effect on sampled groups"),
    ],
    "estimates_have_a_source": [
        (["extract.step_value=estimate"], "extract.step_value estimate needs search.value of type steps, rollouts"),
        (
            [
                "extract.step_value=estimate",
                "search={value: {type: agreement}, backtracking: false, stop: {correct: []}}",
            ],
            "extract.step_value estimate needs search.value",
        ),
    ],
    "ratios_begin_at_one": [
        (
            ["sampling.top_p=0.95", "objective.policy.decoupled=false"],
            "objective.policy.decoupled false needs sampling.top_p 1, found 0.95",
        ),
    ],
    "kl_loss_has_a_gradient": [
        (
            ["objective.kl={weight: 0.1, estimator: k1}"],
            "objective.kl.estimator k1 has an expected gradient of 0 as a loss",
        ),
        (["objective.kl={final_weight: 0.1, estimator: k1}"], "set objective.kl.estimator to k2 or k3"),
    ],
    "online_has_a_term": [
        (["objective.policy.weight=0"], "objective.distill and objective.ranking are all 0; raise one"),
    ],
    "sampled_prompts_train_the_policy": [
        (
            DEMONSTRATIONS,
            "objective.policy.weight 0: the sampled prompts of stage online would train nothing; set search.fraction "
            "to 1 (now 0)",
        ),
        ([*PAIRS, *SEARCHED, "objective.policy.weight=0"], "set search.fraction to 1 (now 0.5)"),
    ],
    "critic_has_sampled_prompts": [
        (
            [*GAE, *ALL_SEARCHED],
            "objective.value.weight has no effect: the critic learns from sampled prompts alone, and search.fraction 1 "
            "leaves none; lower search.fraction",
        ),
    ],
    "critic_warmup_ends": [
        (
            [*GAE, "objective.value.warmup_steps=5", "train.max_steps=5"],
            "objective.value.warmup_steps 5 leaves the policy no step of stage online: expected fewer than "
            "train.max_steps, 5",
        ),
    ],
    "online_trains_in_every_step": [
        (
            FALLING,
            "stage online: nothing is trained in its last step: raise final_weight of one of objective.policy, "
            "objective.value, objective.preference, objective.sft",
        ),
        ([*FALLING, "train.max_steps=1"], "nothing is trained in its last step"),
        (RISING, "stage online: nothing is trained in its first step: raise weight of one of objective.policy, "),
        (
            [*GAE, "objective.value={weight: 0, final_weight: 0.5, warmup_steps: 1}"],
            "nothing is trained in its first step: raise weight of one of objective.value, objective.preference",
        ),
    ],
    "online_has_pairs": [
        (PAIRS, "objective.preference.weight has no pairs in stage online: set search.fraction above 0"),
        (
            ["objective.sft.weight=1.0"],
            "objective.sft.weight with source chosen has no pairs in stage online: set search.fraction above 0",
        ),
        ([*PAIRS, *SEARCHED, "extract.chosen=none"], "extract.chosen leaves them out"),
        (
            [*PAIRS, *SEARCHED, "objective.preference.pairs=steps", "extract.step_preferences=false"],
            "extract.step_preferences leaves them out",
        ),
        (FILE_PAIRS, "objective.preference.source file needs preference.path, or a stage search before"),
    ],
    "preference_file_is_read": [
        (
            [*PAIRS, *SEARCHED, "preference.path=p"],
            "preference.path is never read: stage online takes its pairs from the trees of the step; set "
            "objective.preference.source to file",
        ),
        (["objective.sft.weight=1.0", *SEARCHED, "preference.path=p"], "preference.path is never read"),
    ],
    "sft_has_trees": [
        (TREES, "objective.sft.source trees needs search.fraction above 0 and extract.supervised"),
        (
            [*TREES, *SEARCHED, "extract.supervised=none"],
            "objective.sft.source trees needs search.fraction above 0 and extract.supervised",
        ),
    ],
    "masked_chains_are_rows": [
        (["objective.sft.mask_share=0.4", "stages=[online]"], "mask_share has no effect: the sides of pairs are never"),
        (
            [*SEARCHED, *PAIRS, "objective.sft={weight: 1, source: chosen, mask_share: 0.4}", "stages=[online]"],
            "use objective.sft.source trees, demonstrations or file",
        ),
    ],
    "search_is_not_last": [(["stages=[online, search]"], "stage search trains nothing: let another follow")],
    "offline_stages_have_data": [
        (["stages=[sft]"], "stage sft has no data: set sft.path, or put the stage search before it"),
        ([*PAIRS, "stages=[preference]"], "stage preference has no data: set preference.path"),
        (
            [*PAIRS, *SEARCHED, "stages=[preference, search, online]"],
            "stage preference has no data: set preference.path",
        ),
    ],
    "search_is_read": [
        (["stages=[search, online]"], "stage search extracts what no stage after it reads"),
        ([*PAIRS, *SEARCHED, "stages=[search, online]"], "stage search extracts what no stage after it reads"),
        (
            ["objective.preference.source=file", "stages=[search, warm_start, online]"],  # of weight 0
            "stage search extracts what no stage after it reads",
        ),
    ],
    "preference_has_a_term": [
        (
            ["stages=[preference]", "preference.path=p"],
            "stage preference: objective.preference.weight and objective.sft.weight are 0; raise one",
        ),
    ],
    "preference_trains_in_every_step": [
        (
            ["objective.preference={weight: 1.0, final_weight: 0}", "stages=[preference]", "preference.path=p"],
            "stage preference: nothing is trained in its last step: raise final_weight of one of objective.preference, "
            "objective.sft",
        ),
    ],
    "model_reaches_context": [
        (
            ["model={path: null, from_scratch: {max_positions: 128}}"],
            "actors.max_model_len 256 exceeds model.from_scratch.max_positions 128",
        ),
    ],
    "patterns_are_searchable": [(["search.patterns=[z]"], "search.patterns: unknown table 'z'")],
    "steps_can_be_checked": [
        ([STEPS, "task={type: dataset, path: x}"], "type dataset has no rules for steps"),
        ([STEPS, "task={type: benchmark, name: gsm8k}"], "type benchmark has no rules for steps"),
    ],
    "answers_are_judged": [
        (
            ["task={type: dataset, path: x, answer_column: null}"],
            "task.answer_column null: nothing judges the completions; name functions in rewards.functions",
        ),
    ],
    "extracted_nodes_exist": [
        (["extract.skip=[doublecheck]"], "extract.skip: unknown node type 'doublecheck'; search.patterns"),
        (["extract.supervised_nodes=[plan]"], "extract.supervised_nodes: unknown node type 'plan'"),
    ],
    "divergence_has_scores": [
        (
            ["extract.supervised=divergence", "stages=[search, sft]"],
            "extract.supervised divergence is for `rlsys extract` after `rlsys score`",
        ),
        (["extract.supervised=divergence", *TREES, *SEARCHED], "no stage scores its chains: choose another rule"),
        (["extract.supervised=divergence", *SEARCHED], "no stage scores its chains"),
    ],
    "environment_is_named": [
        (["environment.max_turns=3"], "the section environment has no effect: set environment.fn")
    ],
    "turns_can_end": [
        (["environment.fn=game.py:Game"], "the strings after which game.py:Game answers, found none"),
        (["environment={fn: calculator, stop: [</calc>]}"], "calculator answers after </tool> alone, found </calc>"),
        (["task={type: guess}", "environment.stop=[x]"], "guess answers after </guess> alone, found x"),
        (
            ["environment={fn: calculator, stop: [x], role: user}"],
            "environment.stop has no effect with environment.role",
        ),
    ],
    "searched_turns_have_replies": SEARCHED_REFUSED,
}

ACCEPTED: list[list[str]] = [
    *SEARCHED_ACCEPTED,
    ["sampling.max_tokens=255"],
    ["model.lora={}", "placement=colocated"],
    ["model.lora={target_modules: [self_attn.q_proj]}", *GAE, "stages=[warm_start]"],
    ["actors.tensor_parallel_size=2", "run.device=cuda"],
    ["rewards.timeout_s=120"],
    ["learner={optimizer_offload: true, dtype: bf16, zero_stage: 1}"],
    ["learner={ranks: 4, sequence_parallel: 2}", "model={path: null, from_scratch: {heads: 4}}"],
    ["model={from_scratch: {max_positions: 256}}"],
    # Trees are sampled at the temperature of training, unless another model writes them.
    *(
        [f"sampling.{name}=0.5", *overrides]
        for name in ("temperature", "top_p")
        for overrides in (
            SEARCHED,
            [*SEARCHED, f"search.{name}=0.5"],
            [f"search.{name}=0.7"],
            [*SEARCHED, f"search.{name}=0.7", "search.model.path=large"],
        )
    ),
    ["objective.policy.tree_std=false", *SEARCHED],
    ["objective.sft.curiosity=1", "stages=[online]"],  # a part of a recipe whose stage before had the term
    ["objective.policy.overlong_buffer=16", "sampling.max_tokens=16"],
    ["objective.policy.aggregation=sequence_mean"],
    ["objective.policy.surrogate=cispo", *SEARCHED],
    GAE,
    [*GAE, "objective.value.warmup_steps=3"],
    [*GAE, "objective.value.warmup_steps=4", "train.max_steps=5"],
    [*GAE, "search.fraction=0.75"],
    [*RISING, "train.max_steps=1"],  # the only step is the last
    [*RISING, "objective.sft={weight: 1.0, final_weight: 0, source: demonstrations}"],
    [*PAIRS, *SEARCHED],
    [*PAIRS, *ALL_SEARCHED, "objective.policy.weight=0"],
    ["objective.kl={final_weight: 0.1, in_reward: true}"],
    ["objective.kl={weight: 0.1, estimator: k1, in_reward: true}"],
    ["objective.kl.estimator=k1"],  # the term has no weight
    ["sampling.top_p=0.95"],
    ["objective.policy.decoupled=false"],
    ["sampling.top_p=0.95", "objective.policy.decoupled=false", "stages=[warm_start]"],
    [*FILE_PAIRS, "preference.path=p"],
    [*FILE_PAIRS, "stages=[search, online]"],
    # The rules of the online stage do not apply to a run without it.
    [*FALLING, "stages=[warm_start]"],
    [*GAE, "objective.value.warmup_steps=99", "train.max_steps=5", "stages=[warm_start]"],
    [*GAE, *ALL_SEARCHED, "stages=[warm_start]"],
    [*PAIRS, "stages=[search, preference]"],
    ["environment={fn: 'game.py:Game', stop: [</move>]}"],
    ["environment={fn: 'game.py:Game', role: user}"],
    ["task={type: guess}", "environment.max_turns=3"],
    ["task={type: sums, tool_share: 0.5}", "environment.max_turns=3"],
    ["environment.fn=calculator", "search.fraction=0.5", "stages=[warm_start]"],
    # A part of a longer recipe, with the settings of its other stages.
    [*PAIRS, "stages=[warm_start]", "preference.path=p", "sft.path=p"],
    [*SEARCHED, "preference.path=p"],
    ["search.unsolved=true", "stages=[warm_start]"],
    # A run that continues with files instead of the extracted data.
    [*PAIRS, "stages=[search, sft, preference]", "preference.path=p", "sft.path=p"],
    [*PAIRS, *SEARCHED, "stages=[preference, online]", "preference.path=p"],
]


@pytest.mark.parametrize(
    ("rule", "overrides", "message"),
    [pytest.param(rule, *case, id=f"{rule}-{n}") for rule, cases in REFUSED.items() for n, case in enumerate(cases)],
)
def test_a_rule_refuses_its_mistakes_by_name(
    rule: str, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as all_rules:
        minimal_with(overrides)
    assert message in all_rules.value.message
    assert "\n" not in all_rules.value.message
    monkeypatch.setattr("rlsys.config.schema.RULES", [each for each in RULES if each.__name__ == rule])
    with pytest.raises(ConfigError) as this_rule:
        minimal_with(overrides)
    assert this_rule.value.message == all_rules.value.message


@pytest.mark.parametrize("overrides", ACCEPTED, ids=" ".join)
def test_what_only_looks_like_a_mistake_is_accepted(overrides: list[str]) -> None:
    minimal_with(overrides)


def test_every_rule_has_a_case() -> None:
    assert list(REFUSED) == [rule.__name__ for rule in RULES]
