"""Searched trees: their nodes, and failed searches.

These dataclasses declare the content of a tree file, too: `rlsys.search.tree_json` writes and reads their fields.
Bounds of integers are checked when a tree is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from rlsys.types import OPTIONAL, FinishReason, Float32Array, Int32Array, Question, Verdict, VersionSpan

Role = Literal["policy", "model", "reviewer", "judge", "teacher"]
"""Role of an engine. The policy or, if there is one, search.model proposes the nodes of a tree; search.reviewer writes
some of them. The judge (search.value of type model) and the teacher write none."""

Defect = Literal[
    "truncated",
    "unclosed",
    "malformed",
    "unanswered",
    "wrong_step",
    "off_pattern",
    "too_deep",
    "too_long",
    "pruned",
]
"""Reason why no node may follow a node.

In the first five cases the chain failed without an answer:
    truncated: The chain or the context was full, within the node or after it.
    unclosed: The node ended without its closing tag.
    malformed: There is a tag or other text where none may be, or text after the answer.
    unanswered: The node is whole, but the model ended the chain after it.
    wrong_step: The node is whole, but the task says that the step is wrong, and all after it was dropped.
In the other cases the search does not continue below the node:
    off_pattern: The type of the node may not follow the type of its parent.
    too_deep: The chain has more nodes than search.max_depth.
    too_long: The node has more tokens than its type may have.
    pruned: The node is whole, but its estimate is below search.value.prune_below.
