"""Kept rollouts as the page of rollouts shows them: tokens with colours, and the rewards around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rlsys.run.judgements import ENDS, by_reward, mean_logprob
from rlsys.run.rollouts import row_tokens, training_facts

Colour = Literal["advantage", "gap", "chance"]
COLOURS: Mapping[Colour, str] = {"advantage": "advantage", "gap": "actor-learner gap", "chance": "log-probability"}
"""What the colours of tokens can show, with names for people."""
CHANCES = (0.05, 0.3, 0.7, 1.2, 2.3, 4.6)
"""Bounds of the levels of surprise, in nats: probabilities 0.95, 0.74, 0.50, 0.30, 0.10, 0.01."""
ADVANTAGES = (0.01, 0.5, 1.0, 2.0)
GAPS = (0.01, 0.1, 0.25, 0.7)
"""Bounds of the levels of a gap, in nats: ratios of probabilities 1.01, 1.1, 1.3, 2."""
Shown = tuple[str, str, str]  # text, classes of its colours, title


def level(value: float | None, bounds: Sequence[float]) -> str:
    """Return the level of a signed value: n4 to n1, 0, p1 to p4; x without a value."""
    if value is None:
        return "x"
    number = sum(abs(value) > bound for bound in bounds)
    return f"{'n' if value < 0 else 'p'}{number}" if number else "0"


def legend(bounds: Sequence[float]) -> list[tuple[str, str]]:
    """Return the levels of a signed value from the lowest to the highest, each with its text."""
    below = [(f"n{number}", f"under {-bound:g}") for number, bound in enumerate(bounds, start=1)]
    above = [(f"p{number}", f"over {bound:g}") for number, bound in enumerate(bounds, start=1)]
    return [*below[::-1], ("0", "about 0"), *above]


def shown_tokens(row: Mapping[str, Any]) -> list[Shown]:
    """Return the tokens of a completion. A note stands for the tokens that were left out.

    A token has a class for its level of each colour: a for the advantage, g for the gap, s for the surprise; or the
    class "forced" alone if the policy did not choose it.
    """
    left_out = row.get("left_out")
    trained = row.get("advantages") is not None
    shown: list[Shown] = []
    for place, token in enumerate(row_tokens(row)):
        if left_out and place == left_out[0]:
            shown.append((f" [{left_out[1]:,} tokens left out] ", "omitted", ""))
        name = f"token {token.token_id}"
        if token.logprob is None:
            shown.append((token.text, "forced", f"{name}, not chosen by the policy, not trained"))
            continue
        surprise = sum(-token.logprob > bound for bound in CHANCES)
        classes = f"a{level(token.advantage, ADVANTAGES)} g{level(token.gap, GAPS)} s{surprise}"
        hint = f"{name}, log-probability {token.logprob:.3f}"
        if token.advantage is not None and token.gap is not None:
            hint += f", advantage {token.advantage:+.4g}, gap {token.gap:+.2g}"
        elif trained:
            hint += ", trained with another completion"
        shown.append((token.text, classes, hint))
    return shown


def has_advantages(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether any row has advantages."""
    return any(row.get("advantages") is not None for row in rows)


def ordered(rows: Sequence[Mapping[str, Any]], order: str, prompt_id: str = "") -> list[Mapping[str, Any]]:
    """Return the rows of a step in an order; rows without a reward come last."""
    chosen = [row for row in rows if not prompt_id or row["prompt_id"] == prompt_id]
    if order == "kept":
        return chosen
    return by_reward(chosen, "best" if order == "best" else "worst", lambda row: row["reward"])


def card(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page shows of a row."""
    return {
        **row,
        "shown": shown_tokens(row),
        "training": training_facts(row),
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
