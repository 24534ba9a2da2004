"""Dataclasses of a publish: the tensors of a weight version, their buckets, the offer to actors and their answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

from rlsys.types import Float32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """The Hugging Face name, shape and torch dtype name of one published tensor.

    Attributes:
        alias: whether this is another name of the tensor before it, whose bytes are not sent again.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    alias: bool = False

    @property
    def bytes(self) -> int:
        if self.alias:
            return 0
        # As in bfloat16 and float8_e4m3fn.
        bits = 8 if self.dtype == "bool" else int(self.dtype.lstrip(ascii_lowercase).partition("_")[0])
        return bits // 8 * math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """Consecutive tensors, flattened into one byte array.

    Attributes:
        digest: xxh3_128 of the bytes, in hexadecimal.
    """

    tensors: tuple[TensorSpec, ...]
    digest: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """The contents of a publish, in the order of sending. It is complete once the learner has sent everything.

    Attributes:
        version: the weight version.
        attempt: as in `VersionSpan`.
    """

    version: int
    buckets: tuple[WeightBucket, ...]
    attempt: int = 0

    @property
    def bytes(self) -> int:
        return sum(bucket.bytes for bucket in self.buckets)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightOffer:
    """A weight version that actors can receive from learner rank 0, also while the rank still gathers it.

    Attributes:
        version: the weight version.
        attempt: as in `VersionSpan`.
        source: handle of the process that answers for buckets, picklable; only the receiver looks into it.
    """

    version: int
    attempt: int
    source: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightAck:
    """An actor's answer to a publish: the version that it now serves, and the log-probabilities of the probe.

    Attributes:
        probe_logprobs: one [T-1] float32 array for each probe row, log p(token t+1 | tokens 0..t), in nats.
        attempt: as in `VersionSpan`.
    """

    actor: str
    version: int
    probe_logprobs: tuple[Float32Array, ...]
    attempt: int = 0
