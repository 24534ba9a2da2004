"""Define the shipped node types and transition tables, and check the tables of a config.

Source: Marco-o1 v2, arXiv:2503.01461, Figure 2 (the tables a to d), and its released search for letter counting.
The paper gives no counts. They come from the released program: two children of a type, one answer, one reflection.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from types import MappingProxyType

from rlsys.config.search import START, NodeTypeConfig, PatternConfig, SearchConfig
from rlsys.errors import ConfigError
from rlsys.trees import ENVIRONMENT

NODE_TYPES: Mapping[str, NodeTypeConfig] = MappingProxyType(
    {
        "sub_task": NodeTypeConfig(tag="sub-task", prefixes=("Firstly, I need to break down this task.",)),
        "thinking": NodeTypeConfig(tag="thinking"),
        "hypothesis": NodeTypeConfig(tag="hypothesis", prefixes=("I propose the following hypothesis:",)),
        "double_check": NodeTypeConfig(
            tag="double-check",
            prefixes=("Now, I need to check whether all requirements are met.",),
            writer="reviewer",
        ),
        "reflection": NodeTypeConfig(
            tag="reflection",
            prefixes=(
                "Let's check the result. Wait! something is wrong...",
                "Wait! There is a mistake in this, I have to think again.",
            ),
            writer="nobody",
        ),
        "reclarify": NodeTypeConfig(tag="reclarify", prefixes=("To ensure clarity, let me restate",)),
        "answer": NodeTypeConfig(tag="answer", prefixes=("The answer is:",), terminal=True),
        "thinking_from_scratch": NodeTypeConfig(
            tag="thinking-from-scratch",
            prefixes=(
                "The result above is wrong, I need to think about this question from the start.",
                "I leave aside what was said above, it is wrong, and think carefully.",
            ),
            writer="reviewer",
        ),
    }
)
"""The shipped node types by name. A type of the same name in search.nodes replaces it."""

TABLES: Mapping[str, PatternConfig] = MappingProxyType(
    {
        "a": PatternConfig(
            children={
                START: {"sub_task": 2},
                "sub_task": {"thinking": 2},
                "thinking": {"thinking": 2, "answer": 1},
                "reflection": {"thinking": 2},
            },
            after_wrong={"thinking": {"reflection": 1}},
        ),
        "b": PatternConfig(
            children={
                START: {"sub_task": 2},
                "sub_task": {"thinking": 2, "hypothesis": 2},
                "hypothesis": {"thinking": 2},
                "thinking": {"thinking": 2, "answer": 1},
            },
            after_wrong={"thinking": {"thinking": 1}},
        ),
        "c": PatternConfig(
            children={
                START: {"sub_task": 2},
                "sub_task": {"thinking": 2},
                "thinking": {"thinking": 2, "double_check": 2, "answer": 1},
                "double_check": {"thinking": 2, "answer": 1},
            },
        ),
        "d": PatternConfig(
            children={
                START: {"sub_task": 2},
                "sub_task": {"thinking": 2, "hypothesis": 2},
                "hypothesis": {"thinking": 2},
                "thinking": {"thinking": 2, "answer": 1},
                "reclarify": {"thinking": 2},
            },
            after_wrong={"thinking": {"reclarify": 1}},
        ),
        # The released program also has a row for `hypothesis`, which no other row leads to.
        "letter_count": PatternConfig(
            children={
                START: {"sub_task": 2},
                "sub_task": {"thinking": 2},
                "thinking": {"double_check": 2, "thinking": 2},
                "double_check": {"answer": 1},
                "reflection": {"thinking_from_scratch": 2},
                "thinking_from_scratch": {"thinking": 2},
            },
            after_wrong={"double_check": {"reflection": 1}},
        ),
    }
)
"""The shipped tables by name. A table of the same name in search.tables replaces it."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A checked transition table with its node types.

    Attributes:
        types: the node types in the table, by name.
        children: node type, or "start" for the prompt -> child type -> number of children. Terminal types have no row.
            A type whose only child is "environment" ends a turn, which an environment answers.
        after_wrong: node type -> child type -> maximum number. After a wrong answer, the nearest ancestor of the first
            type gets a child of the second type.
    """

    name: str
    types: Mapping[str, NodeTypeConfig]
    children: Mapping[str, Mapping[str, int]]
    after_wrong: Mapping[str, Mapping[str, int]]

    @property
    def ends(self) -> set[str]:
        """Types with which a chain may end: the terminal ones; without one, replies of an environment end it."""
        return _ends(self.types, self.children)

    @property
    def turn_ends(self) -> set[str]:
        """Types after which the environment answers."""
        return {name for name, row in self.children.items() if ENVIRONMENT in row}


def resolve(search: SearchConfig) -> dict[str, Pattern]:
    """Return the patterns of a config by name, in the order of search.patterns.

    Raises:
        ConfigError: a table cannot be searched; names the table and the row.
    """
    for name, meaning in ((START, "the prompt"), (ENVIRONMENT, "a reply of the environment")):
        if name in search.nodes:
            raise ConfigError(f"search.nodes.{name}: the name of {meaning} cannot be that of a node type; rename it")
    nodes, tables = {**NODE_TYPES, **search.nodes}, {**TABLES, **search.tables}
    patterns: dict[str, Pattern] = {}
    for name in search.patterns:
        if name not in tables:
            raise ConfigError(f"search.patterns: unknown table {name!r}; {_known(name, tables, 'search.tables')}")
        if name in patterns:
            raise ConfigError(f"search.patterns names the table {name!r} twice; name each once")
        patterns[name] = _pattern(name, tables[name], nodes, search.max_depth)
    return patterns


def _pattern(name: str, table: PatternConfig, nodes: Mapping[str, NodeTypeConfig], max_depth: int | None) -> Pattern:
    where = f"search.tables.{name}"
    if not table.children.get(START):
        raise ConfigError(f"{where}.children: expected a row `{START}`, the types that follow the prompt; add it")
    types = _types(where, table, nodes)
    _check_types(where, table, types)
    _check_replies(where, table)
    edges = _edges(table)
    _check_reach(where, table, types, edges)
    if max_depth is None:
        _check_loop(where, edges)
    elif (shortest := _shortest(table, types)) > max_depth:
        raise ConfigError(f"{where}: its shortest chain has {shortest} nodes, more than search.max_depth {max_depth}")
    children = {parent: row for parent, row in table.children.items() if row}
    return Pattern(name=name, types=types, children=children, after_wrong=table.after_wrong)


def _types(where: str, table: PatternConfig, nodes: Mapping[str, NodeTypeConfig]) -> dict[str, NodeTypeConfig]:
    """Return the node types in a table, in the order of their first mention."""
    types: dict[str, NodeTypeConfig] = {}
    for field, rows in (("children", table.children), ("after_wrong", table.after_wrong)):
        for parent, row in rows.items():
            for name in (parent, *row):
                if name == START and (name in row or field == "after_wrong"):
                    raise ConfigError(
                        f"{where}.{field}.{parent}: `{START}` is the prompt and no node type; take it out of this row"
                    )
                if name not in (START, ENVIRONMENT) and name not in nodes:
                    raise ConfigError(
                        f"{where}.{field}.{parent}: unknown node type {name!r}; "
                        f"{_known(name, {*nodes, ENVIRONMENT}, 'search.nodes')}"
                    )
                if name not in (START, ENVIRONMENT):
                    types[name] = nodes[name]
    return types


def _check_types(where: str, table: PatternConfig, types: Mapping[str, NodeTypeConfig]) -> None:
    """Raise if node types contradict themselves, each other or the rows."""
    by_tag: dict[str, str] = {}
    brackets = [string for node in types.values() for string in (f"<{node.tag}>", f"</{node.tag}>")]
    for name, node in types.items():
        if node.writer == "nobody" and not node.prefixes:
            raise ConfigError(
                f"{where}: nobody writes the node type {name!r}, so its prefix is its text, and it has none; "
                f"set search.nodes.{name}.prefixes or another writer"
            )
        if node.writer == "nobody" and node.terminal:
            raise ConfigError(
                f"{where}: nobody writes the node type {name!r}, but it is terminal, and an answer must be written; "
                f"change search.nodes.{name}.writer or terminal"
            )
        inside = next((string for string in brackets if any(string in prefix for prefix in node.prefixes)), None)
        if inside:
            raise ConfigError(
                f"search.nodes.{name}.prefixes: a prefix contains {inside}, but the search puts tags around a node's "
                "text itself; take it out"
            )
        if node.terminal and table.children.get(name):
            raise ConfigError(
                f"{where}.children.{name}: {name!r} is terminal, and nothing follows an answer; take this row out "
                f"or set search.nodes.{name}.terminal: false"
            )
        if node.terminal and name in table.after_wrong:
            raise ConfigError(
                f"{where}.after_wrong.{name}: {name!r} is terminal, and nothing follows an answer; name a type that "
                "comes before it"
            )
        other = by_tag.setdefault(node.tag, name)
        if other != name:
            raise ConfigError(
                f"{where}: the node types {other!r} and {name!r} both have the tag {node.tag!r}, so they cannot be "
                f"told apart; change search.nodes.{name}.tag"
            )


def _check_replies(where: str, table: PatternConfig) -> None:
    """Raise if replies of an environment stand where other nodes could, or need not, follow."""
    for parent, row in table.children.items():
        if ENVIRONMENT in row and (row != {ENVIRONMENT: 1} or parent in (START, ENVIRONMENT)):
            raise ConfigError(
                f"{where}.children.{parent}: a type that ends a turn has the reply as its only child: expected "
                f"{parent}: {{{ENVIRONMENT}: 1}}, with a node type as {parent}"
            )
    ends = {parent for parent, row in table.children.items() if ENVIRONMENT in row}
    for parent, row in table.after_wrong.items():
        if parent in ends or ENVIRONMENT in row:
            raise ConfigError(
                f"{where}.after_wrong.{parent}: a reply of the environment follows the end of a turn and nothing else; "
                f"give the row to the type {ENVIRONMENT}, or to a type before the end of the turn"
            )


def _ends(types: Mapping[str, NodeTypeConfig], children: Mapping[str, object]) -> set[str]:
    """Return the types with which a chain may end; see `Pattern.ends`."""
    terminal = {name for name, node in types.items() if node.terminal}
    return terminal or {ENVIRONMENT} & set(children)


def _edges(table: PatternConfig) -> dict[str, set[str]]:
    """Return, for each type, all types that may follow it, also after a wrong answer."""
    edges: dict[str, set[str]] = {}
    for rows in (table.children, table.after_wrong):
        for parent, row in rows.items():
            edges.setdefault(parent, set()).update(row)
    return edges


def _check_reach(
    where: str, table: PatternConfig, types: Mapping[str, NodeTypeConfig], edges: Mapping[str, Iterable[str]]
) -> None:
    """Raise if a row is never used, or if no answer can be reached from a used type."""
    reached = _closure({START}, edges)
    for field, rows in (("children", table.children), ("after_wrong", table.after_wrong)):
        for parent in rows:
            if parent not in reached:
                raise ConfigError(
                    f"{where}.{field}.{parent}: no row that can be reached from `{START}` leads to {parent!r}; "
                    "take this row out, or name the type in another row"
                )
    # Search backwards from the answers. Children after a wrong answer do not count, because they need an answer first.
    parents: dict[str, set[str]] = {}
    for parent, row in table.children.items():
        for child in row:
            parents.setdefault(child, set()).add(parent)
    answering = _closure(_ends(types, table.children), parents)
    for name in (START, *types, ENVIRONMENT):
        if name in reached and name not in answering:
            raise ConfigError(
                f"{where}.children.{name}: no way leads from {name!r} to a terminal type; give it a child that does"
            )


def _closure(names: set[str], edges: Mapping[str, Iterable[str]]) -> set[str]:
    """Return all types that can be reached from names, including the names."""
    reached, waiting = set(names), list(names)
    while waiting:
        new = set(edges.get(waiting.pop(), ())) - reached
        reached |= new
        waiting += new
    return reached


def _shortest(table: PatternConfig, types: Mapping[str, NodeTypeConfig]) -> int:
    """Return the number of nodes of the shortest chain from the prompt to an answer."""
    level, length, ends = {START}, 0, _ends(types, table.children)
    while not level & ends:
        level, length = {child for name in level for child in table.children.get(name, {})}, length + 1
    return length


def _check_loop(where: str, edges: Mapping[str, Iterable[str]]) -> None:
    """Raise if the table has a loop."""
    try:
        TopologicalSorter({parent: sorted(row) for parent, row in edges.items()}).prepare()
    except CycleError as error:
        loop = " -> ".join(reversed(error.args[1]))
        raise ConfigError(
            f"{where}: the loop {loop} has no end without a depth limit; set search.max_depth, or take a step of it out"
        ) from None


def _known(name: str, known: Iterable[str], section: str) -> str:
    """Return suggestions for an unknown name, for a message."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{meant}known: {', '.join(names)}; others are added in {section}"
