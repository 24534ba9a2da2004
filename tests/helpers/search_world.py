"""A scripted world for tree search: models and a verifier that are pure functions of their input.

The tokenizers are real. The chain so far and the seed of a call decide the text of a completion. The tokens up to a
token decide its log-probability and its weight version. The text decides the verdict. So a test can check all that a
search records of a token against the context in which the token was drawn.
"""

from __future__ import annotations

import random
import re
import zlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from actors.engine import Completion
from actors.search.jobs import Answer
from actors.search.mcts import TreeSearch
from actors.search.requests import Ask, Call, Judge, Request, SearchModel, Thoughts, Turn, Value, Values
from actors.search.turns import SearchedEnvironment
from rlsys.config.patterns import NODE_TYPES, TABLES, Pattern, resolve
from rlsys.config.search import START, NodeTypeConfig, SearchConfig, StopConfig
from rlsys.models.scratch import build_tokenizer
from rlsys.search.codec import TagCodec
from rlsys.trees import Role, Tree
from rlsys.types import Prompt, Verdict, VersionSpan

QUESTION = "how many a in aab"
THINK = "<thinking>a</thinking>"
ONE_THOUGHT = {"start": {"thinking": 1}}
TAGS = tuple(node.tag for node in NODE_TYPES.values())
MARK = re.compile("<(/?)(" + "|".join(TAGS) + ")>")
BARE = {name: node.model_copy(update={"prefixes": ()}) for name, node in NODE_TYPES.items() if node.writer != "nobody"}
"""The shipped node types without prefixes, so that chains are short. The reflection has fixed texts."""
BARE["reflection"] = NodeTypeConfig(tag="reflection", prefixes=("wait", "no"), writer="nobody")


@cache
def codec(kind: str = "tags") -> TagCodec:
    """Return a codec.

    Args:
        kind: "tags" has one added token for each tag; "bytes" one token for each byte; "bpe" is trained, with a token
            "><" that crosses the edge of a tag.
    """
    if kind == "bpe":
        tokenizer = _bpe()
    else:
        entries = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
        tokenizer = build_tokenizer([*entries, *"ab01"] if kind == "tags" else [], 4096)
    return TagCodec(tokenizer, TAGS, [tokenizer.eos_token_id], digest=kind)


def _bpe() -> Any:
    from bpe_model import CHAT_TEMPLATE, EOS, PAD, SPECIAL_TOKENS, _train
    from transformers import Qwen2Tokenizer

    chain = "".join(f"<{tag}>{letters}</{tag}>" for tag in TAGS for letters in ("a", "b", "ab", "0"))
    vocab, merges = _train([chain, f"{chain}\n"], 420)
    special = {"extra_special_tokens": list(SPECIAL_TOKENS[2:]), "chat_template": CHAT_TEMPLATE}
    return Qwen2Tokenizer(vocab=vocab, merges=merges, unk_token=None, pad_token=PAD, eos_token=EOS, **special)


def search_model(kind: str = "tags", max_model_len: int = 600) -> SearchModel:
    return SearchModel(
        model=f"{kind} model",
        codec=codec(kind),
        prompt_ids=tuple(codec(kind).prompt(QUESTION)),
        max_model_len=max_model_len,
    )


def prompt(prompt_id: str = "p") -> Prompt:
    token_ids = np.array(codec().prompt(QUESTION), dtype=np.int32)
    return Prompt(prompt_id=prompt_id, token_ids=token_ids, answer="1", question=QUESTION)


def shipped(name: str) -> Pattern:
    """Return a shipped table. Its nodes have no prefixes."""
    return resolve(SearchConfig(patterns=(name,), nodes=BARE))[name]


def table(
    children: Mapping[str, Mapping[str, int]],
    after_wrong: Mapping[str, Mapping[str, int]] | None = None,
    nodes: Mapping[str, NodeTypeConfig] | None = None,
) -> Pattern:
    """Return a new table over the shipped types without prefixes."""
    config = SearchConfig.model_validate(
        {
            "patterns": ["own"],
            "nodes": {**BARE, **(nodes or {})},
            "tables": {"own": {"children": children, "after_wrong": after_wrong or {}}},
        }
    )
    return resolve(config)["own"]


def token_logprob(token_ids: Sequence[int]) -> float:
    """Return the log-probability of the last token given the tokens before it, exact as a float32."""
    return -(zlib.crc32(np.asarray(token_ids, dtype=np.int32).tobytes()) % 997 + 1) / 256


def token_version(position: int) -> int:
    """Return the weight version of a token. It changes in the middle of nodes."""
    return position // 5


