"""Trees as lines of JSON: one tree, or the failure that stands in its place, a line.

A line holds the fields of `Tree` or `TreeFailure` by their names, behind `"format": 1`; only a failure has a `reason`.
What timing decides (`TreeFailure.tokens`) is left out.
Lines are ASCII, so that no reader splits one at a separator inside a text. Log-probabilities are the shortest decimals
that read back to the same float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlsys.errors import DataError
from rlsys.trees import Defect, StopReason, ThoughtNode, Tree, TreeFailure, Writer
from rlsys.types import FinishReason, Outcome, Verdict, VersionSpan

FORMAT = 1
_SHOWN = 60

Count = Annotated[int, Field(ge=0)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


def tree_line(tree: Tree | TreeFailure) -> str:
    """The line of a tree, without its line end. Equal trees give equal lines.

    Raises:
        ValueError: a number of the tree is not finite.
    """
    return json.dumps({"format": FORMAT, **_plain(tree)}, separators=(",", ":"), allow_nan=False)


def parse_line(text: str, where: str = "tree") -> Tree | TreeFailure:
    """The tree of a line.

    Args:
        where: where the line stands, for the message.
    Raises:
        DataError: the line is not exactly what `tree_line` writes; says which field, what was expected and found.
    """
    try:
        values = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_not_finite)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else values
            raise ValueError(f"expected an object with format {FORMAT}, found {_short(found)}")
        if "reason" in values:
            failure = dict(_FailureLine.model_validate(values))
            failure.pop("format")
            return TreeFailure(**failure)
        return _tree(_TreeLine.model_validate(values))
    except ValidationError as error:
        raise DataError(f"{where}: {_first(error)}") from None
    except RecursionError:
        raise DataError(f"{where}: expected a tree, found JSON that is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None


def read_trees(path: Path) -> Iterator[Tree | TreeFailure]:
    """The trees of a file, in its order.

    Raises:
        DataError: the file cannot be read, or a line is no tree; names file and line.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith("\n"):
                    raise DataError(f"{path}, line {number}: expected a line end, found the file cut off")
                yield parse_line(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


class _Line(BaseModel):
    """Strict: no key too many or too few, no conversion between types, finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _VersionLine(_Line):
    start: Count
    version: int


class _VerdictLine(_Line):
    outcome: Outcome
    reward: float
    answered: bool
    detail: str


class _NodeLine(_Line):
    parent: int
    type: str
    text: str
    token_ids: list[TokenId]
    forced: Count
    logprobs: list[float]
    spill: str
    writer: Writer
    finish_reason: FinishReason | None
    versions: list[_VersionLine]
    defect: Defect | None
    backtrack: bool
    samples: Count
    visits: Count
    total: float
    verdict: _VerdictLine | None
    scored: Annotated[int, Field(ge=-1)]
    scored_tokens: Count


class _TreeLine(_Line):
    format: int
    prompt_id: str
    question: str
    answer: str
    pattern: str
    tokenizers: dict[str, str]
    models: dict[str, str]
    prompt_token_ids: dict[str, list[TokenId]]
    nodes: Annotated[list[_NodeLine], Field(min_length=1)]
    stop: StopReason
    simulations: Count
    calls: Count
    tokens: Count
    counts: dict[str, int]


class _FailureLine(_Line):
    format: int
    prompt_id: str
    question: str
    answer: str
    reason: str


def _tree(line: _TreeLine) -> Tree:
    values = dict(line)
    values.pop("format")
    values["prompt_token_ids"] = {name: np.array(ids, np.int32) for name, ids in line.prompt_token_ids.items()}
    values["nodes"] = tuple(_node(number, node) for number, node in enumerate(line.nodes))
    return Tree(**values)


def _node(number: int, line: _NodeLine) -> ThoughtNode:
    """Raises ValueError where the numbers of a node contradict each other."""
    where, tokens = f"nodes.{number}", len(line.token_ids)
    if not (-1 if number == 0 else 0) <= line.parent <= number - 1:
        expected = "-1" if number == 0 else f"0 to {number - 1}"
        raise ValueError(f"{where}.parent: expected {expected}, found {line.parent}")
    if len(line.logprobs) != tokens:
        raise ValueError(f"{where}.logprobs: expected one for each of {tokens} token_ids, found {len(line.logprobs)}")
    if line.forced > tokens:
        raise ValueError(f"{where}.forced: expected at most the {tokens} token_ids, found {line.forced}")
    values = dict(line)
    values["token_ids"] = np.array(line.token_ids, np.int32)
    with np.errstate(over="ignore"):
        values["logprobs"] = np.array(line.logprobs, np.float32)
    if not np.isfinite(values["logprobs"]).all():
        raise ValueError(f"{where}.logprobs: expected numbers of float32, found a larger one")
    values["versions"] = tuple(VersionSpan(**dict(span)) for span in line.versions)
    values["verdict"] = None if line.verdict is None else Verdict(**dict(line.verdict))
    return ThoughtNode(**values)


def _plain(value: Any) -> Any:
    """JSON-able values, in an order that only the value decides."""
    if isinstance(value, np.ndarray):
        return value.tolist() if value.dtype.kind == "i" else [float(str(number)) for number in value]
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value) if field.compare}
    if isinstance(value, Mapping):
        return {name: _plain(value[name]) for name in sorted(value)}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"expected every key once, found {name} twice")
        found[name] = value
    return found


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"expected finite numbers, found {text}")


def _first(error: ValidationError) -> str:
    """One line for the first thing wrong, of which pydantic lists all."""
    first = error.errors(include_url=False)[0]
    name, kind = ".".join(map(str, first["loc"])), first["type"]
    if kind == "missing":
        return f"{name}: expected this key, found none"
    if kind == "extra_forbidden":
        return f"{name}: expected no such key"
    return f"{name}: {first['msg']}, found {_short(first['input'])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
