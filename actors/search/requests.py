"""What a tree asks of the world, and what it is told: completions of a writer, verdicts of the verifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rlsys.search.codec import Reading, Stop
from rlsys.trees import Writer
from rlsys.types import FinishReason, Float32Array, Int32Array, VersionSpan


class Codec(Protocol):
    """The tokenizer's side of thought nodes; see `rlsys.search.codec.TagCodec`."""

    digest: str

    def encode(self, text: str) -> list[int]: ...

    def prompt(self, question: str) -> list[int]: ...

    def stop(self, tag: str) -> Stop: ...

    def read(self, before: str, token_ids: Sequence[int], finish_reason: str) -> list[Reading]: ...


class Drawn(Protocol):
    """A completion; see `actors.engine.Completion`."""

    @property
    def token_ids(self) -> Int32Array: ...
    @property
    def logprobs(self) -> Float32Array: ...
    @property
    def finish_reason(self) -> FinishReason: ...
    @property
    def versions(self) -> tuple[VersionSpan, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchWriter:
    """A model as one tree sees it: its digest, its tokenizer, the prompt in its tokens, and the room it has."""

    model: str
    codec: Codec
    prompt_ids: tuple[int, ...]
    max_model_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One completion to draw. token_ids: prompt, chain so far and forced tokens."""

    writer: Writer
    token_ids: list[int]
    seed: int
    max_tokens: int
    stop: Stop


@dataclass(frozen=True, slots=True)
class Ask:
    """Completions that belong together: the answer is a list of `Drawn`, in the order of the calls."""

    number: int
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Judge:
    """A chain to score: the answer is a `Verdict`."""

    number: int
    completion: str