def completion(call: Call, token_ids: Sequence[int], finish_reason: str = "stop") -> Completion:
    """Return the completion with the given tokens. Its context decides log-probabilities and versions."""
    start = len(call.token_ids)
    whole = [*call.token_ids, *token_ids]
    places = range(start, len(whole))
    versions = [token_version(place) for place in places]
    changes = [n for n, version in enumerate(versions) if n == 0 or version != versions[n - 1]]
    return Completion(
        token_ids=np.asarray(token_ids, dtype=np.int32),
        logprobs=np.array([token_logprob(whole[: place + 1]) for place in places], dtype=np.float32),
        finish_reason=finish_reason,
        versions=tuple(VersionSpan(start=n, version=versions[n]) for n in changes),
    )


@dataclass(frozen=True, kw_only=True)
class World:
    """Models and a verifier that behave at random, with the seed of each call.

    Attributes:
        defects: Probability of a defect in a node or a chain.
        failures: Probability of a failed verification.
        wrong: Probability that a step is wrong, for searches with values.
    """

    pattern: Pattern
    defects: float = 0.1
    failures: float = 0.05
    wrong: float = 0.2
    letters: str = "ab"
    answers: str = "01"

    def complete(self, call: Call, model: SearchModel) -> Completion:
        said = model.codec.decode(call.token_ids[len(model.prompt_ids) :])
        rng = random.Random(f"{said}/{call.seed}")
        text = self._node(said, rng) if call.stop.token_ids or call.stop.strings else self._chain(said, rng)
        return spoken(call, model.codec, text)

    def judge(self, chain: str, finished: bool = True) -> Verdict:
        rng = random.Random(chain)
        if rng.random() < self.failures:
            return Verdict(outcome=rng.choice(("error", "timeout")), reward=0.0, answered=False)
        if not finished:
            return Verdict(outcome="wrong", reward=0.0, answered=False)
        if chain.endswith("1</answer>"):
            return Verdict(outcome="ok", reward=1.0, answered=True)
        return Verdict(outcome="wrong", reward=rng.choice((0.0, 0.25)), answered=True)

    def value(self, request: Value) -> Values:
        """Say which new nodes are wrong. Sometimes fail, and sometimes do not tell."""

        def of_line(line: Thoughts) -> tuple[float | None, ...]:
            rng = random.Random(f"values of {line.chain(len(line.texts))}")
            if rng.random() < self.failures:
                return (None,) * len(line.texts)
            return tuple(float(rng.random() >= self.wrong) for _ in line.texts)

        values = tuple(map(of_line, request.lines))
        failed = sum(value is None for line in values for value in line)
        return Values(values=values, failed={"error": failed} if failed else {}, tokens=0)

    def _body(self, tag: str, rng: random.Random) -> str:
        if tag == "answer":
            return rng.choice(self.answers)
        return "".join(rng.choices(self.letters, k=rng.randint(0, 2)))

    def _node(self, said: str, rng: random.Random) -> str:
        """Return the rest of the open node. The call ends at its closing tag."""
        tag = MARK.findall(said)[-1][1]
        body, rest = self._body(tag, rng), f"</{tag}><thinking>"
        if rng.random() >= self.defects:
            return body + rest
        return rng.choice((body, "ab" * 200 + rest, f"{body}<thinking>{rest}", f"{body}</sub-task>{rest}"))

    def _chain(self, said: str, rng: random.Random) -> str:
        marks = list(MARK.finditer(said))
        by_tag = {node.tag: name for name, node in self.pattern.types.items()}
        before, parts = START, []
        if marks:
            slash, tag = marks[-1].groups()
            before = by_tag.get(tag, "")  # nothing follows a tag that the table does not have
            if not slash:
                parts.append(f"{self._body(tag, rng)}</{tag}>")
        held = "" if parts else said[marks[-1].end() if marks else 0 :].strip()
        for number in range(8):
            row = self.pattern.children.get(before, {})
            if not row or (parts and rng.random() < self.defects / 2):
                break
            names = [name for name, count in row.items() for _ in range(count)]
            before = rng.choice([n for n in names if f"<{self.pattern.types[n].tag}>".startswith(held)] or names)
            tag, gap = self.pattern.types[before].tag, rng.choice(("", "", "\n")) if number else ""
            if rng.random() < self.defects / 2:
                tag = rng.choice(TAGS)  # may be a tag that the table does not allow here
            parts.append(f"{gap}<{tag}>{self._body(tag, rng)}</{tag}>")
            if rng.random() < self.defects / 4:
                parts.append("b")  # text outside a node
            held = ""
        return "".join(parts).removeprefix(said[marks[-1].end() if marks else 0 :].strip())


