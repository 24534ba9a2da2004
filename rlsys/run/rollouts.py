"""Rows about rollouts: the text, the tokens and the judgement of some completions of a training step.

A row is one completion. Its keys are those of `completion_row` and, once a step has trained it, of `with_values`;
`rlsys.run.rollout_files` writes and reads the files.
The choice of prompts depends on their ids alone, so two runs on the same prompts keep the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash

from rlsys.interfaces import TokenValues
from rlsys.run.judgements import by_reward, group_facts, judgement, own_logprobs, reward_of
from rlsys.types import Float32Array, Trajectory, TrajectoryGroup

FORMAT = 2
READABLE = (1, FORMAT)
"""Formats that can be read. Rows of format 1 have no keys of `with_values`."""
KEPT_STEPS = 1000
"""About the largest number of steps of a stage with kept rollouts."""
COMPLETIONS = 4  # of a prompt
HEAD_TOKENS, TAIL_TOKENS = 3072, 1024  # of a longer completion, the tokens between are left out
_CHARACTERS = 20_000  # of a prompt
_DETAIL = 2_000  # characters of a verifier's reason
_PENDING = 8  # tokens that one character may take

Decode = Callable[[Sequence[int]], str]
Row = Mapping[str, Any]


def is_kept(step: int, steps: int) -> bool:
    """Return whether rollouts of a step are kept, for a stage with a number of steps."""
    interval = math.ceil(steps / KEPT_STEPS)
    return step % interval == 0 or step in (1, steps)


def choose_groups(groups: Sequence[TrajectoryGroup], count: int) -> list[int]:
    """Return the numbers of the kept groups of a step, by a digest of their prompt ids."""
    digests = [xxhash.xxh3_64_digest(group.prompt.prompt_id.encode()) for group in groups]
    return sorted(range(len(groups)), key=digests.__getitem__)[:count]


def choose_completions(group: TrajectoryGroup) -> list[int]:
    """Return the numbers of the kept completions of a group: the best one, the worst one, and the first others."""
    judged = [n for n, trajectory in enumerate(group.trajectories) if trajectory.judged]
    best_first = by_reward(judged, "best", lambda n: reward_of(group.trajectories[n]))
    order = [*best_first[:1], *best_first[-1:], *range(len(group.trajectories))]
    return sorted(list(dict.fromkeys(order))[:COMPLETIONS])


def choose_places(groups: Sequence[TrajectoryGroup], count: int) -> tuple[tuple[int, int], ...]:
    """Return the numbers of group and completion of every kept completion of a step, in the order of the rows."""
    return tuple(
        (group, number) for group in choose_groups(groups, count) for number in choose_completions(groups[group])
    )


class TokenTexts:
    """Texts of single tokens, which joined are the text of all of them.

    A token may hold a part of a character, and some tokenizers drop the space before the first token of a text. So a
    token is decoded after the token before it, and a part of a character waits for the token that completes it.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = lru_cache(maxsize=65536)(lambda ids: decode(list(ids)))

    def __call__(self, token_ids: Sequence[int], before: Sequence[int] = ()) -> list[str]:
        """Return the text of every token.

        Args:
            before: the tokens before them, of which the last one matters.
        """
        texts: list[str] = []
        anchor: tuple[int, ...] = tuple(before[-1:])
        waiting: tuple[int, ...] = ()
        for token in token_ids:
            waiting = (*waiting, token)
            text = self._decode((*anchor, *waiting))[len(self._decode(anchor)) if anchor else 0 :]
            if text.endswith("\ufffd") and len(waiting) < _PENDING:
                texts.append("")
                continue
            texts.append(text)
            anchor, waiting = (token,), ()
        if waiting:
            texts[-1] = self._decode((*anchor, *waiting))[len(self._decode(anchor)) if anchor else 0 :]
        return texts


def group_rows(group: TrajectoryGroup, texts: TokenTexts, decode: Decode, place: Row) -> Iterator[dict[str, Any]]:
    """Yield the rows of the kept completions of a group.

    Args:
        texts: texts of single tokens.
        decode: text of a prompt.
        place: keys that all rows of a step share.
    """
    shared = {
        "format": FORMAT,
        **place,
        "prompt_id": group.prompt.prompt_id,
        "prompt": decode(group.prompt.token_ids.tolist())[:_CHARACTERS],
        "reference": group.prompt.answer,
        "searched": group.searched,
        **group_facts(group),
    }
    for number in choose_completions(group):
        trajectory = group.trajectories[number]
        yield {**shared, **completion_row(trajectory, number, len(group.prompt.token_ids), texts)}


