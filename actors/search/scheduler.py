"""All trees of an actor in one event loop: requests out to the engines, answers back into the trees.

No barrier anywhere: whatever a tree asks for goes to its engine at once, and whatever is back moves its tree on.
Consumes prompts; waits for engines and verifiers; a tree is admitted while fewer requests are in flight than the
engine decodes at once. What a tree becomes depends on none of that.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from actors.engine import Completion, CompletionRequest
from actors.rollouts.single_turn import sample_seed
from actors.search.jobs import Request
from actors.search.mcts import TreeSearch
from actors.search.requests import Codec, Judge, SearchWriter
from actors.search.writers import WriterEngine
from rlsys.config.patterns import Pattern
from rlsys.config.search import SearchConfig
from rlsys.errors import RolloutError
from rlsys.trees import Tree, TreeFailure, Writer
from rlsys.types import Prompt, Verdict


class Verifier(Protocol):
    """See `actors.verifiers.pool.RewardPool`."""

    async def verify(
        self,
        items: Sequence[tuple[str, str]],
        tell: Callable[[Sequence[tuple[int, Verdict]]], None] | None = None,
    ) -> list[Verdict]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ForestWriter:
    """A model of the search: its engine or engines, its digest, its tokenizer, its longest context in tokens."""

    engine: WriterEngine
    model: str
    codec: Codec
    max_model_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ForestSettings:
    """What all trees share. in_flight: requests below which another tree is admitted."""

    config: SearchConfig
    patterns: Mapping[str, Pattern]
    seed: int
    temperature: float
    top_p: float
    max_chain_tokens: int
    in_flight: int


@dataclass(slots=True, eq=False)
class _Growing:
    """A tree under way. answers: what is back of an Ask, by its number. tokens: generated for it so far."""

    search: TreeSearch
    prompt: Prompt
    result: asyncio.Future[Tree | TreeFailure]
    affinity: int
    answers: dict[int, list[Completion | None]] = field(default_factory=dict)
    tokens: int = 0


_Arrival = tuple[_Growing, int, int, Future[Completion]]


class Forest:
    """Grows any number of trees at once. Use it from one event loop.

    search_s: CPU seconds spent in the trees themselves: reading completions, selection, backing up.
    """

    def __init__(self, writers: Mapping[Writer, ForestWriter], rewards: Verifier, settings: ForestSettings) -> None:
        self._writers, self._rewards, self._settings = writers, rewards, settings
        self._waiting: deque[_Growing] = deque()
        self._inbox: deque[_Arrival] = deque()
        self._woken = False
        self._in_flight = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.search_s = 0.0
        self.arrivals = 0  # answers of engines so far

    async def grow(self, prompt: Prompt) -> Tree | TreeFailure:
        """Search one prompt to its end.

        Raises:
            EngineError: an engine or the verifiers broke.
        """
        self._loop = asyncio.get_running_loop()
        reason = self._too_long(prompt)
        if reason is not None:
            return _failure(prompt, reason)
        growing = _Growing(
            self._search(prompt), prompt, self._loop.create_future(), sample_seed(0, prompt.prompt_id, "engine")
        )
        self._waiting.append(growing)
        self._admit()
        return await growing.result

    def _search(self, prompt: Prompt) -> TreeSearch:
        settings = self._settings
        rng = random.Random(sample_seed(settings.seed, prompt.prompt_id, "pattern"))
        return TreeSearch(
            prompt,
            settings.patterns[rng.choice(settings.config.patterns)],
            settings.config,
            {
                name: SearchWriter(
                    model=writer.model,
                    codec=writer.codec,
                    prompt_ids=self._prompt_ids(name, prompt),
                    max_model_len=writer.max_model_len,
                )
                for name, writer in self._writers.items()
            },
            max_chain_tokens=settings.max_chain_tokens,
            seed=settings.seed,
        )

    def _prompt_ids(self, name: Writer, prompt: Prompt) -> tuple[int, ...]:
        if name == "policy":
            return tuple(prompt.token_ids.tolist())
        return tuple(self._writers[name].codec.prompt(prompt.question))

    def _too_long(self, prompt: Prompt) -> str | None:
        for name, writer in self._writers.items():
            length = len(self._prompt_ids(name, prompt))
            if length >= writer.max_model_len:
                field_name = "actors.max_model_len" if name == "policy" else f"search.{name}.max_model_len"
                return f"the prompt has {length} tokens; {field_name} {writer.max_model_len} leaves no room for a node"
        return None

    def _admit(self) -> None:
        while self._waiting and self._in_flight < self._settings.in_flight:
            growing = self._waiting.popleft()
            self._send(self._advance(growing, growing.search.start))
            self._settle(growing)

    def _advance(self, growing: _Growing, step: Callable[[], list[Request]]) -> list[tuple[_Growing, Request]]:
        """Move a tree on, unless nobody waits for it any more."""
        if growing.result.done():
            return []
        started = time.thread_time()
        try:
            return [(growing, request) for request in step()]
        except Exception as error:  # noqa: BLE001 - for whoever waits for the tree; the event loop would only log it
            error.add_note(f"while searching prompt {growing.prompt.prompt_id}")
            self._fail(growing, error)
            return []
        finally:
            self.search_s += time.thread_time() - started

    def _settle(self, growing: _Growing) -> None:
        """Hand a finished tree over."""
        if growing.result.done() or not growing.search.finished:
            return
        try:
            tree = growing.search.tree()
        except Exception as error:  # noqa: BLE001 - for whoever waits for the tree, as above
            self._fail(growing, error)
            return
        if tree.calls:
            growing.result.set_result(tree)
        else:
            reason = f"no node fits after the prompt ({', '.join(tree.counts) or 'the table allows none'})"
            growing.result.set_result(_failure(growing.prompt, reason))

    def _send(self, requests: Sequence[tuple[_Growing, Request]]) -> None:
        """Give requests to the engines, all of one engine in one go, and chains to the verifiers."""
        batches: dict[tuple[Writer, int], tuple[list[CompletionRequest], list[tuple[_Growing, int, int]]]] = {}
        chains: list[tuple[_Growing, Judge]] = []
        for growing, request in requests:
            if isinstance(request, Judge):
                chains.append((growing, request))
                continue
            growing.answers[request.number] = [None] * len(request.calls)
            for slot, call in enumerate(request.calls):
                batch = batches.setdefault((call.writer, growing.affinity), ([], []))
                batch[0].append(
                    CompletionRequest(
                        request_id=f"{growing.prompt.prompt_id}/{request.number}.{slot}",
                        token_ids=call.token_ids,
                        seed=call.seed,
                        temperature=self._settings.temperature,
                        top_p=self._settings.top_p,
                        max_tokens=call.max_tokens,
                        stop_token_ids=call.stop.token_ids,
                        stop_strings=call.stop.strings,
                    )
                )
                batch[1].append((growing, request.number, slot))
        for (name, affinity), (calls, places) in batches.items():
            try:
                futures = self._writers[name].engine.submit(calls, affinity)
            except Exception as error:  # noqa: BLE001 - for whoever waits for these trees, as above
                for growing, _, _ in places:
                    self._fail(growing, error)
                continue
            self._in_flight += len(futures)
            for place, future in zip(places, futures, strict=True):
                future.add_done_callback(_Arrived(self, place))
        if chains:
            task = self._loop.create_task(self._verify(chains))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def arrived(self, growing: _Growing, number: int, slot: int, future: Future[Completion]) -> None:
        """Called on the engine's thread."""
        self._inbox.append((growing, number, slot, future))
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._work)

    def _work(self) -> None:
        """Put all that has arrived into the trees, and send what they ask for in return."""
        self._woken = False
        complete: list[tuple[_Growing, int, Any]] = []
        while self._inbox:
            growing, number, slot, future = self._inbox.popleft()
            self._in_flight -= 1
            self.arrivals += 1
            error = future.exception()
            if error is None:
                growing.tokens += len(future.result().token_ids)
                if not np.isfinite(future.result().logprobs).all():
                    error = RolloutError("the engine gave a log-probability that is not finite")
            if error is not None:
                self._fail(growing, error)
                continue
            answers = growing.answers[number]
            answers[slot] = future.result()
            if all(answer is not None for answer in answers):
                complete.append((growing, number, growing.answers.pop(number)))
        self._deliver(complete)

    def _deliver(self, answers: Sequence[tuple[_Growing, int, Any]]) -> None:
        requests: list[tuple[_Growing, Request]] = []
        for growing, number, answer in answers:
            requests += self._advance(growing, partial(growing.search.deliver, number, answer))
        self._send(requests)
        for growing, _, _ in answers:
            self._settle(growing)
        self._admit()

    async def _verify(self, chains: Sequence[tuple[_Growing, Judge]]) -> None:
        """Judge chains; each goes on with its own verdict as soon as that is there."""
        waiting = dict(enumerate(chains))

        def tell(verdicts: Sequence[tuple[int, Verdict]]) -> None:
            found = [(*waiting.pop(number), verdict) for number, verdict in verdicts]
            self._deliver([(growing, judge.number, verdict) for growing, judge, verdict in found])

        try:
            await self._rewards.verify([(growing.prompt.answer, judge.completion) for growing, judge in chains], tell)
        except Exception as error:  # noqa: BLE001 - for whoever waits for these trees, as above
            for growing, _ in waiting.values():
                self._fail(growing, error)

    def _fail(self, growing: _Growing, error: BaseException) -> None:
        """A refused request costs its tree; a broken engine is everybody's error."""
        if growing.result.done():
            return
        if isinstance(error, RolloutError):
            growing.result.set_result(_failure(growing.prompt, error.message, growing.tokens))
        else:
            growing.result.set_exception(error)


@dataclass(frozen=True, slots=True)
class _Arrived:
    """The callback of one request."""

    forest: Forest
    place: tuple[_Growing, int, int]

    def __call__(self, future: Future[Completion]) -> None:
        self.forest.arrived(*self.place, future)


def _failure(prompt: Prompt, reason: str, tokens: int = 0) -> TreeFailure:
    return TreeFailure(
        prompt_id=prompt.prompt_id, question=prompt.question, answer=prompt.answer, reason=reason, tokens=tokens
    )
