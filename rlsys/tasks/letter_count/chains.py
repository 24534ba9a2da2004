"""Worked chains of thought for letter counting: letter by letter with a running count."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rlsys.config.tasks import TagShares
from rlsys.tasks import tags

# Pieces of chain text that a from-scratch tokenizer makes single tokens.
PIECES = ("count", " and", " is wrong")


def running_counts(word: str, targets: str, error_rate: float, rng: random.Random) -> list[int]:
    """Count after each letter of `word`. [len(word)], each 0 to len(word).

    A letter of `targets` adds 1, another 0; with probability error_rate a letter does the opposite
    and nothing corrects it later (a silent error).
    """
    counts, total = [], 0
    for letter in word:
        total += (letter in targets) != (rng.random() < error_rate)
        counts.append(total)
    return counts


def build_chain(
    word: str, targets: str, *, chunk: int, error_rate: float, shares: TagShares, rng: random.Random
) -> str:
    """A chain for the question how often the letters `targets` occur in `word`.

    Order of the nodes: sub-task, reclarify, hypothesis, thinking (one per `chunk` letters),
    double-check, answer; all but thinking and answer with the probability in `shares`. With
    probability shares.reflection one thinking node is first written with a wrong count and a
    reflection node follows it; such a chain has no silent error, so its answer is right.
    """
    named = " and ".join(targets)
    chance = tags.draw(shares, rng)
    counts = running_counts(word, targets, 0.0 if chance[tags.REFLECTION] else error_rate, rng)
    total = counts[-1]
    nodes = []
    if chance[tags.SUB_TASK]:
        nodes.append(tags.node(tags.SUB_TASK, f"count {named}"))
    if chance[tags.RECLARIFY]:
        nodes.append(tags.node(tags.RECLARIFY, f"{named}?"))
    if chance[tags.HYPOTHESIS]:
        nodes.append(tags.node(tags.HYPOTHESIS, str(max(0, total + rng.choice((-1, 0, 1))))))
    nodes.extend(_thinking_nodes(word, counts, chunk, rng if chance[tags.REFLECTION] else None))
    if chance[tags.DOUBLE_CHECK]:
        nodes.append(tags.node(tags.DOUBLE_CHECK, f"{targets}{total}"))
    nodes.append(tags.node(tags.ANSWER, str(total)))
    return "".join(nodes)


def _thinking_nodes(word: str, counts: Sequence[int], chunk: int, planted: random.Random | None) -> list[str]:
    """Thinking nodes of `chunk` letters; with `planted`, one of them wrong, reflected on and repeated."""
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
    """The counts of one node with one increment flipped; `before` is the count ahead of the node."""
    position = rng.randrange(len(right))
    matched = right[position] > (right[position - 1] if position else before)
    shift = -1 if matched else 1
    return [count + shift if index >= position else count for index, count in enumerate(right)]
