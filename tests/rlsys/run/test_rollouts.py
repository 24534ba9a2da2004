"""Rows about rollouts: which completions are kept, and their tokens as texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from fakes import group, prompt, trajectory

from rlsys.interfaces import TokenValues
from rlsys.run import rollouts
from rlsys.run.rollouts import (
    TokenTexts,
    choose_completions,
    choose_groups,
    choose_places,
    group_rows,
    is_kept,
    row_tokens,
    training_facts,
    with_values,
)


def decode(ids: Sequence[int]) -> str:
    """Return one byte for every token, as a byte-level tokenizer has them."""
    return bytes(ids).decode("utf-8", "replace")


def drop_first_space(ids: Sequence[int]) -> str:
    """Return words of two letters with a space before each, but for the first, as SentencePiece does."""
    return "".join(f" {chr(token)}{chr(token)}" for token in ids)[1:]


@pytest.mark.parametrize("text", ["plain", "größe", "日本語 ok", "🙂🙂x", ""])
def test_texts_of_tokens_join_to_the_text_of_all(text: str) -> None:
    ids = list(text.encode())
    texts = TokenTexts(decode)(ids)
    assert "".join(texts) == text and len(texts) == len(ids)


def test_a_part_of_a_character_has_no_text_of_its_own() -> None:
    assert TokenTexts(decode)(list("aé".encode())) == ["a", "", "é"]
    assert TokenTexts(decode)(list("é".encode())[:1]) == ["\ufffd"]  # cut off in the middle of a character


def test_a_token_keeps_the_space_that_a_first_token_loses() -> None:
    assert TokenTexts(drop_first_space)([97, 98]) == ["aa", " bb"]
    assert TokenTexts(drop_first_space)([97, 98], before=[99, 120]) == [" aa", " bb"]


def test_kept_steps_are_few_in_a_long_stage() -> None:
    assert [step for step in range(1, 61) if is_kept(step, 60)] == list(range(1, 61))
    kept = [step for step in range(1, 10_001) if is_kept(step, 10_000)]
    assert kept[:3] == [1, 10, 20] and kept[-1] == 10_000 and len(kept) == 1001


def test_prompts_are_chosen_by_their_ids_alone() -> None:
    groups = [group(prompt(f"train-{number}")) for number in range(9)]
    chosen = [groups[n].prompt.prompt_id for n in choose_groups(groups, 3)]
    assert [groups[8 - n].prompt.prompt_id for n in choose_groups(groups[::-1], 3)] == chosen
    rest = [each for each in groups if each.prompt.prompt_id != chosen[0]]
    assert chosen[1] == rest[choose_groups(rest, 1)[0]].prompt.prompt_id
    assert choose_groups(groups, 0) == []


def test_the_best_and_the_worst_completion_are_kept() -> None:
    rewards = [0.4, 0.4, 0.1, 0.4, 0.4, 0.9, 0.4]
    assert choose_completions(group(prompt("p"), rewards=rewards)) == [0, 1, 2, 5]
    failed = tuple(trajectory(outcome="error", answered=False) for _ in range(6))
    assert choose_completions(replace(group(prompt("p")), trajectories=failed)) == [0, 1, 2, 3]


def test_a_row_tells_all_about_a_completion() -> None:
    judged = replace(
        trajectory(version=7, reward=0.5, length=3),
        token_ids=np.array([1, 2, 3, *b"abc"], np.int32),
        behavior_logprobs=np.array([0, 0, 0, -0.25, -0.5, -1.00004], np.float32),
        loss_mask=np.array([0, 0, 0, 1, 0, 1], bool),
        parts={"task": 1.0, "short": -0.5},
        detail="because",
    )
    of = replace(prompt("p"), token_ids=np.array([1, 2, 3], np.int32), answer="4")
    grouped = replace(group(of), trajectories=(judged, trajectory(outcome="timeout", answered=False)))
    rows = list(group_rows(grouped, TokenTexts(decode), lambda ids: f"prompt of {len(ids)}", {"step": 2}))
    assert rows[0] == {
        "format": 2, "step": 2, "prompt_id": "p", "prompt": "prompt of 3", "reference": "4", "searched": False,
        "group_size": 2, "group_judged": 1, "group_reward": 0.5, "sample": 0, "reward": 0.5,
        "parts": {"task": 1.0, "short": -0.5},
        "outcome": "ok", "correct": True, "answered": True, "detail": "because", "finish_reason": "stop", "tokens": 2,
        "oldest_version": 7, "completion": "abc", "token_ids": [97, 98, 99], "token_ends": [1, 2, 3],
        "logprobs": [-0.25, None, -1.0], "left_out": None,
    }  # fmt: skip
    assert rows[1]["reward"] is None and rows[1]["outcome"] == "timeout"
    tokens = row_tokens(rows[0])
    assert [(token.token_id, token.text, token.logprob) for token in tokens] == [
        (97, "a", -0.25),
        (98, "b", None),
        (99, "c", -1.0),
    ]
    assert {(token.advantage, token.gap) for token in tokens} == {(None, None)}, "it is not trained yet"


def test_a_trained_row_has_the_values_of_its_kept_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "HEAD_TOKENS", 2)
    monkeypatch.setattr(rollouts, "TAIL_TOKENS", 1)
    long = replace(trajectory(length=5), token_ids=np.array([1, 2, 3, *b"abcde"], np.int32))
    row = rollouts.completion_row(long, 0, 3, TokenTexts(decode))
    nan = np.nan
    advantages, gaps = [nan, nan, nan, 0.86602, nan, 7, 7, -1.5], [nan, nan, nan, 1.23e-5, nan, 7, 7, -0.25]
    values = TokenValues(advantages=np.array(advantages, np.float32), gaps=np.array(gaps, np.float32))
    trained = with_values(row, values)
    assert (trained["advantages"], trained["gaps"]) == ([0.866, None, -1.5], [1.23e-05, None, -0.25])
    assert trained["untrained"] == "" and trained.items() >= row.items()
    assert [(token.text, token.advantage, token.gap) for token in row_tokens(trained)] == [
        ("a", 0.866, 1.23e-05),
        ("b", None, None),
        ("e", -1.5, -0.25),
    ]
    assert training_facts(trained) == ["advantages -1.5 to +0.866, mean -0.317", "largest gap -0.25"]
    even = with_values(row, replace(values, advantages=np.full(8, -0.5, np.float32)))
    assert training_facts(even) == ["advantage -0.5", "largest gap -0.25"]


def test_a_row_that_was_not_trained_says_why() -> None:
    row = with_values(rollouts.completion_row(trajectory(), 0, 3, TokenTexts(decode)), TokenValues(untrained="why"))
    assert (row["advantages"], row["gaps"], row["untrained"]) == (None, None, "why")
    assert training_facts(row) == ["why"]
    old = {key: value for key, value in row.items() if key not in ("advantages", "gaps", "untrained")}
    assert training_facts(old) == [] and row_tokens(old) == row_tokens(row)


def test_places_are_those_of_the_rows() -> None:
    groups = [group(prompt(f"train-{number}"), rewards=[0.0, 1.0]) for number in range(9)]
    places = choose_places(groups, 3)
    rows = [row for n in choose_groups(groups, 3) for row in group_rows(groups[n], TokenTexts(decode), decode, {})]
    assert [(groups[g].prompt.prompt_id, n) for g, n in places] == [(row["prompt_id"], row["sample"]) for row in rows]
    assert len(places) == 6 and choose_places(groups, 0) == ()


def test_the_middle_of_a_long_completion_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "HEAD_TOKENS", 4)
    monkeypatch.setattr(rollouts, "TAIL_TOKENS", 2)
    text = b"abcdefghij"
    long = replace(trajectory(length=len(text)), token_ids=np.array([1, 2, 3, *text], np.int32))
    row = rollouts.completion_row(long, 0, 3, TokenTexts(decode))
    assert (row["completion"], row["left_out"], row["tokens"]) == ("abcdij", [4, 4], 10)
    assert row["token_ids"] == list(b"abcdij") and len(row["logprobs"]) == len(row["token_ends"]) == 6
