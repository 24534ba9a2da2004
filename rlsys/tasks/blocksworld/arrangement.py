"""The arrangement of a blocks-world problem: what is left of its facts without the names of the blocks."""

from __future__ import annotations

from rlsys.tasks.blocksworld.blocks import Fact, Goal, State, facts

_UNARY = ("ontable", "clear", "holding")


def arrangement(state: State, goal: Goal) -> list[list[list[int]]]:
    """Return the same value for two problems exactly if a renaming of the blocks makes them equal.

    In the start and in the goal, at most one block is on a block, and each is on at most one. So a walk along these
    links, in a fixed order, gives numbers to all blocks that are linked to its first one. Of the walks from every block
    of such a group, the smallest description is kept; the groups are sorted.

    Returns:
        Groups of blocks. A block is described by the numbers of the blocks above and below it, in the start and in the
        goal (-1 for none), and by 0 or 1 for each fact about it alone.
    """
    start = facts(state)
    links = [_links(known, upper) for known in (start, goal) for upper in (True, False)]
    marks = {
        block: [int((kind, block) in known) for known in (start, goal) for kind in _UNARY] for block in _blocks(state)
    }
    groups: dict[frozenset[str], list[list[int]]] = {}
    for block in marks:
        order = _walk(block, links)
        number = {name: position for position, name in enumerate(order)}
        described = [[*(number[link[name]] if name in link else -1 for link in links), *marks[name]] for name in order]
        members = frozenset(order)
        groups[members] = min(groups.get(members, described), described)
    return sorted(groups.values())


def _blocks(state: State) -> list[str]:
    return [*(block for tower in state.towers for block in tower), *([] if state.held is None else [state.held])]


def _links(known: frozenset[Fact], upper: bool) -> dict[str, str]:
    """Return the block above (`upper`) or below every block."""
    pairs = [(fact[1], fact[2]) for fact in known if fact[0] == "on"]
    return {below: above for above, below in pairs} if upper else dict(pairs)


def _walk(first: str, links: list[dict[str, str]]) -> list[str]:
    """Return the blocks that links lead to, in the order in which a breadth-first walk meets them."""
    order = [first]
    for block in order:
        for link in links:
            if block in link and link[block] not in order:
                order.append(link[block])
    return order
