"""Every config field is classified as fixed or free in a resume, and every change of a fixed field is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from resumable_runs import config, save, start

from rlsys.config.files import FIXED_FIELDS, flat_fields, parse_config, select_fields
from rlsys.config.keys import all_keys
from rlsys.errors import ConfigError

# Fields that a resume must not change, each with another value, by the config that they need.
FIXED: dict[str, dict[str, Any]] = {
    "letter_count": {
        "run.seed": 4,
        "stages": ["online"],
        "learner.dtype": "bf16",
        "task.form": "words",
        "task.demonstrations.min_length": 4,
        "task.demonstrations.max_length": 8,
        "task.min_length": 4,
        "task.max_length": 10,
        "task.alphabet": "abc",
        "task.chunk": 2,
        "task.error_rate": 0.2,
        "task.miscounts": "extra",
        "task.questions_path": "questions.json",
        **{
            f"task.shares.{name}": 0.9 for name in ("sub_task", "hypothesis", "double_check", "reflection", "reclarify")
        },
        "model.path": "other/model",
    },
    "from_scratch": {
        "model.from_scratch.hidden_size": 256,
        "model.from_scratch.layers": 2,
        "model.from_scratch.heads": 2,
        "model.from_scratch.intermediate_size": 128,
        "model.from_scratch.tie_embeddings": False,
        "model.from_scratch.max_positions": 1024,
    },
    "lora": {
        "model.lora.rank": 8,
        "model.lora.alpha": 8.0,
        "model.lora.target_modules": ["q_proj", "v_proj"],
        "model.lora.merge": True,
    },
    "blocksworld": {
        "task.demonstrations.min_blocks": 3,
        "task.demonstrations.max_blocks": 3,
        "task.min_blocks": 4,
        "task.max_blocks": 5,
        "task.alphabet": "abcdefg",
        "task.moves_per_node": 1,
        "task.error_rate": 0.3,
        "task.problems_path": "problems.jsonl",
        **{
            f"task.shares.{name}": 0.9 for name in ("sub_task", "hypothesis", "double_check", "reflection", "reclarify")
        },
    },
    "countdown": {
        "task.demonstrations.min_numbers": 3,
        "task.demonstrations.max_numbers": 5,
        "task.demonstrations.max_number": 8,
        "task.demonstrations.min_target": 8,
        "task.min_numbers": 3,
        "task.max_numbers": 5,
        "task.max_number": 12,
        "task.min_target": 10,
        "task.max_result": 200,
        "task.greedy_rate": 0.5,
        **{
            f"task.shares.{name}": 0.9 for name in ("sub_task", "hypothesis", "double_check", "reflection", "reclarify")
        },
    },
    "sums": {
        "task.demonstrations.min_terms": 2,
        "task.demonstrations.max_terms": 3,
        "task.demonstrations.min_digits": 1,
        "task.demonstrations.max_digits": 3,
        "task.min_terms": 3,
        "task.max_terms": 5,
        "task.min_digits": 1,
        "task.max_digits": 3,
        "task.error_rate": 0.3,
        "task.tool_share": 0.5,
        **{
            f"task.shares.{name}": 0.9 for name in ("sub_task", "hypothesis", "double_check", "reflection", "reclarify")
        },
    },
    "guess": {
        "task.demonstrations.max_width": 30,
        "task.digits": 3,
        "task.min_width": 30,
        "task.max_width": 50,
        "task.max_guesses": 6,
        "task.error_rate": 0.3,
        "environment.fn": "game.py:Game",
        "environment.stop": ["</guess>", "</move>"],
    },
    "messages": {"environment.role": "user"},
    "dataset": {
        "task.path": "other.jsonl",
        "task.held_out_path": "held.jsonl",
        "task.held_out_every": 7,
        "task.split": "all",
        "task.held_out_split": "validation",
        "task.subset": "main",
        "task.question_column": "q",
        "task.answer_column": "a",
        "task.answer_pattern": "#(.*)",
        "task.demonstration_column": "d",
        "task.prompt_template": "Q: {question}",
        "task.max_bad_rows": 0.5,
        "task.strictness": "text",
        "task.relative_tolerance": 0.01,
        "task.accept_cut_off": True,
        "task.system_prompt": "Be brief.",
    },
    "benchmark": {
        "task.name": "math500",
        "task.path": "other.jsonl",
        "task.train_path": "train.jsonl",
        "task.prompt_template": "Q: {question}",
        "task.system_prompt": "Be brief.",
        "task.accept_cut_off": True,
    },
    "reasoning_gym": {
        "task.datasets.NAME.weight": 2.0,
        "task.datasets.NAME.arguments.size_of_it": 4,
        "task.size": 10,
        "task.held_out_size": 10,
        "task.seed": 3,
        "task.prompt_template": "Q: {question}",
        "task.system_prompt": "Be brief.",
        "task.max_bad_rows": 0.5,
    },
    "custom": {"task.fn": "other.py:Task", "task.arguments.of_it": 4},
}
BEGUN: dict[str, dict[str, Any]] = {
    "letter_count": {},
    "from_scratch": {"model": {"from_scratch": {}}},
    "lora": {"model": {"path": "m", "lora": {}}},
    "blocksworld": {"task": {"type": "blocksworld", "max_blocks": 4}},
    "countdown": {"task": {"type": "countdown"}},
    "sums": {"task": {"type": "sums"}},
    "messages": {"environment": {"fn": "calculator", "role": "tool"}},
    "guess": {"task": {"type": "guess"}, "environment": {"stop": ["</guess>"]}},
    "dataset": {"task": {"type": "dataset", "path": "x.jsonl"}},
    "benchmark": {"task": {"type": "benchmark", "name": "gsm8k"}},
    "reasoning_gym": {"task": {"type": "reasoning_gym", "datasets": {"NAME": {"arguments": {"size_of_it": 1}}}}},
    "custom": {"task": {"type": "custom", "fn": "x.py:Task", "arguments": {"of_it": 1}}},
}
# Fields that are fixed while their stage runs.
WITHIN = {
    "warm_start.rows_per_step",
    "sft.rows_per_step",
    "preference.pairs_per_step",
    "objective.sft.rows_per_step",
}
# Fields that a resume may change, by section: how a run is executed, and how it learns.
_OPTIMIZER = "learning_rate beta1 beta2 eps weight_decay warmup_updates schedule final_fraction max_grad_norm"
FREE_FIELDS = {
    "run": "dir resume device kept_prompts address time_limit trackers",
    "actors": "count tensor_parallel_size threads dtype max_model_len max_num_seqs block_size kv_cache_gib "
    "gpu_memory_utilization enforce_eager start_timeout_s rollout_timeout_s hang_timeout_s max_restarts",
    "sampling": "temperature top_p max_tokens",
    "environment": "arguments max_turns",
    "rewards": "functions task_weight workers timeout_s memory_mib",
    "rewards.functions.NUMBER": "fn weight name arguments",
    "learner": "ranks zero_stage sequence_parallel threads micro_batch_tokens gradient_checkpointing optimizer_offload "
    "start_timeout_s timeout_s hang_timeout_s max_restarts max_skipped_steps",
    "warm_start": "max_steps",
    "sft": "path split subset max_bad_rows max_steps",
    "preference": "path split subset max_bad_rows max_steps",
    "train": "max_steps groups_per_step group_size updates_per_step dynamic_sampling_rounds max_staleness "
    "max_failed_rollouts max_verifier_failures",
    **{f"{section}.optimizer": _OPTIMIZER for section in ("warm_start", "sft", "preference", "train")},
    "train.critic_optimizer": _OPTIMIZER,
    "objective": "grad_norm_interval",
    "objective.policy": "weight final_weight estimator tree_estimator tree_std surrogate clip_low clip_high dual_clip "
    "aggregation decoupled importance_cap teacher_share entropy_coef gamma gae_lambda overlong_buffer overlong_penalty",
    "objective.kl": "weight final_weight estimator in_reward",
    "objective.value": "weight final_weight clip warmup_steps",
    "objective.preference": "weight final_weight loss beta label_smoothing adaptive_smoothing length_norm "
    "mask_prefix_dpo pairs source",
    "objective.sft": "weight final_weight source curiosity mask_prefix_sft mask_share",
    "objective.distill": "weight final_weight divergence top_k on_policy_share beta interpolation final_interpolation "
    "interpolation_rate teacher_temperature confidence_gate entropy_coef entropy_share",
    "objective.ranking": "weight final_weight max_answers",
    "objective.custom": "weight final_weight fn arguments",
    "teacher": "model in_learner",
    "teacher.model": "path count tensor_parallel_size dtype max_model_len max_num_seqs kv_cache_gib "
    "gpu_memory_utilization",
    "weight_sync": "transport bucket_mib timeout_s probe_rows probe_tolerance",
    "checkpoint": "interval keep_last keep_every best_metric best_mode max_failed_saves",
    "evaluation": "prompts samples greedy search_answers interval",
    "search": "fraction unsolved split prompts shard_size model reviewer nodes tables patterns expansion value "
    "parallel_simulations backtracking max_backtracks backtrack_to temperature top_p max_node_tokens max_depth "
    "max_failed_trees",
    **{
        f"search.{writer}": "path count tensor_parallel_size dtype max_model_len max_num_seqs kv_cache_gib "
        "gpu_memory_utilization question_template"
        for writer in ("model", "reviewer")
    },
    "search.nodes.NAME": "tag prefixes writer terminal max_tokens",
    "search.tables.NAME": "children after_wrong",
    "search.selection": "type form exploration length_exponent value_weight entropy_weight depth_weight unit chains "
    "draws",
    "search.value": "fn arguments type count timeout_s prune_below template right wrong path tensor_parallel_size "
    "dtype max_model_len max_num_seqs kv_cache_gib gpu_memory_utilization",
    "search.stop": "simulations tokens answers correct sure",
    "search.stop.correct.NUMBER": "count after",
    "extract": "supervised supervised_nodes supervised_rows skip chosen max_backtracks pairs pairs_per_tree "
    "step_values step_preferences step_min_visits step_min_gap step_value",
}
FREE_WITHOUT_SECTION = {"placement"}
# Fields that select an alternative of a section. Another alternative has other fields, which are compared.
ALTERNATIVES = {"task.type", "model.from_scratch", "model.lora"}
# Fields whose entries are compared one by one, under names that the user gives.
MAPPINGS = {"task.datasets", "task.datasets.NAME.arguments", "task.arguments"}


def test_every_field_is_classified_as_fixed_or_free() -> None:
    """A new field belongs to FIXED_FIELDS if changing it would make a resumed run another experiment."""
    fixed = {name for fields in FIXED.values() for name in fields if name.rpartition(".")[0] not in MAPPINGS} | MAPPINGS
    free = {
        f"{section}.{name}" for section, fields in FREE_FIELDS.items() for name in fields.split()
    } | FREE_WITHOUT_SECTION
    known = {key.name for key in all_keys()}
    assert fixed | WITHIN | free | ALTERNATIVES == known
    assert not fixed & free and not WITHIN & free
    by_schema = set(select_fields(dict.fromkeys(known), FIXED_FIELDS))
    assert by_schema == fixed | ALTERNATIVES


@pytest.mark.parametrize(("begun", "field"), [(kind, field) for kind, fields in FIXED.items() for field in fields])
def test_every_fixed_field_is_refused(begun: str, field: str, tmp_path: Path) -> None:
    before = config(**BEGUN[begun])
    save(tmp_path, 2, of=before)
    values = copy.deepcopy({**before.model_dump(mode="json", exclude_unset=True), **copy.deepcopy(BEGUN[begun])})
    section, name = values, field.split(".")
    for key in name[:-1]:
        section = section.setdefault(key, {})
    section[name[-1]] = FIXED[begun][field]
    was, now = (flat_fields(each.model_dump(mode="json"))[field] for each in (before, parse_config(values, "test")))
    written = {"None": "null", "True": "true", "False": "false"}
    was, now = (written.get(str(each), each) for each in (was, now))
    with pytest.raises(ConfigError) as caught:
        start(tmp_path, parse_config(values, "test"))
    assert caught.value.message == (
        f"{field} differs from the run to be resumed ({tmp_path / 'config.yaml'}): expected {was}, found {now}; "
        "set it back, or start another run with run.dir=runs/NEW"
    )
