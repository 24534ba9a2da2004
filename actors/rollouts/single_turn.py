"""On-policy groups: one prompt with independently sampled completions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from actors.engine import Completion, CompletionRequest
from actors.rollouts.seeds import sample_seed
from rlsys.tasks.reasons import MAX_QUOTED_CHARS, quoted
from rlsys.types import WHOLE, Problem, Prompt, SamplingSettings, Trajectory, TrajectoryGroup, Verdict

log = logging.getLogger(__name__)


def completion_requests(prompt: Prompt, settings: SamplingSettings) -> list[CompletionRequest]:
    """Return one request per sample. vLLM's `n` could not give each sample its own seed."""
    return [
        CompletionRequest(
            request_id=f"{prompt.prompt_id}#{sample}/{settings.temperature}",
            token_ids=prompt.token_ids.tolist(),
            seed=sample_seed(settings.seed, prompt.prompt_id, sample),
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
        )
        for sample in range(settings.samples)
    ]


def items_to_judge(
    prompt: Prompt, completions: Sequence[Completion], texts: Sequence[str]
) -> list[tuple[Problem, str, bool]]:
    """Return the arguments of `Task.verify` for the texts of completions. One that was cut off is not finished."""
    pairs = zip(completions, texts, strict=True)
    return [(prompt.problem, text, completion.finish_reason in WHOLE) for completion, text in pairs]


def name_failures(verdicts: Sequence[Verdict], texts: Sequence[str]) -> list[Verdict]:
    """Return verdicts in which the reason of a failed verification has the end of its completion."""
    return [
        replace(verdict, detail=f"{verdict.detail}; the completion ends with {quoted(text[-MAX_QUOTED_CHARS:])}")
        if verdict.outcome in ("error", "timeout") and text
        else verdict
        for verdict, text in zip(verdicts, texts, strict=True)
    ]


def build_group(prompt: Prompt, completions: Sequence[Completion], verdicts: Sequence[Verdict]) -> TrajectoryGroup:
    """Build the group of a prompt from its completions and their verdicts, and log failed verifications."""
    failed = [verdict for verdict in verdicts if verdict.outcome in ("error", "timeout")]
    if failed:
        count, first = f"{len(failed)} of {len(verdicts)}", failed[0]
        log.warning("prompt %s: verification failed for %s: %s", prompt.prompt_id, count, first.detail)
    pairs = zip(completions, verdicts, strict=True)
    return TrajectoryGroup(prompt=prompt, trajectories=tuple(_trajectory(prompt, *pair) for pair in pairs))


def _trajectory(prompt: Prompt, completion: Completion, verdict: Verdict) -> Trajectory:
    start = len(prompt.token_ids)
    total = start + len(completion.token_ids)
    loss_mask = np.arange(total) >= start
    behavior_logprobs = np.zeros(total, dtype=np.float32)
    behavior_logprobs[start:] = completion.logprobs
    return Trajectory(
        token_ids=np.concatenate([prompt.token_ids, completion.token_ids]),
        loss_mask=loss_mask,
        behavior_logprobs=behavior_logprobs,
        versions=tuple(replace(span, start=start + span.start) for span in completion.versions),
        finish_reason=completion.finish_reason,
        reward=verdict.reward,
        outcome=verdict.outcome,
        answered=verdict.answered,
        detail=verdict.detail,
        parts=verdict.parts,
    )
