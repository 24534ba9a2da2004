"""Expansion of a node: the calls for its children, and children with a fixed text."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from actors.rollouts.seeds import sample_seed
from actors.search.requests import Call, PlannedCall, SearchModel, proposing_role
from actors.search.tree import GrowingTree, NewNode, Node
from rlsys.config.search import SearchConfig
from rlsys.search.codec import Stop
from rlsys.search.paths import node_ids
from rlsys.trees import ENVIRONMENT, Role


@dataclass(slots=True)
class Plan:
    """The calls of an expansion, and its new nodes with a fixed text.

    Attributes:
        redraws: Whether the first token is drawn in place of one that was drawn before.
    """

    calls: list[PlannedCall] = field(default_factory=list)
    fixed: list[NewNode] = field(default_factory=list)
    redraws: bool = False


class Expander:
    """Planner of the expansions of one tree. It draws prefixes from the tree's random generator.

    Args:
        tree_seed: run.seed and the prompt's id. They decide the seeds of all calls.
        max_chain_tokens: Longest chain, in tokens of the model that continues it, without replies of an environment.
        turn_stop: Strings that end a turn, beside an environment.
    """

    def __init__(
        self,
        tree: GrowingTree,
        config: SearchConfig,
        models: Mapping[Role, SearchModel],
        rng: random.Random,
        *,
        tree_seed: tuple[int, str],
        max_chain_tokens: int,
        turn_stop: tuple[str, ...] = (),
    ) -> None:
        self._turn_stop = Stop(strings=turn_stop)
        self._tree, self._config, self._models, self._rng = tree, config, models, rng
        self._types = tree.pattern.types
        self._proposer = proposing_role(models)
        self._seed, self._max_chain_tokens = tree_seed, max_chain_tokens
        self._draws: dict[int, int] = {}

    def children(self, node: Node) -> Plan:
        """Plan all children that the table allows. Siblings that a model writes share the prefix of their type."""
        plan = Plan()
        for name, count in self._tree.allowed(node).items():
            self._plan_nodes(plan, node, name, count, backtrack=False)
        return plan

    def single(self, node: Node, name: str, *, backtrack: bool) -> Plan:
        """Plan one child of a type."""
        plan = Plan()
        self._plan_nodes(plan, node, name, 1, backtrack=backtrack)
        return plan

    def chain(self, node: Node) -> Plan:
        """Plan the rest of a chain. The proposer chooses the types of its nodes."""
        return Plan(self._planned_calls(node, None, self._proposer, "", 1))

    def backtrack(self, node: Node, name: str) -> tuple[Literal["chain", "single"], Plan]:
        """Plan a child after a wrong answer, and the rest of its chain if the proposer writes whole chains."""
        if not self._tree.chains or self.role_of(name) in (None, "reviewer"):
            return "single", self.single(node, name, backtrack=True)
        text = f"<{self._types[name].tag}>{self._prefix(name)}"
        return "chain", Plan(self._planned_calls(node, name, self._proposer, text, 1, backtrack=True))

    def redraw(self, node: Node, kept: int) -> Plan:
        """Plan the rest of a chain that keeps the first `kept` tokens of a node and draws all others again."""
        assert node.parent is not None  # noqa: S101 - the prompt has no tokens of its own
        forced = list(node.token_ids[:kept])
        return Plan(self._planned_calls(node.parent, None, self._proposer, "", 1, forced=forced), redraws=True)

    def rollouts(self, node: Node, count: int) -> list[PlannedCall]:
        """Return calls for the rest of a chain after a node, which may be a draft."""
        return self._planned_calls(node, None, self._proposer, "", count)

    def role_of(self, name: str) -> Role | None:
        """Return the role that writes nodes of a type; None if their text is fixed."""
        writer = self._types[name].writer
        if writer == "nobody":
            return None
        return "reviewer" if writer == "reviewer" and "reviewer" in self._models else self._proposer

    def _plan_nodes(self, plan: Plan, node: Node, name: str, count: int, *, backtrack: bool) -> None:
        node_type, role = self._types[name], self.role_of(name)
        if role is None:
            count = min(count, len(node_type.prefixes))
            if self._has_other_beginning(node, f"<{node_type.tag}>"):
                return
            for text in self._rng.sample(node_type.prefixes, count):
                plan.fixed.append(self._fixed_node(node, name, text, backtrack))
            return
        text = f"<{node_type.tag}>{self._prefix(name)}"
        stop = self._models[role].codec.stop
        plan.calls += self._planned_calls(node, name, role, text, count, stop=stop, backtrack=backtrack)

    def _planned_calls(
        self,
        node: Node,
        name: str | None,
        role: Role,
        text: str,
        count: int,
        *,
        stop: Stop | None = None,
        backtrack: bool = False,
        forced: Sequence[int] = (),
    ) -> list[PlannedCall]:
        """Return `count` calls that differ only in their seeds.

        Return none if the context leaves no room for a token, or if its last token begins another node. The tree counts
        both cases, as "no_room" and "other_node_begun".

        Args:
            text: Text that the search puts before the completion.
            stop: Stop at the end of the requested node; None to request the rest of the chain.
            forced: Tokens that the search puts before the completion, if there is no text.
        """
        model = self._models[role]
        if text and self._has_other_beginning(node, text):
            return []
        context, spill = self._context(node, role)
        forced = model.codec.encode(text.removeprefix(spill)) if text else list(forced)
        ids = [*context, *forced]
        room = self._room(node, model, len(ids))
        if room < 1:
            self._tree.counts["no_room"] += count
            return []
        max_tokens = room
        if stop is None:
            stop = self._turn_stop
        elif name is not None:
            max_tokens = min(room, self._types[name].max_tokens or self._config.max_node_tokens)
        return [
            PlannedCall(
                type=name,
                role=role,
                forced=forced,
                spill=spill,
                backtrack=backtrack,
                limited_by_type=max_tokens < room,
                call=Call(role=role, token_ids=ids, seed=self._seed_of(node), max_tokens=max_tokens, stop=stop),
            )
            for _ in range(count)
        ]

    def _room(self, node: Node, model: SearchModel, length: int) -> int:
        """Return the number of tokens that may follow a context of some length whose chain goes on after a node."""
        replies = sum(len(step.token_ids) for step in node.path() if step.type == ENVIRONMENT)
        own = length - len(model.prompt_ids) - replies
        return min(model.max_model_len - length, self._max_chain_tokens - own)

    def _seed_of(self, node: Node) -> int:
        """Return the seed of the next draw from a node."""
        draw = self._draws[node.number] = self._draws.get(node.number, -1) + 1
        run_seed, prompt_id = self._seed
        return sample_seed(run_seed, prompt_id, f"{node.number}.{draw}")

    def _has_other_beginning(self, node: Node, text: str) -> bool:
        """Return whether a node's last token begins another text than `text`. Count it as "other_node_begun"."""
        if text.startswith(node.spill):
            return False
        self._tree.counts["other_node_begun"] += 1
        return True

    def _context(self, node: Node, role: Role) -> tuple[list[int], str]:
        """Return the tokens of prompt and chain for a model, and the spill of the last token."""
        model = self._models[role]
        ids, spill = list(model.prompt_ids), ""
        for step, tokens in node_ids(node.path(), lambda writer: self._is_native(writer, role), model.codec):
            ids += tokens
            spill = step.spill if self._is_native(step.writer, role) else ""
        return ids, spill

    def _is_native(self, writer: Role, reader: Role) -> bool:
        return self._models[writer].codec.digest == self._models[reader].codec.digest

    def _prefix(self, name: str) -> str:
        prefixes = self._types[name].prefixes
        return self._rng.choice(prefixes) if prefixes else ""

    def _fixed_node(self, node: Node, name: str, text: str, backtrack: bool) -> NewNode:
        tag = self._types[name].tag
        whole = f"<{tag}>{text}</{tag}>"
        _, spill = self._context(node, self._proposer)
        ids = self._models[self._proposer].codec.encode(whole.removeprefix(spill))
        return NewNode(
            type=name,
            text=whole,
            token_ids=ids,
            forced=len(ids),
            logprobs=(),
            spill="",
            writer=self._proposer,
            finish_reason=None,
            versions=(),
            defect=None,
            backtrack=backtrack,
        )
