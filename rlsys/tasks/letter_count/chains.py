"""Worked chains of thought for letter counting: letter by letter with a running count."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rlsys.config.tasks import TagShares
from rlsys.tasks import tags
from rlsys.tasks.generated import join_nodes

# Pieces of chains that are single tokens of a from-scratch tokenizer.
PIECES = ("count", " and", " is wrong")


def running_counts(
    word: str, targets: str, error_rate: float, rng: random.Random, miscounts: str = "both"
) -> list[int]:
    """Return the count after each letter of `word`: [len(word)], each from 0 to len(word).

    A letter of `targets` adds 1 and another letter adds 0. With probability `error_rate` a letter adds the other
    number, and nothing corrects it later (a silent error). With `miscounts` extra, letters of `targets` always add 1.
    """
    counts, total = [], 0
    for letter in word:
        is_target, slips = letter in targets, rng.random() < error_rate
        total += is_target or slips if miscounts == "extra" else is_target != slips
        counts.append(total)
    return counts


def build_chain(
    word: str,
    targets: str,
    *,
    chunk: int,
    error_rate: float,
    shares: TagShares,
    rng: random.Random,
    miscounts: str = "both",
) -> str:
    """Return a chain that counts the letters `targets` in `word`, with one thinking node per `chunk` letters.

    `shares` has the probabilities of the optional nodes. With probability shares.reflection, one thinking node is first
    written with a wrong count, and a reflection node corrects it. Such a chain has no silent error, so its answer is
    right.
    """
    named = " and ".join(targets)
    present = tags.draw(shares, rng)
    reflects = present[tags.REFLECTION]
    counts = running_counts(word, targets, 0.0 if reflects else error_rate, rng, miscounts)
    total = counts[-1]
    return join_nodes(
        present,
        sub_task=lambda: f"count {named}",
        reclarify=lambda: f"{named}?",
        hypothesis=lambda: str(max(0, total + rng.choice((-1, 0, 1)))),
        thinking=lambda: _thinking_nodes(word, counts, chunk, rng if reflects else None),
        double_check=lambda: f"{targets}{total}",
        answer=str(total),
    )


def _thinking_nodes(word: str, counts: Sequence[int], chunk: int, planted: random.Random | None) -> list[str]:
    """Return thinking nodes of `chunk` letters. With `planted`, one is first written wrongly and then corrected."""
    starts = range(0, len(word), chunk)
    wrong_start = planted.choice(starts) if planted else -1
    nodes = []
    for start in starts:
        letters, right = word[start : start + chunk], list(counts[start : start + chunk])
        if planted and start == wrong_start:
            wrong = _miscount(right, counts[start - 1] if start else 0, planted)
            nodes.append(_thinking(letters, wrong))
            nodes.append(tags.node(tags.REFLECTION, f"{wrong[-1]} is wrong"))
        nodes.append(_thinking(letters, right))
    return nodes


def _thinking(letters: str, counts: Sequence[int]) -> str:
    text = "".join(f"{letter}{count}" for letter, count in zip(letters, counts, strict=True))
    return tags.node(tags.THINKING, text)


def _miscount(right: Sequence[int], before: int, rng: random.Random) -> list[int]:
    """Return the counts of one node with one increment flipped. `before` is the count before the node."""
    position = rng.randrange(len(right))
    matched = right[position] > (right[position - 1] if position else before)
    shift = -1 if matched else 1
    return [count + shift if index >= position else count for index, count in enumerate(right)]
