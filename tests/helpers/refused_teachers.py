"""The mistakes about a teacher that the rules of a config refuse; see tests/rlsys/config/test_checks.py."""

from __future__ import annotations

TEACHER = ["objective.distill.weight=1", "teacher.model.path=t"]
ROWS = ["objective.distill={weight: 1, divergence: top_k, on_policy_share: 0.5}"]
WHOLE = ["objective.distill={weight: 1, divergence: whole}"]

TEACHER_REFUSED: dict[str, list[tuple[list[str], str]]] = {
    "distillation_has_a_teacher": [
        (["objective.distill.weight=1"], "objective.distill.weight needs a teacher: set teacher.model.path"),
        (["objective.policy.teacher_share=0.5"], "objective.policy.teacher_share needs a teacher"),
        (["teacher.model={path: t}"], "teacher.model has no effect: raise objective.distill.weight"),
        (["teacher.in_learner=t"], "teacher.in_learner has no effect: set objective.distill.divergence to whole"),
        ([*WHOLE, "teacher.in_learner=t", "stages=[warm_start]"], "teacher.in_learner has no effect"),
        ([*TEACHER, "stages=[warm_start]"], "teacher.model serves stage online, and warm_start and sft with"),
        ([*ROWS, "stages=[warm_start]"], "objective.distill.weight needs a teacher: set teacher.model.path"),
        ([*ROWS, "stages=[search, sft]"], "objective.distill.weight needs a teacher: set teacher.model.path"),
    ],
    "distilled_rows_have_a_source": [
        ([*TEACHER, *ROWS], "needs rows in stage online: set objective.sft.source to demonstrations or file, found"),
        ([*TEACHER, *ROWS, "objective.sft.source=file"], "objective.sft.source file needs sft.path, or a stage search"),
    ],
    "divergence_has_its_keys": [
        ([*TEACHER, "objective.distill.top_k=4"], "objective.distill.top_k is for divergence top_k, found sampled"),
        (
            [*TEACHER, "objective.distill.on_policy_share=0.5", "objective.sft.source=demonstrations"],
            "objective.distill.on_policy_share is for divergence top_k, found sampled",
        ),
        ([*WHOLE, "objective.distill.top_k=4"], "objective.distill.top_k is for divergence top_k, found whole"),
        (
            [*TEACHER, "objective.distill={weight: 1, divergence: top_k, entropy_share: 0.5}"],
            "objective.distill.entropy_share has no effect: raise objective.distill.entropy_coef",
        ),
        ([*TEACHER, "objective.distill.beta=0.5"], "objective.distill.beta is for divergence top_k, found sampled"),
    ],
    "whole_teacher_fits": [
        ([*WHOLE, "learner.zero_stage=3"], "divergence whole needs learner.zero_stage below 3"),
        ([*WHOLE, "learner={ranks: 2, sequence_parallel: 2}"], "needs learner.sequence_parallel 1"),
        (
            [
                "objective.distill={weight: 1, divergence: whole, on_policy_share: 0}",
                "objective.sft={source: demonstrations, mask_share: 0.1}",
            ],
            "needs objective.sft.mask_share 0",
        ),
        ([*WHOLE, "model={path: m, lora: {}}"], "needs a policy without model.lora"),
    ],
    "teacher_scores_what_was_sampled": [
        ([*TEACHER, "sampling.top_p=0.7"], "set sampling.top_p to 1, found 0.7"),
        ([*TEACHER, "sampling.temperature=0.7"], "set sampling.temperature to 1, found 0.7"),
        (
            ["objective.distill.weight=1", "teacher.model={path: t, max_model_len: 128}"],
            "teacher.model.max_model_len 128 is below actors.max_model_len 256",
        ),
    ],
}