"""

ENDINGS: frozenset[Defect] = frozenset({"truncated", "unclosed", "malformed", "unanswered", "wrong_step"})
"""Defects with which a chain has failed. The others are limits of the search."""

ENDED_BY_VALUE: frozenset[Defect] = frozenset({"wrong_step", "pruned"})
"""Defects of whole nodes whose value has ended the chain. What their completions held after them was dropped."""

TEXT = "text"
"""Type of a piece of a chain that does not begin with the tag of a known node."""

ENVIRONMENT = "environment"
"""Type of a node with the reply of an environment to a turn of the policy. All its tokens are forced."""

StopReason = Literal["correct", "simulations", "tokens", "answers", "sure", "exhausted"]


def answer_text(node_text: str) -> str:
    """Return the text of an answer without its tags, with single spaces."""
    return " ".join(node_text.strip().partition(">")[2].rpartition("<")[0].split())


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtNode:
    """One typed span of a chain. Node 0 is the prompt: type "start", no parent, no tokens.

    Attributes:
        parent: Number of the parent, -1 for node 0. A parent has a smaller number than its children.
        type: Name of the node type.
        text: The node with its tags. The joined texts along a path are the completion.
        token_ids: [T] int32, in the writer's tokenizer: first the forced tokens (opening tag, prefix), then the
            generated tokens.
        forced: Number of tokens at the start that the search put there.
        logprobs: [T] float32, nats, of the distribution sampled from; 0 for forced tokens.
        spill: Text after the closing tag that the last token also holds ("<" of a token "><"). This text belongs to
            the next node, not to `text`. The next node's own tokens begin after it.
        writer: Role of the engine that wrote the node.
        finish_reason: Finish reason of the engine call that produced the node; None if nothing was generated. "turns"
            for the last turn of a chain that has used up its turns, "length" for one whose reply leaves no room.
        versions: Weight versions of the generated tokens, by index into token_ids.
        defect: Reason why no node may follow; None for a whole node.
        backtrack: Whether the search put the node there after a wrong answer.
        samples: Number of times the writer drew exactly this node from this parent (duplicates are merged).
        estimate: Value that `search.value` gave the node when it was new; None without one.
        visits: Number of chains that ended at or below the node, including repeated draws. These are the scored
            answers and the chains that the proposing model ended without an answer.
        total: Sum of the rewards of these chains.
        verdict: Verdict on the chain that ends here; None unless it is judged. A chain that failed without an answer is
            judged as the completion or the episode that it is. If that would go on, the chain has reward 0.
        scored: Place of this answer among the scored answers of the tree (outcome ok or wrong), from 0; otherwise -1.
        scored_tokens: Total of tokens that the tree had generated when the answer was scored.
    """

    parent: int
    type: str
    text: str
    token_ids: Int32Array
    forced: NonNegativeInt
    logprobs: Float32Array
    spill: str = ""
    writer: Role = "policy"
    finish_reason: FinishReason | None = None
    versions: tuple[VersionSpan, ...] = ()
    defect: Defect | None = None
    backtrack: bool = False
    samples: NonNegativeInt = 1
    visits: NonNegativeInt = 0
    total: float = 0.0
    verdict: Verdict | None = None
    scored: Annotated[int, Field(ge=-1)] = -1
    scored_tokens: NonNegativeInt = 0
    estimate: float | None = field(default=None, metadata=OPTIONAL)

    @property
    def generated(self) -> int:
        """Number of tokens that a model chose."""
        return len(self.token_ids) - self.forced

    @property
    def value(self) -> float | None:
        """Mean reward of the chains that ended at or below the node; None without visits."""
        return self.total / self.visits if self.visits else None

    @property
    def correct(self) -> bool:
        """True if the node is a scored answer that is right."""
        return self.scored >= 0 and self.verdict is not None and self.verdict.correct


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A finished search of one prompt.

    Attributes:
        tokenizers: Digest of the tokenizer of each writer that may have written nodes.
        models: Digest of each writer's model as its engine was started. The weight versions of the nodes give the
            number of later training steps. In the stage `search`, the policy's digest is that of its first weights.
        prompt_token_ids: Token ids of the prompt for each writer.
        nodes: Nodes in the order in which they were added.
        stop: Reason why the search ended.
        simulations: Number of simulations begun.
        calls: Number of completions requested from engines.
        tokens: Number of tokens generated by all writers, including those of merged duplicates.
        counts: Other events by name: defects, merged duplicates, verifier errors and timeouts, backtracks; nodes for
            which a value was asked and failed, and generated tokens that were dropped after a node that was ended.
    """

    prompt_id: str
    question: Question
    answer: str
    pattern: str
    tokenizers: Mapping[str, str]
    models: Mapping[str, str]
    prompt_token_ids: Mapping[str, Int32Array]
    nodes: tuple[ThoughtNode, ...]
    stop: StopReason
    simulations: NonNegativeInt
    calls: NonNegativeInt
    tokens: NonNegativeInt
    counts: Mapping[str, int]

    @property
    def failed_values(self) -> int:
        """Number of nodes whose value was asked for and failed."""
        return self.counts.get("value_error", 0) + self.counts.get("value_timeout", 0)

    @property
    def proposer(self) -> Role:
        """Role that proposed the nodes of the tree."""
        return "model" if "model" in self.tokenizers else "policy"

    def path(self, number: int) -> list[int]:
        """Return the numbers of the nodes from the first one below the prompt to `number`."""
        numbers = []
        while number > 0:
            numbers.append(number)
            number = self.nodes[number].parent
        return numbers[::-1]

    def answers(self) -> list[int]:
        """Return the numbers of the scored terminal nodes in the order in which they were scored."""
        return sorted((n for n, node in enumerate(self.nodes) if node.scored >= 0), key=lambda n: self.nodes[n].scored)

    @property
    def most_frequent(self) -> int | None:
        """Number of a node with the answer that was drawn most often, the first of equal ones; None without answers."""
        draws = Counter[str]()
        answers = [n for n in self.answers() if self.nodes[n].finish_reason != "turns"]  # a last turn is no answer
        for number in answers:
            draws[answer_text(self.nodes[number].text)] += self.nodes[number].samples
        best = max(draws, key=draws.__getitem__, default="")
        return next((n for n in answers if answer_text(self.nodes[n].text) == best), None)

    def completion(self, number: int) -> str:
        """Return the text of the chain that ends at a node."""
        return "".join(self.nodes[n].text for n in self.path(number))

    @property
    def solved(self) -> bool:
        return any(node.correct for node in self.nodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeFailure:
    """A prompt whose tree could not be grown.

    A failure is data: it is counted, and stored in the place of the tree.

    Attributes:
        tokens: Number of tokens that had been generated for the prompt when it failed. Timing decides this number, so
            it takes no part in comparisons and is not in the file.
    """

    prompt_id: str
    question: Question
    answer: str
    reason: str
    tokens: int = field(default=0, compare=False)
