"""Worked chains for sums: term by term, sometimes without the carries."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

from rlsys.config.tasks import TagShares
from rlsys.tasks import calculator, tags
from rlsys.tasks.generated import join_nodes
from rlsys.types import Chain

# Pieces of chains that are single tokens of a from-scratch tokenizer.
PIECES = (" terms", "?", "about ", "ends in ", " is wrong", "+", "=")


def without_carries(left: int, right: int) -> int:
    """Return the sum as a weak pupil writes it: no digit sum carries into the next place, except in front.

    37 and 58 give 85, because 7 + 8 ends in 5 and 3 + 5 is 8. 95 and 19 give 104.
    """
    total, place = 0, 1
    while left or right:
        digit = left % 10 + right % 10
        left, right = left // 10, right // 10
        total += place * (digit % 10 if left or right else digit)
        place *= 10
    return total


def build_tool_chain(terms: Sequence[int], *, tool_share: float, error_rate: float, rng: random.Random) -> Chain:
    """Return a chain in which an addition is a call of the calculator with probability `tool_share`.

    Any other addition is a thinking node, which forgets its carries with probability `error_rate`.
    """
    pieces, text, total = [], "", terms[0]
    for term in terms[1:]:
        if rng.random() < tool_share:
            call = f"{total}+{term}"
            total += term
            pieces += [text + calculator.call_node(call), calculator.result_node(calculator.calculate(call))]
            text = ""
        else:
            result = without_carries(total, term) if rng.random() < error_rate else total + term
            text += thinking(total, term, result)
            total = result
    return (*pieces, text + tags.node(tags.ANSWER, str(total)))


def build_chain(terms: Sequence[int], *, error_rate: float, shares: TagShares, rng: random.Random) -> str:
    """Return a chain that adds the terms from left to right, with one thinking node per addition.

    `shares` has the probabilities of the optional nodes. With probability shares.reflection, one addition with carries
    is first written without them, and a reflection corrects it; all others of such a chain are right. In other chains,
    every addition forgets its carries with probability `error_rate`, and the chain goes on from there.
    """
    present = tags.draw(shares, rng)
    totals = list(accumulate(terms))
    carried = [
        place for place in range(1, len(terms)) if without_carries(totals[place - 1], terms[place]) != totals[place]
    ]
    reflected = rng.choice(carried) if present[tags.REFLECTION] and carried else None
    nodes, total = [], terms[0]
    for place, term in enumerate(terms[1:], 1):
        slip, right = without_carries(total, term), total + term
        if place == reflected:
            nodes += [thinking(total, term, slip), tags.node(tags.REFLECTION, f"{slip} is wrong")]
        result = slip if reflected is None and rng.random() < error_rate else right
        nodes.append(thinking(total, term, result))
        total = result
    return join_nodes(
        present,
        sub_task=lambda: "+".join(map(str, terms)),
        reclarify=lambda: f"{len(terms)} terms?",
        hypothesis=lambda: f"about {max(1, round(total, -1) + 10 * rng.randint(-2, 2))}",
        thinking=lambda: nodes,
        double_check=lambda: f"ends in {total % 10}",
        answer=str(total),
    )


def thinking(left: int, right: int, total: int) -> str:
    """Return the node of one addition."""
    return tags.node(tags.THINKING, f"{left}+{right}={total}")
