"""A search over a pool that only pretends to grow trees."""

from __future__ import annotations

import asyncio
import io
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rlsys.config.files import load_config
from rlsys.config.schema import Config
from rlsys.control.tree_search import Search
from rlsys.display import SEARCH_FIGURES, Display
from rlsys.interfaces import EngineStats
from rlsys.trees import ThoughtNode, Tree, TreeFailure
from rlsys.types import Outcome, Prompt, Verdict

CONFIG = Path(__file__).parents[2] / "configs" / "search_letter_count.yaml"
NONE = np.zeros(0, np.int32)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(prompt_id=f"p{n}", token_ids=NONE, answer=f"{n}", question=f"q{n}") for n in range(count)]


def node(outcome: Outcome | None = None, scored: int = -1) -> ThoughtNode:
    verdict = Verdict(outcome=outcome, reward=float(outcome == "ok"), answered=True, detail="why") if outcome else None
    return ThoughtNode(
        parent=-1 if outcome is None else 0,
        type="start" if outcome is None else "answer",
        text="",
        token_ids=NONE,
        forced=0,
        logprobs=NONE.astype(np.float32),
        verdict=verdict,
        scored=scored,
    )


def tree(prompt: Prompt, outcome: Outcome = "ok") -> Tree:
    return Tree(
        prompt_id=prompt.prompt_id,
        question=prompt.question,
        answer=prompt.answer,
        pattern="chain",
        tokenizers={},
        models={},
        prompt_token_ids={},
        nodes=(node(), node(outcome, 0 if outcome in ("ok", "wrong") else -1)),
        stop="correct",
        simulations=1,
        calls=1,
        tokens=3,
        counts={},
    )


def failure(prompt: Prompt) -> TreeFailure:
    return TreeFailure(prompt_id=prompt.prompt_id, question=prompt.question, answer=prompt.answer, reason="too long")


class Pool:
    """Grows a tree in a few turns of the event loop, in an order of its own.

    before: called with the number of calls so far; may raise.
    """

    def __init__(
        self,
        count: int = 2,
        grown: Callable[[Prompt], Tree | TreeFailure] = tree,
        before: Callable[[int], object] = lambda _calls: None,
    ) -> None:
        self.count = count
        self._grown, self._before = grown, before
        self._random = random.Random(0)
        self.calls: list[tuple[int, str]] = []
        self.finished = 0
        self.under_way: Counter[int] = Counter()
        self.most: Counter[int] = Counter()
        self.asked = 0

    async def grow(self, actor: int, prompt: Prompt) -> Tree | TreeFailure:
        self.calls.append((actor, prompt.prompt_id))
        self._before(len(self.calls))
        self.under_way[actor] += 1
        self.most[actor] = max(self.most[actor], self.under_way[actor])
        try:
            for _ in range(self._random.randrange(1, 6)):
                await asyncio.sleep(0)
            found = self._grown(prompt)
        finally:
            self.under_way[actor] -= 1
        self.finished += 1
        return found

    async def reset_engine_stats(self) -> None:
        await self.engine_stats()

    async def engine_stats(self) -> Sequence[EngineStats]:
        self.asked += 1
        return [
            EngineStats(
                model="policy",
                engine=actor,
                busy_s=1.0,
                wall_s=2.0,
                generated_tokens=10,
                prompt_tokens=8,
                cached_tokens=2,
                in_flight_mean=3.0,
            )
            for actor in range(self.count)
        ]


def opened(run_dir: Path, count: int = 10, *, share: float = 0.1, ahead: int = 3) -> Search:
    run_dir.mkdir(exist_ok=True)
    return Search(run_dir, prompts(count), shard_size=4, share=share, ahead=ahead)


def display(output: io.StringIO | None = None, **settings: Any) -> Display:
    console = Console(file=output or io.StringIO(), force_terminal=False)
    return Display(console, figures=SEARCH_FIGURES, **settings)


def run(search: Search, pool: Pool) -> None:
    asyncio.run(search.run(pool, display()))


def files(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir / "trees"
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shipped(*overrides: str) -> Config:
    return load_config(CONFIG, overrides)
