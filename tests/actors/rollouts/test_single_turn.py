"""Requests for a prompt, and the group of their completions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from actors.engine import Completion
from actors.rollouts.single_turn import build_group, completion_requests, items_to_judge, name_failures
from rlsys.types import FinishReason, Prompt, SamplingSettings, Verdict, VersionSpan

PROMPT = Prompt(prompt_id="train-4@1", token_ids=np.array([7, 8, 9], dtype=np.int32), answer="2")
SETTINGS = SamplingSettings(samples=3, temperature=0.7, top_p=0.9, max_tokens=5, seed=11)


def completion(*tokens: int, versions: tuple[VersionSpan, ...] = (VersionSpan(start=0, version=2),)) -> Completion:
    logprobs = -np.arange(1, len(tokens) + 1, dtype=np.float32) / 4
    return Completion(
        token_ids=np.array(tokens, dtype=np.int32), logprobs=logprobs, finish_reason="stop", versions=versions
    )


def test_a_request_for_every_sample() -> None:
    requests = completion_requests(PROMPT, SETTINGS)
    assert len(requests) == 3
    for request in requests:
        assert request.token_ids == [7, 8, 9]
        assert (request.temperature, request.top_p, request.max_tokens) == (0.7, 0.9, 5)
    assert len({request.seed for request in requests}) == 3
    assert len({request.request_id for request in requests}) == 3


def test_greedy_and_sampled_requests_of_a_prompt_have_different_ids() -> None:
    sampled = completion_requests(PROMPT, SETTINGS)
    greedy = completion_requests(PROMPT, replace(SETTINGS, samples=1, temperature=0.0))
    assert not {r.request_id for r in sampled} & {r.request_id for r in greedy}


def test_the_seeds_do_not_depend_on_the_number_of_samples() -> None:
    fewer = completion_requests(PROMPT, replace(SETTINGS, samples=2))
    assert [r.seed for r in fewer] == [r.seed for r in completion_requests(PROMPT, SETTINGS)][:2]


def test_a_completion_that_was_cut_off_is_not_finished() -> None:
    reasons: tuple[FinishReason, ...] = ("stop", "length", "abort")
    completions = [replace(completion(4), finish_reason=reason) for reason in reasons]
    assert items_to_judge(PROMPT, completions, ["a", "b", "c"]) == [
        (PROMPT.problem, text, finished) for text, finished in (("a", True), ("b", False), ("c", False))
    ]


def test_a_trajectory_is_the_prompt_and_the_completion(caplog: pytest.LogCaptureFixture) -> None:
    spans = (VersionSpan(start=0, version=2), VersionSpan(start=1, version=3))
    verdicts = [
        Verdict(outcome="ok", reward=1.0, answered=True),
        Verdict(outcome="timeout", reward=0.0, answered=False, detail="too late"),
    ]
    group = build_group(PROMPT, [completion(4, 5, versions=spans), completion(6)], verdicts)
    first, second = group.trajectories
    assert first.token_ids.tolist() == [7, 8, 9, 4, 5]
    assert first.token_ids.dtype == np.int32
    assert first.loss_mask.tolist() == [False, False, False, True, True]
    assert first.behavior_logprobs.tolist() == [0, 0, 0, -0.25, -0.5]
    assert first.behavior_logprobs.dtype == np.float32
    assert first.versions == (VersionSpan(start=3, version=2), VersionSpan(start=4, version=3))
    assert (first.reward, first.outcome, first.answered) == (1.0, "ok", True)
    assert first.completion_length == 2
    assert second.token_ids.tolist() == [7, 8, 9, 6]
    assert (second.outcome, second.answered) == ("timeout", False)
    assert (first.detail, second.detail) == ("", "too late")
    assert [record.getMessage() for record in caplog.records] == [
        "prompt train-4@1: verification failed for 1 of 2: too late"
    ]
    assert group.prompt is PROMPT
    assert group.oldest_version == 2


def test_a_failed_verification_names_the_end_of_its_completion() -> None:
    right = Verdict(outcome="ok", reward=1.0, answered=True)
    failed = Verdict(outcome="error", reward=0.0, answered=False, detail="ValueError: no nines")
    first, second = name_failures([right, failed], ["8", "a" * 90 + "<answer>9</answer>"])
    assert first is right
    expected = f"ValueError: no nines; the completion ends with '{'a' * 22}<answer>9</answer>'"
    assert second.detail == expected


def test_every_completion_needs_its_verdict() -> None:
    with pytest.raises(ValueError, match="shorter"):
        build_group(PROMPT, [completion(4), completion(5)], [Verdict(outcome="ok", reward=1.0, answered=True)])