def completion_row(trajectory: Trajectory, number: int, prompt_length: int, texts: TokenTexts) -> dict[str, Any]:
    """Return the keys of a row that differ between the completions of a group.

    `tokens` counts those that the policy chose. `token_ids` has those of an environment too, and lacks those left out.
    `token_ends` are the ends of the tokens in the characters of `completion`. `logprobs` are those of the actor, null
    for tokens that the policy did not choose. `left_out` is [position, number] of tokens left out of a long completion.
    """
    ids = trajectory.token_ids.tolist()
    logprobs = own_logprobs(trajectory)
    spans, dropped = _spans(prompt_length, len(ids))
    pieces = [text for start, stop in spans for text in texts(ids[start:stop], ids[:start])]
    return {
        "sample": number,
        **judgement(trajectory),
        "detail": trajectory.detail[:_DETAIL],
        "oldest_version": trajectory.oldest_version,
        "completion": "".join(pieces),
        "token_ids": [token for start, stop in spans for token in ids[start:stop]],
        "token_ends": np.cumsum([len(piece) for piece in pieces], dtype=int).tolist(),
        "logprobs": [logprob for start, stop in spans for logprob in logprobs[start:stop]],
        "left_out": [HEAD_TOKENS, dropped] if dropped > 0 else None,
    }


def _spans(start: int, stop: int) -> tuple[list[tuple[int, int]], int]:
    """Return the spans of the tokens of a completion that are kept, and the number of those left out."""
    dropped = stop - start - HEAD_TOKENS - TAIL_TOKENS
    if dropped <= 0:
        return [(start, stop)], 0
    return [(start, start + HEAD_TOKENS), (stop - TAIL_TOKENS, stop)], dropped


def with_values(row: Row, values: TokenValues) -> dict[str, Any]:
    """Return a row with what its training step had for its tokens.

    `advantages` and `gaps` have a number of three digits for every kept token, null for tokens that the step did not
    train. They are null themselves if it trained none, and `untrained` says why. A gap is the learner's log-probability
    before the update minus the actor's.
    """
    if values.advantages is None or values.gaps is None:
        return {**row, "advantages": None, "gaps": None, "untrained": values.untrained}
    stop = len(values.advantages)
    kept_tokens, left_out = len(row["token_ids"]), row["left_out"] or (0, 0)
    spans, _ = _spans(stop - kept_tokens - left_out[1], stop)

    def kept(array: Float32Array) -> list[float | None]:
        numbers = (value for start, end in spans for value in array[start:end].tolist())
        return [None if math.isnan(number) else float(f"{number:.3g}") + 0.0 for number in numbers]

    return {**row, "advantages": kept(values.advantages), "gaps": kept(values.gaps), "untrained": ""}


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token of a row.

    Attributes:
        logprob: of the actor; None if the policy did not choose the token.
        advantage: None if the step did not train the token here, or the row is older than advantages.
        gap: as `advantage`.
    """

    token_id: int
    text: str
    logprob: float | None
    advantage: float | None
    gap: float | None


def row_tokens(row: Row) -> list[Token]:
    """Return the kept tokens of a row."""
    starts, unknown = [0, *row["token_ends"][:-1]], [None] * len(row["token_ends"])
    texts = [row["completion"][start:end] for start, end in zip(starts, row["token_ends"], strict=True)]
    values = (row["token_ids"], texts, row["logprobs"], row.get("advantages") or unknown, row.get("gaps") or unknown)
    return [
        Token(token_id=token_id, text=text, logprob=logprob, advantage=advantage, gap=gap)
        for token_id, text, logprob, advantage, gap in zip(*values, strict=True)
    ]


def training_facts(row: Row) -> list[str]:
    """Return what the training step made of a row, as short texts; none for a row of format 1."""
    advantages = [value for value in row.get("advantages") or () if value is not None]
    gaps = [value for value in row.get("gaps") or () if value is not None]
    if not advantages or not gaps:
        return [row["untrained"]] if row.get("untrained") else []
    low, high = min(advantages), max(advantages)
    several = f"advantages {low:+.3g} to {high:+.3g}, mean {sum(advantages) / len(advantages):+.3g}"
    return [f"advantage {low:+.3g}" if low == high else several, f"largest gap {max(gaps, key=abs):+.2g}"]
