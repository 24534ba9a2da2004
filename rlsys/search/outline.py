"""Searched trees for people: indented text, and the words about nodes and trees that pages and terminal share."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping

from rlsys.trees import StopReason, ThoughtNode, Tree
from rlsys.types import Int32Array, Question, Step, TrajectoryGroup

_COLUMNS = 110
STOPS: Mapping[StopReason, str] = {
    "correct": "enough right answers",
    "simulations": "the limit of simulations",
    "tokens": "the limit of tokens",
    "answers": "the limit of answers",
    "sure": "a sure answer",
    "exhausted": "nothing left to expand",
}
"""What ended a search, for people."""


def heading(node: ThoughtNode) -> str:
    """Return type, value, facts and verdict of a node."""
    value = [] if node.value is None else [f"value {node.value:.2f} of {node.visits}"]
    return ", ".join([node.type, *value, *node_facts(node), *([verdict_text(node)] if node.verdict else [])])


def node_facts(node: ThoughtNode) -> list[str]:
    """Return what there is to know of a node besides its type, value, text and verdict."""
    facts = []
    if node.estimate is not None:
        facts.append(f"estimate {node.estimate:.2f}")
    if node.generated:
        facts.append(f"surprise {max(-float(logprob) for logprob in node.logprobs):.2f}")
        facts.append(f"{node.generated} token{'' if node.generated == 1 else 's'}")
    if node.samples > 1:
        facts.append(f"drawn {node.samples} times")
    if node.writer != "policy":
        facts.append(f"by {node.writer}")
    if node.backtrack:
        facts.append("after a wrong answer")
    if node.defect:
        facts.append(node.defect)
    if node.finish_reason == "turns":
        facts.append("last turn")
    return facts


def verdict_text(node: ThoughtNode) -> str:
    """Return the verdict on the chain that ends at a node; "" without one."""
    if node.verdict is None:
        return ""
    return f"{'right' if node.verdict.correct else node.verdict.outcome}, reward {node.verdict.reward:g}"


def right_nodes(tree: Tree) -> set[int]:
    """Return the numbers of the nodes on the way to a right answer."""
    return {number for n, node in enumerate(tree.nodes) if node.correct for number in tree.path(n)}


def question_text(question: Question) -> str:
    """Return a question as text, a conversation with the role of every message."""
    if isinstance(question, str):
        return question
    return "\n".join(f"{message.role}: {message.content}" for message in question)


def outline(tree: Tree) -> str:
    """Return a tree as Markdown. A star marks the nodes on the way to a right answer."""
    nodes = {n: (node.parent, heading(node), node.text) for n, node in enumerate(tree.nodes) if n}
    title = f"**tree** {tree.prompt_id}, reference `{tree.answer}`, ended by {STOPS[tree.stop]}"
    question = code_block(question_text(tree.question))
    return "\n\n".join([title, question, code_block(_indented(nodes, right_nodes(tree)))])


def outline_group(group: TrajectoryGroup, decode: Callable[[Int32Array], str]) -> str:
    """Return the judged chains of a searched group as one tree, as Markdown."""
    nodes: dict[int, tuple[int, str, str]] = {}
    right: set[int] = set()
    for trajectory in group.trajectories:
        for step in trajectory.steps:
            nodes.setdefault(
                step.node, (step.parent, _step(step), decode(trajectory.token_ids[step.start : step.stop]))
            )
        if trajectory.correct:
            right |= {step.node for step in trajectory.steps}
    title = f"**tree** {group.prompt.prompt_id}, reference `{group.prompt.answer}`, {len(group.trajectories)} chains"
    return "\n\n".join([title, code_block(decode(group.prompt.token_ids)), code_block(_indented(nodes, right))])


def code_block(text: str) -> str:
    """Return a text as a code block of Markdown, which keeps its tags and spaces."""
    pieces = [piece for line in text.splitlines() for piece in (_at_tags(line) if len(line) > _COLUMNS else [line])]
    lines = [part for piece in pieces for part in textwrap.wrap(piece, _COLUMNS) or [""]]
    return textwrap.indent("\n".join(lines) or "(empty)", "    ", lambda _line: True)


def _at_tags(line: str) -> list[str]:
    """Return the parts of a line that begin with a tag directly behind another one."""
    return line.replace("><", ">\n<").split("\n")


def _step(step: Step) -> str:
    value = "" if step.value is None else f", value {step.value:.2f} of {step.visits}"
    return f"{step.type}{value}{', after a wrong answer' if step.backtrack else ''}"


def _indented(nodes: Mapping[int, tuple[int, str, str]], right: set[int]) -> str:
    """Return the nodes as lines, each below its parent and two columns to the right of it."""
    children: dict[int, list[int]] = {}
    for number, (parent, _, _) in sorted(nodes.items()):
        children.setdefault(parent, []).append(number)
    lines: list[str] = []
    waiting = [(number, 0) for number in reversed(children.get(0, []))]
    while waiting:
        number, depth = waiting.pop()
        _, title, text = nodes[number]
        lines.append(f"{'  ' * depth}{'* ' if number in right else '- '}{title}")
        lines += [f"{'  ' * depth}    {line}" for line in text.strip().splitlines()]
        waiting += [(child, depth + 1) for child in reversed(children.get(number, []))]
    return "\n".join(lines)
