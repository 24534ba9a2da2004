"""Properties of all trees, for any table, settings, models and order of arriving answers."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from search_world import (
    BARE,
    Grown,
    World,
    codec,
    grow,
    search_model,
    shipped,
    shipped_names,
    table,
    token_logprob,
    token_version,
)
from tree_samples import children_of

from actors.search.requests import Ask, Judge, SearchModel, Value, Values
from actors.search.tree import Status
from rlsys.config.patterns import Pattern
from rlsys.config.search import (
    START,
    CorrectRule,
    FrontierConfig,
    PuctConfig,
    RevisionConfig,
    SearchConfig,
    StopConfig,
    SurpriseConfig,
    UcbConfig,
)
from rlsys.config.search_values import ModelValueConfig, StepsValueConfig
from rlsys.search.paths import path_tokens
from rlsys.search.tree_json import parse_line, tree_line
from rlsys.trees import ENDINGS, Role, ThoughtNode, Tree
from rlsys.types import Verdict, VersionSpan

SELECTIONS = (
    UcbConfig(),
    UcbConfig(form="code", exploration=1.414),
    PuctConfig(type="puct"),
    FrontierConfig(type="frontier"),
    SurpriseConfig(type="surprise"),
    SurpriseConfig(type="surprise", unit="node", chains=2),
    RevisionConfig(type="revision", chains=3, draws=2),
)
THOUGHT = re.compile("<thinking>.*?</thinking>")
VALUES = (None, StepsValueConfig(type="steps"), ModelValueConfig(type="model", path="judge", prune_below=0.5))
INNER = ("sub_task", "thinking", "hypothesis", "double_check", "reclarify", "reflection")


@st.composite
def tables(draw: st.DrawFn) -> Pattern:
    """Draw a table of up to four inner types. An answer may follow each of them, so every table is searchable."""
    used = draw(st.permutations(INNER))[: draw(st.integers(1, 4))]
    counts = st.integers(1, 2)
    children = {START: {used[0]: draw(counts)}}
    for name, following in zip(used, [*used[1:], None], strict=True):
        row = {other: draw(counts) for other in draw(st.lists(st.sampled_from(used), max_size=2, unique=True))}
        children[name] = {**row, **({following: draw(counts)} if following else {}), "answer": draw(counts)}
    wrong = draw(st.dictionaries(st.sampled_from(used), st.sampled_from(used), max_size=2))
    after_wrong = {name: {other: draw(counts)} for name, other in wrong.items()}
    return table(children, after_wrong, {"reflection": BARE["reflection"]})


@st.composite
def configs(draw: st.DrawFn) -> SearchConfig:
    rules = st.builds(CorrectRule, count=st.integers(1, 4), after=st.integers(0, 12))
    selection = draw(st.sampled_from(SELECTIONS))
    return SearchConfig(
        expansion="chain"
        if isinstance(selection, SurpriseConfig | RevisionConfig)
        else draw(st.sampled_from(("node", "chain"))),
        selection=selection,
        value=draw(st.sampled_from(VALUES)),
        parallel_simulations=draw(st.integers(1, 8)),
        backtracking=draw(st.booleans()),
        max_backtracks=draw(st.none() | st.integers(1, 2)),
        backtrack_to=draw(st.sampled_from(("nearest", "surprise", "value"))),
        max_node_tokens=draw(st.sampled_from((4, 12, 64))),
        max_depth=draw(st.integers(3, 8)),
        stop=StopConfig(
            simulations=draw(st.integers(1, 40)),
            tokens=draw(st.none() | st.integers(10, 400)),
            answers=draw(st.none() | st.integers(1, 10)),
            correct=tuple(draw(st.lists(rules, max_size=2))),
        ),
    )


WORLDS = st.builds(
    World,
    pattern=tables() | st.sampled_from(shipped_names()).map(shipped),
    defects=st.sampled_from((0.0, 0.1, 0.4)),
    failures=st.sampled_from((0.0, 0.2)),
    letters=st.sampled_from(("a", "ab", "ab01")),
)
MODELS: Mapping[str, Mapping[Role, SearchModel]] = {
    "policy": {"policy": search_model()},
    "policy in a tokenizer that merges": {"policy": search_model("bpe")},
    "policy with little room": {"policy": search_model(max_model_len=len(search_model().prompt_ids) + 18)},
    "policy and reviewer": {"policy": search_model(), "reviewer": search_model("bytes", 2000)},
    "model and reviewer of one tokenizer": {
        "model": search_model("bytes", 2000),
        "reviewer": search_model("bytes", 1500),
    },
    "merging model and reviewer": {"model": search_model("bpe", 900), "reviewer": search_model()},
}


@settings(max_examples=60, deadline=None)
@given(WORLDS, configs(), st.sampled_from(sorted(MODELS)), st.integers(0, 3), st.sampled_from((30, 500)))
def test_properties_of_every_tree(
    world: World, config: SearchConfig, who: str, seed: int, max_chain_tokens: int
) -> None:
    models = MODELS[who]

    def grown(arrivals: random.Random | None) -> Grown:
        return grow(world, config, arrivals=arrivals, models=models, seed=seed, max_chain_tokens=max_chain_tokens)

    in_order = grown(None)
    tree = in_order.tree
    for shuffle in (1, 2):
        assert tree_line(grown(random.Random(shuffle)).tree) == tree_line(tree)
    check_shape(tree, world.pattern, config)
    check_counts(tree)
    check_bounds(tree, world.pattern, config)
    check_verdicts(in_order, world)
    check_stop(in_order, config)
    check_calls(in_order, models, config, max_chain_tokens)
    check_values(in_order, config)
    check_tokens(tree, models)
    check_round_trip(tree, models)
    parsed = parse_line(tree_line(tree))
    assert isinstance(parsed, Tree) and tree_line(parsed) == tree_line(tree)


def check_shape(tree: Tree, pattern: Pattern, config: SearchConfig) -> None:
    """Check order, types and depth of the nodes. No node is below a defect or an answer."""
    root = tree.nodes[0]
    assert (root.parent, root.type, len(root.token_ids)) == (-1, START, 0)
    for number, node in enumerate(tree.nodes[1:], start=1):
        assert 0 <= node.parent < number
        parent, depth = tree.nodes[node.parent], len(tree.path(number))
        assert parent.defect is None and not is_terminal(parent, pattern)
        assert depth <= (config.max_depth or 0) + (node.defect is not None)
        allowed = {*pattern.children.get(parent.type, {}), *pattern.after_wrong.get(parent.type, {})}
        assert node.type in allowed or node.defect is not None
        hints = sum(tree.nodes[above].backtrack for above in tree.path(number))
        assert config.max_backtracks is None or hints <= config.max_backtracks
        if node.backtrack:
            assert config.backtracking and node.type in pattern.after_wrong[parent.type]
        if node.defect is None:
            tag = pattern.types[node.type].tag
            assert node.text.strip().startswith(f"<{tag}>") and node.text.strip().endswith(f"</{tag}>")


def is_terminal(node: ThoughtNode, pattern: Pattern) -> bool:
    return node.type in pattern.types and pattern.types[node.type].terminal


def has_failed(tree: Tree, node: ThoughtNode) -> bool:
    return node.defect in ENDINGS and node.writer == tree.proposer


def check_counts(tree: Tree) -> None:
    """Check that visits and rewards add up: those of an inner node are the sums over its children."""
    for number, node in enumerate(tree.nodes):
        below = [tree.nodes[child] for child in children_of(tree, number)]
        if below:
            assert node.visits == sum(child.visits for child in below)
            assert abs(node.total - sum(child.total for child in below)) < 1e-9
        elif node.verdict is not None and node.scored >= 0:
            assert node.visits >= 1 and abs(node.total - node.visits * node.verdict.reward) < 1e-9
        elif has_failed(tree, node) and (node.verdict is None or node.verdict.outcome in ("ok", "wrong")):
            reward = node.verdict.reward if node.verdict else 0.0
            assert node.visits == node.samples and abs(node.total - node.visits * reward) < 1e-9
        else:
            assert node.visits == 0 and node.total == 0
        assert node.value is None or 0 <= node.value <= 1
    scored = [tree.nodes[n] for n in tree.answers()]
    assert [node.scored for node in scored] == list(range(len(scored)))
    ended = [node for node in tree.nodes if has_failed(tree, node)]
    assert tree.nodes[0].visits == sum(node.visits for node in [*scored, *ended])
    tokens = [node.scored_tokens for node in scored]
    assert tokens == sorted(tokens) and all(0 < count <= tree.tokens for count in tokens)
    defects = Counter(node.defect for node in tree.nodes if node.defect)
    assert {name: tree.counts.get(name, 0) for name in defects} == defects
    assert sum(node.samples - 1 for node in tree.nodes) == tree.counts.get("duplicates", 0)


def check_bounds(tree: Tree, pattern: Pattern, config: SearchConfig) -> None:
    """Check that no node has more children than its rows in `children` and `after_wrong` allow, counted by draw."""
    for number, node in enumerate(tree.nodes):
        below = Counter[str]()
        for child in children_of(tree, number):
            below[tree.nodes[child].type] += tree.nodes[child].samples
        row, wrong = pattern.children.get(node.type, {}), pattern.after_wrong.get(node.type, {})
        if config.expansion == "node":
            for name, count in below.items():
                assert count <= row.get(name, 0) + (wrong.get(name, 0) if config.backtracking else 0)
        elif not isinstance(config.selection, SurpriseConfig | RevisionConfig):  # they draw at any place
            # Each draw of a node may have the children of its row. A longer chain is cut below the node.
            bound = max(1, sum(row.values())) * node.samples
            assert sum(below.values()) <= bound + (sum(wrong.values()) if config.backtracking else 0)
    assert tree.counts.get("backtracks", 0) >= sum(node.backtrack for node in tree.nodes)


def check_verdicts(grown: Grown, world: World) -> None:
    """Check that each chain is judged at most once, as a whole, and each answer of an exhausted tree exactly once."""
    tree = grown.tree
    judged = [n for n, node in enumerate(tree.nodes) if node.verdict is not None]
    assert Counter(grown.judged) == Counter(tree.completion(n) for n in judged)
    for number in judged:
        node = tree.nodes[number]
        failed = has_failed(tree, node)
        assert failed or (node.defect is None and is_terminal(node, world.pattern))
        assert node.verdict == world.judge(tree.completion(number), not failed or node.finish_reason != "length")
        assert (node.scored >= 0) == (not failed and node.verdict.outcome in ("ok", "wrong"))
    if tree.stop == "exhausted":
        whole = [n for n, node in enumerate(tree.nodes) if node.defect is None and is_terminal(node, world.pattern)]
        assert whole == [n for n in judged if tree.nodes[n].defect is None]


def check_values(grown: Grown, config: SearchConfig) -> None:
    """Check that the values of nodes are those of the answers, and that a node with the value 0 ends its chain."""
    tree, defect = grown.tree, "wrong_step" if isinstance(config.value, StepsValueConfig) else "pruned"
    answers = [event[1] for event in grown.events if isinstance(event, tuple) and isinstance(event[1], Values)]
    lines = {line.chain(len(line.texts)): line for lines in grown.valued for line in lines}
    assert tree.counts.get("values", 0) == sum(len(line) for answer in answers for line in answer.values)
    assert tree.counts.get("value_error", 0) == sum(answer.failed.get("error", 0) for answer in answers)
    assert bool(lines) <= (config.value is not None)
    for number, node in enumerate(tree.nodes):
        assert node.estimate in (None, 0.0, 1.0) and (node.defect == defect) == (node.estimate == 0.0)
        assert node.estimate is None or any(line.startswith(tree.completion(number)) for line in lines)


def check_stop(grown: Grown, config: SearchConfig) -> None:
    """Check that no model is asked after the answer that reaches a limit. Answers were applied as they came."""
    stop, tree, search = config.stop, grown.tree, grown.search
    assert tree.simulations <= stop.simulations
    assert grown.most_running <= config.parallel_simulations
    tokens = scored = 0
    right: set[str] = set()
    failed = {tree.completion(n) for n, node in enumerate(tree.nodes) if node.verdict and node.defect}
    judged = {event.number: event.completion for event in grown.events if isinstance(event, Judge)}
    reached: set[str] = set()
    for event in grown.events:
        if isinstance(event, Ask | Value):
            assert not reached
        elif isinstance(event, tuple):
            number, answer, finished = event
            if any(len(right) >= rule.count and finished >= rule.after for rule in stop.correct):
                reached.add("correct")
            if isinstance(answer, Verdict) and judged[number] in failed:
                continue
            if isinstance(answer, Verdict):
                scored += answer.outcome in ("ok", "wrong")
                if answer.outcome == "ok" and answer.reward > 0:
                    right.add("".join(THOUGHT.findall(judged[number])) or judged[number])
            elif not isinstance(answer, Values):
                tokens += sum(len(drawn.token_ids) for drawn in answer)
            if stop.tokens is not None and tokens >= stop.tokens:
                reached.add("tokens")
            if stop.answers is not None and scored >= stop.answers:
                reached.add("answers")
            if any(len(right) >= rule.count for rule in stop.correct if rule.after == 0):
                reached.add("correct")
    if tree.stop in ("tokens", "answers"):
        assert tree.stop in reached
    elif tree.stop == "correct":
        assert any(len(right) >= rule.count and tree.simulations >= rule.after for rule in stop.correct)
    elif tree.stop == "simulations":
        assert tree.simulations == stop.simulations and not reached
    else:
        assert tree.simulations < stop.simulations and not reached
        assert (
            isinstance(config.selection, SurpriseConfig | RevisionConfig)
            or search._tree.root.status is Status.EXHAUSTED
        )
    # Nothing is running. Only backtracking children that the end of the search cut off may still be queued.
    queued = Counter(node.number for node, _ in search._backtracking.queue)
    assert all(node.in_flight == 0 and not node.expanding for node in search._tree.nodes)
    assert {node.number: node.waiting for node in search._tree.nodes if node.waiting} == queued
    assert not queued or tree.stop != "exhausted"


def check_calls(grown: Grown, models: Mapping[Role, SearchModel], config: SearchConfig, max_chain_tokens: int) -> None:
    """Check the tree's counts of calls and tokens, the limits of every call, and that each seed is used once."""
    calls = grown.calls
    assert grown.tree.calls == len(calls)
    assert grown.tree.tokens == sum(len(drawn.token_ids) for _, drawn in calls)
    assert len({call.seed for call, _ in calls}) == len(calls)
    for call, drawn in calls:
        room = models[call.role]
        assert 1 <= len(drawn.token_ids) <= call.max_tokens
        assert len(call.token_ids) + call.max_tokens <= room.max_model_len
        assert len(call.token_ids) - len(room.prompt_ids) + call.max_tokens <= max_chain_tokens
        if config.expansion == "node":
            assert call.max_tokens <= config.max_node_tokens


