"""The thought tags of the paper and how the final answer of a completion is read.

Source: Marco-o1 v2, arXiv:2503.01461, sec. 3 (thought nodes of the tree search).
"""

from __future__ import annotations

import random
import re

from rlsys.config.tasks import TagShares

SUB_TASK = "sub-task"
THINKING = "thinking"
HYPOTHESIS = "hypothesis"
DOUBLE_CHECK = "double-check"
REFLECTION = "reflection"
RECLARIFY = "reclarify"
ANSWER = "answer"

TAGS = (SUB_TASK, THINKING, HYPOTHESIS, DOUBLE_CHECK, REFLECTION, RECLARIFY, ANSWER)

_FINAL_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>\s*\Z", re.DOTALL)


def node(tag: str, text: str) -> str:
    """One thought node: the text between its tags."""
    return f"<{tag}>{text}</{tag}>"


def draw(shares: TagShares, rng: random.Random) -> dict[str, bool]:
    """Which of the nodes that a demonstration may leave out it has, by tag; one draw each, in a fixed order."""
    return {
        tag: rng.random() < share
        for tag, share in (
            (SUB_TASK, shares.sub_task),
            (RECLARIFY, shares.reclarify),
            (HYPOTHESIS, shares.hypothesis),
            (REFLECTION, shares.reflection),
            (DOUBLE_CHECK, shares.double_check),
        )
    }


def tag_strings() -> tuple[str, ...]:
    """Every opening and closing tag, in a fixed order, for a tokenizer's vocabulary."""
    return tuple(string for tag in TAGS for string in (f"<{tag}>", f"</{tag}>"))


def final_answer(completion: str) -> str | None:
    """Text of the final <answer> node, stripped; None where the completion has no valid answer.

    Valid means: exactly one answer node, closed, and nothing but white space after it. A second
    answer makes the completion invalid, so that a policy cannot collect reward by trying several.
    """
    found = _FINAL_ANSWER.search(completion)
    if found is None or completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    return found.group(1).strip()
