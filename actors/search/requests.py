"""Requests of a tree search: completions of a model, verdicts of the verifier and values of nodes."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from rlsys.search.codec import Stop, TagCodec
from rlsys.trees import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchModel:
    """A model in the search of one prompt.

    Attributes:
        model: Digest of the model.
        prompt_ids: The prompt in the model's tokens.
        max_model_len: Longest context in tokens, prompt included.
    """

    model: str
    codec: TagCodec
    prompt_ids: tuple[int, ...]
    max_model_len: int


def proposing_role(roles: Container[Role]) -> Role:
    """Return the role that proposes the nodes of a tree: "model" if it is among `roles`, otherwise "policy"."""
    return "model" if "model" in roles else "policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One completion to draw.

    Attributes:
        token_ids: Prompt, chain so far and forced tokens.
    """

    role: Role
    token_ids: list[int]
    seed: int
    max_tokens: int
    stop: Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCall:
    """A call, and the information that is needed to read its completion.

    Attributes:
        type: Type of the requested node; None if the model chooses the types of a whole chain.
        forced: Tokens that the search puts before the completion.
        spill: First characters of the node, which the last token of the context already holds.
        backtrack: Whether the node is requested because of a wrong answer.
        limited_by_type: Whether the node type's token limit ends the call before the chain or the context is full.
    """

    type: str | None
    role: Role
    forced: list[int]
    spill: str
    backtrack: bool
    limited_by_type: bool
    call: Call


@dataclass(frozen=True, slots=True)
class Ask:
    """Request for completions. The answer is a list of `Completion`, in the order of the calls."""

    number: int
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Judge:
    """Request for a verdict on a chain. The answer is a `Verdict`.

    Attributes:
        finished: False if a bound of tokens cut the chain off.
    """

    number: int
    completion: str
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Turn:
    """Request for the reply of an environment. The answer is a `Reply`, or the `Verdict` of a failure.

    Attributes:
        turns: Texts of the policy so far.
    """

    number: int
    turns: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thoughts:
    """Successive new nodes of one chain, whole and not terminal.

    Attributes:
        before: Texts of the nodes before them, from the first one below the prompt.
        texts: Texts of the new nodes.
        rollouts: Calls for the rest of the chain, for each new node; only for values of type rollouts.
    """

    before: tuple[str, ...]
    texts: tuple[str, ...]
    rollouts: tuple[tuple[PlannedCall, ...], ...] = ()

    def chain(self, number: int) -> str:
        """Return the text of the chain that ends with a new node."""
        return "".join((*self.before, *self.texts[: number + 1]))


@dataclass(frozen=True, slots=True)
class Value:
    """Request for the values of new nodes. The answer is a `Values`."""

    number: int
    lines: tuple[Thoughts, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """Answer to a `Value`.

    Attributes:
        values: Value of each node of each line; None without one.
        failed: Number of nodes without a value because of a failure, by its kind: "error" or "timeout".
        tokens: Tokens that were generated for the values.
    """

    values: tuple[tuple[float | None, ...], ...]
    failed: Mapping[str, int] = field(default_factory=dict)
    tokens: int = 0


Request = Ask | Judge | Turn | Value
