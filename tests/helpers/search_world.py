"""A scripted world for tree search: writers and a verifier that are functions of what they are shown.

The tokenizers are real. What a writer says is decided by the chain so far and the seed of the call, the
log-probability and the weight version of a token by the tokens up to it, the verdict by the text. So whatever a
search keeps of a token can be checked against the context that it claims to have been drawn in.
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
from actors.search.mcts import TreeSearch
from actors.search.requests import Ask, Call, Judge, SearchWriter
from rlsys.config.patterns import NODE_TYPES, TABLES, Pattern, resolve
from rlsys.config.search import START, NodeTypeConfig, SearchConfig
from rlsys.models.scratch import build_tokenizer
from rlsys.search.codec import TagCodec
from rlsys.trees import Tree, Writer
from rlsys.types import Prompt, Verdict, VersionSpan

QUESTION = "how many a in aab"
TAGS = tuple(node.tag for node in NODE_TYPES.values())
MARK = re.compile("<(/?)(" + "|".join(TAGS) + ")>")
BARE = {name: node.model_copy(update={"prefixes": ()}) for name, node in NODE_TYPES.items() if node.writer != "nobody"}
"""The shipped node types without prefixes, so that chains are short. A fixed node keeps its text."""
BARE["reflection"] = NodeTypeConfig(tag="reflection", prefixes=("wait", "no"), writer="nobody")


@cache
def codec(kind: str = "tags") -> TagCodec:
    """tags: one added token a tag; bytes: one token a byte; bpe: trained, "><" is one token across a tag's edge."""
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


def writer(kind: str = "tags", max_model_len: int = 600) -> SearchWriter:
    return SearchWriter(
        model=f"{kind} model",
        codec=codec(kind),
        prompt_ids=tuple(codec(kind).prompt(QUESTION)),
        max_model_len=max_model_len,
    )


def prompt(prompt_id: str = "p") -> Prompt:
    token_ids = np.array(codec().prompt(QUESTION), dtype=np.int32)
    return Prompt(prompt_id=prompt_id, token_ids=token_ids, answer="1", question=QUESTION)


def shipped(name: str) -> Pattern:
    """A shipped table, its nodes without prefixes."""
    return resolve(SearchConfig(patterns=(name,), nodes=BARE))[name]


def table(
    children: Mapping[str, Mapping[str, int]],
    after_wrong: Mapping[str, Mapping[str, int]] | None = None,
    nodes: Mapping[str, NodeTypeConfig] | None = None,
) -> Pattern:
    """A table of one's own over the shipped types without prefixes."""
    config = SearchConfig.model_validate(
        {
            "patterns": ["own"],
            "nodes": {**BARE, **(nodes or {})},
            "tables": {"own": {"children": children, "after_wrong": after_wrong or {}}},
        }
    )
    return resolve(config)["own"]


def token_logprob(token_ids: Sequence[int]) -> float:
    """Of the last token, given those before it; a float32 exactly."""
    return -(zlib.crc32(np.asarray(token_ids, dtype=np.int32).tobytes()) % 997 + 1) / 256


def token_version(position: int) -> int:
    """Weights change in the middle of nodes."""
    return position // 5


def completion(call: Call, token_ids: Sequence[int], finish_reason: str = "stop") -> Completion:
    """What a writer drew in a call, with the log-probabilities and versions that its context gives it."""
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
    """defects: how often a node or a chain goes wrong; failures: how often the verifier does."""

    pattern: Pattern
    defects: float = 0.1
    failures: float = 0.05
    letters: str = "ab"
    answers: str = "01"

    def complete(self, call: Call, found: SearchWriter) -> Completion:
        said = found.codec.decode(call.token_ids[len(found.prompt_ids) :])
        rng = random.Random(f"{said}/{call.seed}")
        text = self._node(said, rng) if call.stop.token_ids or call.stop.strings else self._chain(said, rng)
        return spoken(call, found.codec, text)

    def judge(self, chain: str) -> Verdict:
        rng = random.Random(chain)
        if rng.random() < self.failures:
            return Verdict(outcome=rng.choice(("error", "timeout")), reward=0.0, answered=False)
        if chain.endswith("1</answer>"):
            return Verdict(outcome="ok", reward=1.0, answered=True)
        return Verdict(outcome="wrong", reward=rng.choice((0.0, 0.25)), answered=True)

    def _body(self, tag: str, rng: random.Random) -> str:
        if tag == "answer":
            return rng.choice(self.answers)
        return "".join(rng.choices(self.letters, k=rng.randint(0, 2)))

    def _node(self, said: str, rng: random.Random) -> str:
        """The rest of the node that was begun; what stands behind its closing tag is never drawn."""
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
            before = by_tag[tag]
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
                tag = rng.choice(TAGS)  # perhaps one that may not stand here
            parts.append(f"{gap}<{tag}>{self._body(tag, rng)}</{tag}>")
            if rng.random() < self.defects / 4:
                parts.append("b")  # text outside a node
            held = ""
        return "".join(parts).removeprefix(said[marks[-1].end() if marks else 0 :].strip())


