"""Thought tags of the paper, and the final answer of a completion.

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

_NAMES = "|".join(TAGS)
_NODE = re.compile(rf"\s*<({_NAMES})>([^<]*)</\1>")
# White space, or the beginning of a node up to any place in it.
_UNFINISHED = re.compile(rf"\s*(?:<(?:{_NAMES})>[^<]*)?(?:<[^<>]*)?")
_FINAL_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>\s*\Z", re.DOTALL)


def node(tag: str, text: str) -> str:
    """Return a thought node: the text between its tags."""
    return f"<{tag}>{text}</{tag}>"


def draw(shares: TagShares, rng: random.Random) -> dict[str, bool]:
    """Return whether a demonstration has each of its optional nodes, by tag. Each takes one draw, in a fixed order."""
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
    """Return all opening and closing tags in a fixed order, for the vocabulary of a tokenizer."""
    return tuple(string for tag in TAGS for string in (f"<{tag}>", f"</{tag}>"))


def complete_nodes(text: str) -> tuple[list[tuple[str, str]], bool]:
    """Return the complete nodes at the beginning of a chain, and whether the rest may become a node.

    Returns:
        Tag and text of every node, and True if nothing, white space or the beginning of a node follows them.
    """
    nodes, place = [], 0
    while match := _NODE.match(text, place):
        nodes.append((match[1], match[2]))
        place = match.end()
    return nodes, _UNFINISHED.fullmatch(text, place) is not None


def final_answer(completion: str) -> str | None:
    """Return the stripped text of the final <answer> node; None if the completion has no valid answer.

    A valid completion has exactly one answer node. It is closed, and only white space follows. A second answer is
    invalid, because a policy could otherwise collect reward by trying several.
    """
    match = _FINAL_ANSWER.search(completion)
    if match is None or completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    return match.group(1).strip()


def answer_fault(completion: str) -> str:
    """Return why a completion has no `final_answer`."""
    opened, closed = completion.count("<answer>"), completion.count("</answer>")
    ends_with_one = _FINAL_ANSWER.search(completion) is not None
    if not opened:
        fault = "</answer> without <answer>" if closed else ""
    elif ends_with_one and opened > closed:
        fault = "an earlier <answer> is not closed"
    elif not closed or (opened == closed == 1 and completion.index("</answer>") < completion.index("<answer>")):
        fault = "it is not closed"
    elif opened == closed == 1:
        fault = "text follows it"
    else:
        fault = "more than one <answer>" if opened > 1 else "more than one </answer>"
    return f"no final <answer>{fault and f': {fault}'}"
