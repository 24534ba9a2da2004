"""Scheduler of all growing trees of an actor, in one event loop.

The scheduler sends every request of a tree to its engine at once, and continues the tree with every answer; there is no
barrier between trees or requests. It admits another tree while fewer requests are in flight than the engine decodes at
once. The timing of answers does not change the finished trees.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from actors.engine import Completion, CompletionRequest
from actors.rollouts.seeds import sample_seed
from actors.search.engines import completion_request
from actors.search.jobs import Answer
from actors.search.mcts import TreeSearch
from actors.search.requests import Judge, Request, Turn, Value, Values
from actors.search.starting import RoleEngine, SchedulerSettings, TreeStarter
from rlsys.errors import RolloutError
from rlsys.interfaces import Reply
from rlsys.trees import Role, Tree, TreeFailure
from rlsys.types import Problem, Prompt, Verdict


class Valuer(Protocol):
    """Source of values; see `actors.search.values`."""

    async def values(self, prompt: Prompt, request: Value, affinity: int) -> Values:
        """Return the values of new nodes. A failed value is counted in them, and is not an error.

        Args:
            affinity: See `CompletionEngine`.

        Raises:
            EngineError: An engine or the verifiers broke.
        """
        ...


class Verifier(Protocol):
    """Source of verdicts, and of the replies of an environment; see `actors.verifiers.pool.RewardPool`."""

    async def verify(
        self,
        items: Sequence[tuple[Problem, str, bool]],
        on_verdicts: Callable[[Sequence[tuple[int, Verdict]]], None] | None = None,
    ) -> list[Verdict]: ...

    async def replies(self, items: Sequence[tuple[Problem, Sequence[str]]]) -> list[Reply | Verdict]: ...


@dataclass(slots=True, eq=False)
class _ActiveTree:
    """A tree that is growing or waits to be admitted.

    Attributes:
        completions: Completions that have arrived, by the number of their request.
        tokens: Tokens generated for the tree so far.
        open: Completions that are under way.
        waiting: Requests for values and replies, ended ones included.
    """

    search: TreeSearch
    prompt: Prompt
    result: asyncio.Future[Tree | TreeFailure]
    affinity: int
    completions: dict[int, list[Completion | None]] = field(default_factory=dict)
    tokens: int = 0
    open: set[Future[Completion]] = field(default_factory=set)
    waiting: set[asyncio.Task[None]] = field(default_factory=set)

    def abandon(self, _result: asyncio.Future[Tree | TreeFailure]) -> None:
        """Cancel all requests to engines, because the tree is finished or its caller is gone."""
        for task in self.waiting:
            task.cancel()
        for future in list(self.open):
            future.cancel()


@dataclass(frozen=True, slots=True)
class _Slot:
    """Position of a completion: its index in the answer to request `number` of a tree."""

    tree: _ActiveTree
    number: int
    index: int


class TreeScheduler:
    """Scheduler of any number of growing trees. All calls must come from one event loop.

    Attributes:
        search_s: CPU seconds spent on tree operations: reading completions, selection, backing up.
        arrivals: Number of completions and values that have arrived.

    Args:
        valuer: Source of the values of nodes; None if the config names none.
    """

    def __init__(
        self,
        engines: Mapping[Role, RoleEngine],
        verifier: Verifier,
        settings: SchedulerSettings,
        valuer: Valuer | None = None,
    ) -> None:
        self._engines, self._verifier, self._settings, self._valuer = engines, verifier, settings, valuer
        self._starter = TreeStarter(engines, settings)
        self._waiting: deque[_ActiveTree] = deque()
        self._inbox: deque[tuple[_Slot, Future[Completion]]] = deque()
        self._woken = False
        self._in_flight = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.search_s = 0.0
        self.arrivals = 0

    async def grow(self, prompt: Prompt) -> Tree | TreeFailure:
        """Search one prompt to its end.

        Raises:
            EngineError: An engine or the verifiers broke.
        """
        self._loop = asyncio.get_running_loop()
        opening: Reply | Verdict = Reply()
        if self._settings.environment is not None:
            [opening] = await self._verifier.replies([(prompt.problem, ())])
        search = self._starter.search(prompt, opening)
        if isinstance(search, str):
            return _failure(prompt, search)
        tree = _ActiveTree(search, prompt, self._loop.create_future(), sample_seed(0, prompt.prompt_id, "engine"))
        tree.result.add_done_callback(tree.abandon)
        self._waiting.append(tree)
        self._admit()
        return await tree.result

    def _admit(self) -> None:
        while self._waiting and self._in_flight < self._settings.in_flight:
            tree = self._waiting.popleft()
            self._send(self._advance(tree, tree.search.start))
            self._settle(tree)

    def _advance(self, tree: _ActiveTree, step: Callable[[], list[Request]]) -> list[tuple[_ActiveTree, Request]]:
        """Run a step of a tree and return its requests. Skip a tree that failed or that its caller cancelled."""
        if tree.result.done():
            return []
        started = time.thread_time()
        try:
            return [(tree, request) for request in step()]
        except Exception as error:  # noqa: BLE001 - the tree's caller gets it; the event loop would only log it
            error.add_note(f"while searching prompt {tree.prompt.prompt_id}")
            self._fail(tree, error)
            return []
        finally:
            self.search_s += time.thread_time() - started

    def _settle(self, tree: _ActiveTree) -> None:
        """Give the tree to its caller if it is finished."""
        if tree.result.done() or not tree.search.finished:
            return
        try:
            finished = tree.search.tree()
        except Exception as error:  # noqa: BLE001 - the tree's caller gets it, as above
            self._fail(tree, error)
            return
        if finished.calls:
            tree.result.set_result(finished)
        else:
            reason = f"no node fits after the prompt ({', '.join(finished.counts) or 'the table allows none'})"
            tree.result.set_result(_failure(tree.prompt, reason))

    def _send(self, requests: Sequence[tuple[_ActiveTree, Request]]) -> None:
        """Send calls to the engines, in one batch per engine, and chains to the verifiers."""
        batches: dict[tuple[Role, int], tuple[list[CompletionRequest], list[_Slot]]] = {}
        chains: list[tuple[_ActiveTree, Judge]] = []
        for tree, request in requests:
            if isinstance(request, Judge):
                chains.append((tree, request))
                continue
            if isinstance(request, Value | Turn):
                tree.waiting.add(self._begin(self._answer(tree, request)))
                continue
            tree.completions[request.number] = [None] * len(request.calls)
            for index, call in enumerate(request.calls):
                slot = _Slot(tree, request.number, index)
                calls, slots = batches.setdefault((call.role, tree.affinity), ([], []))
                name = f"{tree.prompt.prompt_id}/{request.number}.{index}"
                calls.append(completion_request(name, call, self._settings.temperature, self._settings.top_p))
                slots.append(slot)
        for (role, affinity), (calls, slots) in batches.items():
            self._submit(role, affinity, calls, slots)
        if chains:
            self._begin(self._verify(chains))

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begin work of the event loop, and keep it from being collected before its end."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _answer(self, tree: _ActiveTree, request: Value | Turn) -> None:
        """Get the values of new nodes of a tree, or the reply to a turn."""
        answer: Answer
        try:
            if isinstance(request, Turn):
                [answer] = await self._verifier.replies([(tree.prompt.problem, request.turns)])
            else:
                assert self._valuer is not None  # noqa: S101 - the config of the tree is that of the valuer
                answer = await self._valuer.values(tree.prompt, request, tree.affinity)
                tree.tokens += answer.tokens
        except Exception as error:  # noqa: BLE001 - the tree's caller gets it, as above
            self._fail(tree, error)
            return
        self.arrivals += 1
        self._deliver([(tree, request.number, answer)])

    def _submit(self, role: Role, affinity: int, calls: list[CompletionRequest], slots: list[_Slot]) -> None:
        try:
            futures = self._engines[role].engine.submit(calls, affinity)
        except Exception as error:  # noqa: BLE001 - the trees' callers get it, as above
            for slot in slots:
                self._fail(slot.tree, error)
            return
        self._in_flight += len(futures)
        for slot, future in zip(slots, futures, strict=True):
            slot.tree.open.add(future)
            future.add_done_callback(partial(self._arrived, slot))

    def _arrived(self, slot: _Slot, future: Future[Completion]) -> None:
        """Queue the outcome of a call and wake the event loop. Runs on the engine's thread."""
        self._inbox.append((slot, future))
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._take_arrivals)

    def _take_arrivals(self) -> None:
        """Deliver all outcomes that have arrived and send the requests that follow from them."""
        self._woken = False
        complete: list[tuple[_ActiveTree, int, Answer]] = []
        while self._inbox:
            slot, future = self._inbox.popleft()
            tree = slot.tree
            tree.open.discard(future)
            self._in_flight -= 1
            if future.cancelled():
                continue
            self.arrivals += 1
            error = future.exception()
            if error is None:
                tree.tokens += len(future.result().token_ids)
                if not np.isfinite(future.result().logprobs).all():
                    error = RolloutError("the engine gave a log-probability that is not finite")
            if error is not None:
                self._fail(tree, error)
                continue
            completions = tree.completions[slot.number]
            completions[slot.index] = future.result()
            arrived = [completion for completion in completions if completion is not None]
            if len(arrived) == len(completions):
                del tree.completions[slot.number]
                complete.append((tree, slot.number, arrived))
        self._deliver(complete)

    def _deliver(self, answers: Sequence[tuple[_ActiveTree, int, Answer]]) -> None:
        requests: list[tuple[_ActiveTree, Request]] = []
        for tree, number, answer in answers:
            requests += self._advance(tree, partial(tree.search.deliver, number, answer))
        self._send(requests)
        for tree, _, _ in answers:
            self._settle(tree)
        self._admit()

    async def _verify(self, chains: Sequence[tuple[_ActiveTree, Judge]]) -> None:
        """Verify chains. Each tree gets its verdict as soon as the verdict arrives."""
        waiting = dict(enumerate(chains))

        def deliver(verdicts: Sequence[tuple[int, Verdict]]) -> None:
            judged = [(*waiting.pop(number), verdict) for number, verdict in verdicts]
            self._deliver([(tree, judge.number, verdict) for tree, judge, verdict in judged])

        try:
            items = [(tree.prompt.problem, judge.completion, judge.finished) for tree, judge in chains]
            await self._verifier.verify(items, deliver)
        except Exception as error:  # noqa: BLE001 - the trees' callers get it, as above
            for tree, _ in waiting.values():
                self._fail(tree, error)

    def _fail(self, tree: _ActiveTree, error: BaseException) -> None:
        """End a tree. A RolloutError becomes a failed tree; any other error goes to its caller."""
        if tree.result.done():
            return
        if isinstance(error, RolloutError):
            tree.result.set_result(_failure(tree.prompt, error.message, tree.tokens))
        else:
            tree.result.set_exception(error)


def _failure(prompt: Prompt, reason: str, tokens: int = 0) -> TreeFailure:
    return TreeFailure(
        prompt_id=prompt.prompt_id, question=prompt.question, answer=prompt.answer, reason=reason, tokens=tokens
    )