class Script:
    """A world that says what it is told to: for the text that a writer continues, what it says there, call by call.

    An answer with a 1 in it is right, with a 0 wrong; e is an error of the verifier, t a timeout.
    """

    def __init__(self, pattern: Pattern, proposals: Mapping[str, Sequence[str]]) -> None:
        self.pattern = pattern
        self.left = {said: deque(texts) for said, texts in proposals.items()}

    def complete(self, call: Call, found: SearchWriter) -> Completion:
        said = found.codec.decode(call.token_ids[len(found.prompt_ids) :])
        return spoken(call, found.codec, self.left[said].popleft())

    def judge(self, chain: str) -> Verdict:
        text = MARK.split(chain)[-4]  # in front of the last closing tag, which is split in three
        for letter, outcome in (("e", "error"), ("t", "timeout")):
            if letter in text:
                return Verdict(outcome=outcome, reward=0.0, answered=False)
        return Verdict(outcome="ok" if "1" in text else "wrong", reward=float("1" in text), answered=True)


def spoken(call: Call, codec: TagCodec, text: str) -> Completion:
    """A completion that says a text and then ends, cut where an engine would stop."""
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
    """A finished tree and how it came about.

    events: requests when they were made, answers when they were delivered, with the simulations finished by then.
    """

    tree: Tree
    search: TreeSearch
    events: list[Ask | Judge | tuple[int, Sequence[Completion] | Verdict, int]]
    most_running: int

    @property
    def calls(self) -> list[tuple[Call, Completion]]:
        answers = {event[0]: event[1] for event in self.events if isinstance(event, tuple)}
        asks = [event for event in self.events if isinstance(event, Ask)]
        return [pair for ask in asks for pair in zip(ask.calls, answers[ask.number], strict=True)]

    @property
    def judged(self) -> list[str]:
        return [event.completion for event in self.events if isinstance(event, Judge)]


def grow(
    world: World | Script,
    config: SearchConfig,
    *,
    arrivals: random.Random | None = None,
    writers: Mapping[Writer, SearchWriter] | None = None,
    prompt_id: str = "p",
    seed: int = 0,
    max_chain_tokens: int = 500,
) -> Grown:
    """Search to the end.

    Args:
        arrivals: draws the order in which answers come; None for the order in which they are applied: verdicts first,
            otherwise as asked.
    """
    writers = writers or {"policy": writer()}
    search = TreeSearch(prompt(prompt_id), world.pattern, config, writers, max_chain_tokens=max_chain_tokens, seed=seed)
    events: list[Any] = []
    waiting, most = search.start(), 0
    events += waiting
    while waiting:
        first = next((n for n, request in enumerate(waiting) if isinstance(request, Judge)), 0)
        request = waiting.pop(arrivals.randrange(len(waiting)) if arrivals else first)
        answer: Sequence[Completion] | Verdict
        if isinstance(request, Ask):
            answer = [world.complete(call, writers[call.writer]) for call in request.calls]
        else:
            answer = world.judge(request.completion)
        events.append((request.number, answer, search._simulations.finished))
        new = search.deliver(request.number, answer)
        events += new
        waiting += new
        most = max(most, search._tree.root.in_flight)
    assert search.finished
    return Grown(tree=search.tree(), search=search, events=events, most_running=most)


def shipped_names() -> list[str]:
    return sorted(TABLES)