def in_tokens_of(
    tree: Tree, number: int, reader: SearchModel, models: Mapping[Role, SearchModel]
) -> Iterator[tuple[int, list[int]]]:
    """Yield the tokens of each node on a path as `reader` must have seen them. It encodes the texts of other models."""
    spill = ""
    for step in tree.path(number):
        node = tree.nodes[step]
        if models[node.writer].codec.digest == reader.codec.digest:
            yield step, node.token_ids.tolist()
            spill = node.spill
        else:
            yield step, reader.codec.encode(node.text.removeprefix(spill))
            spill = ""


def check_tokens(tree: Tree, models: Mapping[Role, SearchModel]) -> None:
    """Check that every token was drawn after exactly the prompt and the nodes above it, and kept its version.

    In the scripted world a log-probability is a hash of all tokens up to its own.
    """
    for number, node in enumerate(tree.nodes[1:], start=1):
        reader = models[node.writer]
        context = list(reader.prompt_ids)
        for step, ids in in_tokens_of(tree, number, reader, models):
            if step != number:
                context += ids
        whole = [*context, *node.token_ids.tolist()]
        start = len(context)
        expected = [token_logprob(whole[: start + place + 1]) for place in range(node.forced, len(node.token_ids))]
        assert node.logprobs[: node.forced].tolist() == [0.0] * node.forced
        assert node.logprobs[node.forced :].tolist() == expected
        own = [token_version(start + place) for place in range(len(node.token_ids))]
        changes = [n for n in range(node.forced, len(own)) if n == node.forced or own[n] != own[n - 1]]
        assert node.versions == tuple(VersionSpan(start=n, version=own[n]) for n in changes)


