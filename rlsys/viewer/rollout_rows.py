"""Kept rollouts as the page of rollouts shows them: tokens with colours, and the rewards around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlsys.run.judgements import ENDS, by_reward, mean_logprob
from rlsys.run.rollouts import token_texts

LEVELS = (0.05, 0.3, 0.7, 1.2, 2.3, 4.6)
"""Upper ends of the levels of surprise, in nats: probabilities 0.95, 0.74, 0.50, 0.30, 0.10, 0.01."""
Token = tuple[str, str, str]  # text, class of its colour, title


def surprise_level(logprob: float | None) -> str:
    """Return the class of a token's colour; "forced" for a token that the policy did not choose."""
    if logprob is None:
        return "forced"
    return f"s{sum(-logprob > level for level in LEVELS)}"


def shown_tokens(row: Mapping[str, Any]) -> list[Token]:
    """Return the tokens of a completion. A gap stands for the tokens that were left out."""
    left_out = row.get("left_out")
    tokens: list[Token] = []
    for place, ((text, logprob), token_id) in enumerate(zip(token_texts(row), row["token_ids"], strict=True)):
        if left_out and place == left_out[0]:
            tokens.append((f" [{left_out[1]:,} tokens left out] ", "gap", ""))
        chance = "not chosen by the policy" if logprob is None else f"log-probability {logprob:.3f}"
        tokens.append((text, surprise_level(logprob), f"token {token_id}, {chance}"))
    return tokens


def ordered(rows: Sequence[Mapping[str, Any]], order: str, prompt_id: str = "") -> list[Mapping[str, Any]]:
    """Return the rows of a step in an order; rows without a reward come last."""
    chosen = [row for row in rows if not prompt_id or row["prompt_id"] == prompt_id]
    if order == "kept":
        return chosen
    return by_reward(chosen, "best" if order == "best" else "worst", lambda row: row["reward"])


def card(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page shows of a row."""
    mean, reward = row.get("group_reward"), row["reward"]
    return {
        **row,
        "shown": shown_tokens(row),
        "advantage": reward - mean if mean is not None and reward is not None else None,
        "mean_logprob": mean_logprob(row),
        "ended_by": ENDS.get(row["finish_reason"], row["finish_reason"]),
    }


def paired(
    mine: Mapping[int, Sequence[Mapping[str, Any]]], other: Mapping[int, Sequence[Mapping[str, Any]]], version: int
) -> list[tuple[str, list[Mapping[str, Any]], list[Mapping[str, Any]]]]:
    """Return the prompts that both runs kept, each with the rows of both runs nearest to a weight version."""
    sides = []
    for kept in (mine, other):
        nearest: dict[str, list[Mapping[str, Any]]] = {}
        for each in sorted(kept, key=lambda candidate: (abs(candidate - version), candidate)):
            for row in kept[each]:
                rows = nearest.setdefault(row["prompt_id"], [])
                if not rows or rows[0]["version"] == each:
                    rows.append(row)
        sides.append(nearest)
    return [(prompt, sides[0][prompt], sides[1][prompt]) for prompt in sides[0] if prompt in sides[1]]
