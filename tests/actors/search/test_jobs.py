"""The order in which answers are applied."""

from __future__ import annotations

from typing import Any

from search_world import (
    prompt,
    scripted,
    search_config,
    search_model,
)

from actors.search.mcts import TreeSearch
from actors.search.requests import Ask


def test_a_verdict_does_not_wait_for_earlier_chains() -> None:
    """Two chains are open. The first one is drawn and judged, and a third one is requested while the second one is
    still open. The third completion waits for the second one."""
    world = scripted(
        {"start": {"thinking": 9}, "thinking": {"answer": 1}},
        {"": [f"<thinking>{letter}</thinking><answer>1</answer>" for letter in ("a", "b", "aa")]},
    )
    search = TreeSearch(
        prompt(),
        world.pattern,
        search_config(expansion="chain", parallel_simulations=2, stop={"simulations": 3}),
        {"policy": search_model()},
        max_chain_tokens=99,
        seed=0,
    )

    def drawn(ask: Any) -> list[Any]:
        return [world.complete(call, search_model()) for call in ask.calls]

    first, second = search.start()
    ahead, behind = drawn(first), drawn(second)
    [judge] = search.deliver(first.number, ahead)
    [third] = search.deliver(judge.number, world.judge(judge.completion))
    assert isinstance(third, Ask)
    assert search.deliver(third.number, drawn(third)) == []
    [judge] = search.deliver(second.number, behind)
    [last] = search.deliver(judge.number, world.judge(judge.completion))
    assert search.deliver(last.number, world.judge(last.completion)) == []
    thoughts = ["<thinking>a</thinking>", "<thinking>b</thinking>", "<thinking>aa</thinking>"]
    assert [node.text for node in search.tree().nodes if node.type == "thinking"] == thoughts
