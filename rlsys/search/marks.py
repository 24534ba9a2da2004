"""Chains that a person marked as bad, in marks.json beside the trees.

A mark names a prompt and a digest of the chain's text, so it holds for every chain of the tree with this text, and for
none after the tree has been grown anew.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import xxhash

from rlsys.errors import CheckpointError, DataError
from rlsys.files import read_json, write_json
from rlsys.trees import Tree

FORMAT = 1
Marks = dict[str, set[str]]  # prompt id -> digests of its bad chains


def chain_digest(tree: Tree, number: int) -> str:
    """Return the digest by which a mark names the chain that ends at a node."""
    return xxhash.xxh3_128_hexdigest(tree.completion(number).encode())


def read_marks(path: Path) -> Marks:
    """Return the marks of a file; none if there is no file.

    Raises:
        DataError: the file is not one of marks.
    """
    if not path.exists():
        return {}
    try:
        values = read_json(path)
    except CheckpointError as error:
        raise DataError(error.message) from None
    chains = values.get("bad_chains") if isinstance(values, dict) and values.get("format") == FORMAT else None
    whole = isinstance(chains, dict) and all(isinstance(digests, list) for digests in chains.values())
    if not whole or chains is None:
        raise DataError(f"{path}: expected format {FORMAT} with bad_chains; move the file away to use no marks")
    return {prompt: set(map(str, digests)) for prompt, digests in chains.items()}


def write_marks(path: Path, marks: Marks) -> None:
    """Write marks in an order that depends on them alone.

    Raises:
        CheckpointError: the file could not be written; an existing file is unchanged.
    """
    chains = {prompt: sorted(digests) for prompt, digests in sorted(marks.items()) if digests}
    write_json(path, {"format": FORMAT, "bad_chains": chains})


def marked_nodes(tree: Tree, marks: Marks) -> list[int]:
    """Return the numbers of the scored terminal nodes whose chains are marked."""
    digests = marks.get(tree.prompt_id, set())
    return [number for number in tree.answers() if chain_digest(tree, number) in digests] if digests else []


def without_chains(tree: Tree, numbers: list[int]) -> Tree:
    """Return a tree as if the chains that end at some nodes had never been judged.

    Their visits and rewards are taken from all nodes above, so that values of nodes do not count them either.
    """
    nodes = list(tree.nodes)
    for number in numbers:
        visits, total = nodes[number].visits, nodes[number].total
        for above in [0, *tree.path(number)]:
            node = nodes[above]
            nodes[above] = replace(node, visits=node.visits - visits, total=node.total - total)
        nodes[number] = replace(nodes[number], visits=0, total=0.0, verdict=None, scored=-1, estimate=None)
    return replace(tree, nodes=tuple(nodes))
