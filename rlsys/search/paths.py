"""Tokens of a path through a tree, in the tokenizer of the model that reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from rlsys.trees import Role, Tree
from rlsys.types import BoolArray, Float32Array, Int32Array, Question, VersionSpan


class Codec(Protocol):
    """Interface to a tokenizer; see `rlsys.search.codec.TagCodec`."""

    digest: str

    def encode(self, text: str) -> list[int]: ...

    def prompt(self, question: Question) -> list[int]: ...


class PathNode(Protocol):
    """Common interface of the nodes of growing and finished trees."""

    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> Sequence[int] | Int32Array: ...
    @property
    def spill(self) -> str: ...
    @property
    def writer(self) -> Role: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PathTokens:
    """A chain as tokens of the policy.

    Attributes:
        token_ids: [T] int32, prompt first.
        prompt_length: Number of tokens of the prompt.
        chosen: [T] bool, True for tokens that the policy itself chose.
        logprobs: [T] float32, nats, 0 for tokens that the policy did not choose.
        versions: Weight versions of the chosen tokens.
        spans: (node, start, stop) of each node of the chain.
    """

    token_ids: Int32Array
    prompt_length: int
    chosen: BoolArray
    logprobs: Float32Array
    versions: tuple[VersionSpan, ...]
    spans: tuple[tuple[int, int, int], ...]


def node_ids(
    path: Sequence[PathNode], is_native: Callable[[Role], bool], codec: Codec
) -> Iterator[tuple[PathNode, Sequence[int] | Int32Array]]:
    """Yield each node with its tokens.

    A node keeps its own tokens if its writer has the codec's tokenizer (`is_native`). Otherwise its text is encoded,
    without the characters that the last token of the previous node already holds (`spill`).
    """
    spill = ""
    for node in path:
        if is_native(node.writer):
            yield node, node.token_ids
            spill = node.spill
        else:
            yield node, codec.encode(node.text.removeprefix(spill))
            spill = ""


def prompt_tokens(tree: Tree, codec: Codec) -> Int32Array:
    """Return the policy's prompt, [T] int32."""
    own = tree.prompt_token_ids.get("policy")
    return own if own is not None else np.asarray(codec.prompt(tree.question), dtype=np.int32)


def path_tokens(tree: Tree, number: int, codec: Codec) -> PathTokens:
    """Return the chain from the prompt to a node in the policy's tokens.

    Args:
        tree: A finished tree.
        number: Number of the last node.
        codec: Codec of the policy.
    """
    prompt = prompt_tokens(tree, codec)
    path = tree.path(number)
    parts: list[Sequence[int] | Int32Array] = [prompt]
    chosen, logprobs = [np.zeros(len(prompt), dtype=np.bool_)], [np.zeros(len(prompt), dtype=np.float32)]
    spans, versions, start = [], [], len(prompt)
    nodes = node_ids([tree.nodes[n] for n in path], lambda writer: tree.tokenizers[writer] == codec.digest, codec)
    for (_, ids), n in zip(nodes, path, strict=True):
        node, stop = tree.nodes[n], start + len(ids)
        own = node.writer == "policy" and tree.tokenizers["policy"] == codec.digest
        parts.append(ids)
        chosen.append(np.arange(len(ids)) >= node.forced if own else np.zeros(len(ids), dtype=np.bool_))
        logprobs.append(node.logprobs if own else np.zeros(len(ids), dtype=np.float32))
        versions += [replace(span, start=start + span.start) for span in node.versions if own]
        spans.append((n, start, stop))
        start = stop
    return PathTokens(
        token_ids=np.concatenate([np.asarray(part, dtype=np.int32) for part in parts]),
        prompt_length=len(prompt),
        chosen=np.concatenate(chosen),
        logprobs=np.concatenate(logprobs),
        versions=tuple(versions),
        spans=tuple(spans),
    )