def check_round_trip(tree: Tree, models: Mapping[Role, SearchModel]) -> None:
    """Check paths as training gets them: their spans, and the policy's tokens with log-probabilities and versions."""
    policy = models.get("policy", search_model())
    for number in tree.answers():
        path = path_tokens(tree, number, policy.codec)
        assert path.token_ids[: path.prompt_length].tolist() == codec(policy.codec.digest).prompt(tree.question)
        assert [n for n, _, _ in path.spans] == tree.path(number)
        edges = [path.prompt_length, *(stop for _, _, stop in path.spans)]
        assert [start for _, start, _ in path.spans] == edges[:-1] and edges[-1] == len(path.token_ids)
        chosen = np.zeros(len(path.token_ids), dtype=bool)
        readings = in_tokens_of(tree, number, policy, {**models, "policy": policy})
        for (step, start, stop), (_, ids) in zip(path.spans, readings, strict=True):
            node = tree.nodes[step]
            assert path.token_ids[start:stop].tolist() == ids
            if node.writer == "policy":
                chosen[start + node.forced : stop] = True
        assert path.chosen.tolist() == chosen.tolist()
        whole = path.token_ids.tolist()
        expected = [token_logprob(whole[: place + 1]) if chosen[place] else 0.0 for place in range(len(whole))]
        assert path.logprobs.tolist() == expected
        versions: dict[int, int] = {}
        for span in path.versions:
            versions.update(dict.fromkeys(range(span.start, len(whole)), span.version))
        assert all(versions[place] == token_version(place) for place in np.flatnonzero(chosen))