class Script:
    """A world that plays a script.

    An answer with a 1 is right, one with a 0 wrong. The verifier fails with an error on e, with a timeout on t.

    Args:
        proposals: Completions by the chain that they continue, in the order of the calls.
        values: Values of nodes by their texts, 1 for all others.
    """

    def __init__(
        self, pattern: Pattern, proposals: Mapping[str, Sequence[str]], values: Mapping[str, float | None] = {}
    ) -> None:
        self.pattern, self.values = pattern, values
        self.left = {said: deque(texts) for said, texts in proposals.items()}

    def complete(self, call: Call, model: SearchModel) -> Completion:
        said = model.codec.decode(call.token_ids[len(model.prompt_ids) :])
        return spoken(call, model.codec, self.left[said].popleft())

    def judge(self, chain: str, finished: bool = True) -> Verdict:
        pieces = MARK.split(chain)
        if not finished or len(pieces) < 4:
            return Verdict(outcome="wrong", reward=0.0, answered=False)
        text = pieces[-4]  # the text before the last closing tag, which the pattern splits in three
        for letter, outcome in (("e", "error"), ("t", "timeout")):
            if letter in text:
                return Verdict(outcome=outcome, reward=0.0, answered=False)
        return Verdict(outcome="ok" if "1" in text else "wrong", reward=float("1" in text), answered=True)

    def value(self, request: Value) -> Values:
        return Values(values=tuple(tuple(self.values.get(text, 1.0) for text in line.texts) for line in request.lines))


def spoken(call: Call, codec: TagCodec, text: str) -> Completion:
    """Return a completion with a text and an end token, cut where an engine would stop."""
    said: list[int] = []
    for token in [*codec.encode(text), codec.end_token_id]:
        said.append(token)
        stopped = token in codec.end_token_ids or token in call.stop.token_ids
        if stopped or any(string in codec.decode(said) for string in call.stop.strings):
            return completion(call, said)
        if len(said) == call.max_tokens:
            break
    return completion(call, said, "length")


@dataclass(kw_only=True)
class Grown:
    """A finished tree and its history.

    Attributes:
        events: Requests, and answers as (number, answer, simulations finished before), in the order of time.
        most_running: Largest number of simulations that ran at once.
    """

    tree: Tree
    search: TreeSearch
    events: list[Request | tuple[int, Answer, int]]
    most_running: int

    @property
    def calls(self) -> list[tuple[Call, Completion]]:
        answers = {event[0]: event[1] for event in self.events if isinstance(event, tuple)}
        asks = [event for event in self.events if isinstance(event, Ask)]
        return [pair for ask in asks for pair in zip(ask.calls, answers[ask.number], strict=True)]

    @property
    def judged(self) -> list[str]:
        return [event.completion for event in self.events if isinstance(event, Judge)]

    @property
    def valued(self) -> list[tuple[Thoughts, ...]]:
        return [event.lines for event in self.events if isinstance(event, Value)]


def grow(
    world: World | Script,
    config: SearchConfig,
    *,
    arrivals: random.Random | None = None,
    models: Mapping[Role, SearchModel] | None = None,
    prompt_id: str = "p",
    seed: int = 0,
    max_chain_tokens: int = 500,
    environment: SearchedEnvironment | None = None,
) -> Grown:
    """Search one prompt to its end.

    Args:
        environment: Its replies are those of `world.reply`.
        arrivals: Draws the order in which answers arrive. None: they arrive in the order in which they are applied,
            verdicts and values first and otherwise in the order of the requests.
    """
    models = models or {"policy": search_model()}
    search = TreeSearch(
        prompt(prompt_id),
        world.pattern,
        config,
        models,
        max_chain_tokens=max_chain_tokens,
        seed=seed,
        environment=environment,
    )
    events: list[Any] = []
    waiting, most = search.start(), 0
    events += waiting
    while waiting:
        first = next((n for n, request in enumerate(waiting) if isinstance(request, Judge | Turn | Value)), 0)
        request = waiting.pop(arrivals.randrange(len(waiting)) if arrivals else first)
        answer: Answer
        if isinstance(request, Ask):
            answer = [world.complete(call, models[call.role]) for call in request.calls]
        elif isinstance(request, Value):
            answer = world.value(request)
        elif isinstance(request, Turn):
            answer = world.reply(request.turns)
        else:
            answer = world.judge(request.completion, request.finished)
        events.append((request.number, answer, search._stop.finished))
        new = search.deliver(request.number, answer)
        events += new
        waiting += new
        most = max(most, search._tree.root.in_flight)
    assert search.finished
    return Grown(tree=search.tree(), search=search, events=events, most_running=most)


def search_config(**fields: Any) -> SearchConfig:
    """Return a config with one simulation at a time and no rule on correct answers, unless `fields` change this."""
    stop = StopConfig.model_validate({"correct": (), **fields.pop("stop", {})})
    return SearchConfig(**{"parallel_simulations": 1, "stop": stop, **fields})


def scripted(
    children: Mapping[str, Any],
    proposals: Mapping[str, Any],
    after_wrong: Mapping[str, Any] = {},
    values: Mapping[str, float | None] = {},
) -> Script:
    return Script(table(children, after_wrong), proposals, values)


def shipped_names() -> list[str]:
    return sorted(TABLES)
