"""Searched trees as indented text."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping

from rlsys.trees import ThoughtNode, Tree
from rlsys.types import Int32Array, Step, TrajectoryGroup

_COLUMNS = 110


def heading(node: ThoughtNode) -> str:
    """Return type, value, visits, estimate and surprise of a node, and what else there is to know of it."""
    parts = [node.type]
    if node.value is not None:
        parts.append(f"value {node.value:.2f} of {node.visits}")
    if node.estimate is not None:
        parts.append(f"estimate {node.estimate:.2f}")
    if node.generated:
        parts.append(f"surprise {max(-float(logprob) for logprob in node.logprobs):.2f}")
    if node.samples > 1:
        parts.append(f"drawn {node.samples} times")
    if node.backtrack:
        parts.append("after a wrong answer")
    if node.defect:
        parts.append(node.defect)
    if node.verdict:
        parts.append(f"{node.verdict.outcome}, reward {node.verdict.reward:g}")
    return ", ".join(parts)


def outline(tree: Tree) -> str:
    """Return a tree as Markdown. A star marks the nodes on the way to a right answer."""
    right = {number for n, node in enumerate(tree.nodes) if node.correct for number in tree.path(n)}
    question = tree.question if isinstance(tree.question, str) else tree.question[-1].content
    nodes = {n: (node.parent, heading(node), node.text) for n, node in enumerate(tree.nodes) if n}
    title = f"**tree** {tree.prompt_id}, reference `{tree.answer}`, ended by {tree.stop}"
    return "\n\n".join([title, code_block(question), code_block(_indented(nodes, right))])


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
