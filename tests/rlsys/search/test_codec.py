"""The codec, for tags of one token and for a trained BPE whose merges cross the edges of tags."""

from __future__ import annotations

import random
import re
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlsys.errors import ConfigError
from rlsys.models.scratch import build_tokenizer
from rlsys.search.codec import Reading, Stop, TagCodec
from rlsys.tasks.tags import tag_strings

TAGS = ("sub-task", "thinking", "double-check", "answer")


def wrap(backend: Any, end: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)


# Pre-tokenizer of Qwen: ">\n", "><" and " </" are words, so merges join the edges of tags.
QWEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def trained(words: bool, name: str) -> TagCodec:
    """Return the codec of a byte-level BPE trained on chains. Without `words`, merges also join text and tags."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    rng, letters = random.Random(0), "ab3é\n"
    gaps, ends = ("", "", "\n", " ", "\n\n"), ("", "a", "\n", ".", " so", " ")

    def chain() -> str:
        return "".join(
            f"{rng.choice(gaps)}<{tag}>{rng.choice(letters)}{rng.choice(('x', ' y', 'so '))}{rng.choice(ends)}</{tag}>"
            for tag in rng.choices(TAGS, k=4)
        )

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), byte_level])
    tokenizer.pre_tokenizer = split if words else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=6,
        show_progress=False,
    )
    tokenizer.train_from_iterator([chain() for _ in range(400)], trainer)
    wrapped = wrap(tokenizer, "<|end|>")
    return TagCodec(wrapped, TAGS, [wrapped.eos_token_id], digest=name)


@cache
def merged() -> TagCodec:
    return trained(words=True, name="merged")


@cache
def wild() -> TagCodec:
    return trained(words=False, name="wild")


@cache
def added() -> TagCodec:
    """Return the codec of a from-scratch tokenizer. Every tag is one added token."""
    tokenizer = build_tokenizer([*tag_strings(), "so", "xy"], 512)
    return TagCodec(tokenizer, TAGS, [tokenizer.eos_token_id], digest="own")


EVERY = pytest.mark.parametrize("codec", [merged(), wild(), added()], ids=["merged", "wild", "added"])

texts = st.text(st.sampled_from("abxy3 \n.<>/é😀—"), max_size=8).filter(lambda text: f"<{text}>" not in tag_strings())
gaps = st.sampled_from(("", "", "\n", " ", "\n\n"))
chains = st.lists(st.tuples(gaps, st.sampled_from(TAGS), texts), min_size=1, max_size=5)


def node(tag: str, text: str) -> str:
    return f"<{tag}>{text}</{tag}>"


def joined(readings: list[Reading]) -> str:
    return "".join(reading.text for reading in readings)


def assert_partition(readings: list[Reading], tokens: int) -> None:
    bounds = [0, *(reading.stop for reading in readings)]
    assert [reading.start for reading in readings] == bounds[:-1]
    assert bounds[-1] == tokens


def crossing(codec: TagCodec) -> set[str]:
    """Return the texts of tokens that hold an edge of a tag and further characters."""
    inner = ("a", "3", "a ", "so\n")
    text = "".join(node(tag, a) + gap for tag in TAGS for gap in ("", "\n", " ", "\n\n") for a in inner)
    pieces = {codec.decode([token]) for token in codec.encode(text)}
    return {piece for piece in pieces if re.search(r">[\s\S]|[^<>]<", piece)}


def test_the_trained_merges_cross_the_edges_of_tags() -> None:
    assert {"><", ">\n", " </"} <= crossing(merged())
    assert {"a</", "er>\n<", "ask><"} <= crossing(wild())
    assert crossing(added()) == set()


@EVERY
@settings(deadline=None)
@given(chain=chains)
@example(chain=[("", "thinking", "a"), ("", "answer", "3")])
@example(chain=[("", "thinking", "a"), ("\n", "answer", "é"), (" ", "answer", "")])
def test_a_chain_is_cut_into_its_nodes(codec: TagCodec, chain: list[tuple[str, str, str]]) -> None:
    text = "".join(gap + node(tag, inner) for gap, tag, inner in chain)
    ids = codec.encode(text)
    readings = codec.read("", ids, "stop")
    assert joined(readings) == text
    assert_partition(readings, len(ids))
    assert [reading.tag for reading in readings] == [tag for _, tag, _ in chain]
    assert all(reading.defect is None for reading in readings)
    for reading, (_, tag, inner) in zip(readings, chain, strict=True):
        assert reading.text.strip() == node(tag, inner)
        # The closing tag needs the last token of a node. Its further characters are the spill.
        assert codec.decode(ids[: reading.stop]).endswith(reading.text + reading.spill)
        assert f"</{tag}>" not in codec.decode(ids[reading.start : reading.stop - 1])
        assert reading.spill == "" or reading.spill.strip()


@EVERY
@settings(deadline=None)
@given(chain=chains.filter(lambda nodes: len(nodes) > 1), data=st.data())
@example(chain=[("", "thinking", "a"), ("", "thinking", "a")], data=None)
def test_a_chain_can_be_read_in_two_parts(codec: TagCodec, chain: list[tuple[str, str, str]], data: Any) -> None:
    ids = codec.encode("".join(gap + node(tag, inner) for gap, tag, inner in chain))
    whole = codec.read("", ids, "stop")
    number = data.draw(st.integers(1, len(whole) - 1)) if data else 1
    cut = whole[number - 1].stop
    first = codec.read("", ids[:cut], "stop")
    rest = codec.read(first[-1].spill, ids[cut:], "stop")
    assert first == whole[:number]
    assert [(r.tag, r.text, r.spill, r.start + cut, r.stop + cut) for r in rest] == [
        (r.tag, r.text, r.spill, r.start, r.stop) for r in whole[number:]
    ]


def test_a_spill_in_numbers() -> None:
    codec = merged()
    ids = codec.encode("<thinking>a</thinking><answer>3</answer>")
    pieces = [codec.decode([token]) for token in ids]
    edge = pieces.index("><")
    assert codec.read("", ids, "stop") == [
        Reading(tag="thinking", start=0, stop=edge + 1, text="<thinking>a</thinking>", spill="<"),
        Reading(tag="answer", start=edge + 1, stop=len(ids), text="<answer>3</answer>"),
    ]
    # A completion that stops at the tag ends with the same token. The spill is not a separate piece.
    assert codec.read("", ids[: edge + 1], "stop") == codec.read("", ids, "stop")[:1]


def test_white_space_in_a_closing_token_is_not_a_spill() -> None:
    codec = merged()
    ids = codec.encode("<thinking>a</thinking>\n<answer>3</answer>")
    edge = [codec.decode([token]) for token in ids].index(">\n")
    assert [(r.stop, r.text, r.spill) for r in codec.read("", ids, "stop")] == [
        (edge + 1, "<thinking>a</thinking>\n", ""),
        (len(ids), "<answer>3</answer>", ""),
    ]
    # White space in separate tokens belongs to the next node.
    separate = [(r.text, r.spill) for r in added().read("", added().encode(codec.decode(ids)), "stop")]
    assert separate == [("<thinking>a</thinking>", ""), ("\n<answer>3</answer>", "")]


def test_a_closing_token_with_a_whole_further_node_has_it_as_spill() -> None:
    tokenizer = build_tokenizer(["</thinking><answer>3</answer>"], 512)
    codec = TagCodec(tokenizer, TAGS, [tokenizer.eos_token_id], digest="own")
    ids = codec.encode("<thinking>a</thinking><answer>3</answer>")
    assert codec.read("", ids, "stop") == [
        Reading(tag="thinking", start=0, stop=len(ids), text="<thinking>a</thinking>", spill="<answer>3</answer>")
    ]


def test_a_spill_includes_white_space_before_a_tag() -> None:
    codec = wild()
    text = "<answer>3</answer>\n<answer>3</answer>"
    first, second = codec.read("", codec.encode(text), "stop")
    assert first.spill == "\n<"
    assert (first.text, second.text) == ("<answer>3</answer>", "\n<answer>3</answer>")


fragments = st.sampled_from([*tag_strings()[2:4], *tag_strings()[-2:], "a", "é", "\n", "</", "answer>"])


@settings(deadline=None)
@given(text=st.lists(fragments, max_size=9).map("".join))
def test_both_ways_to_locate_tokens_agree(text: str) -> None:
    codec = added()
    ids = codec.encode(text)
    slow = TagCodec(codec._tokenizer, TAGS, [codec.end_token_id], digest="own")
    slow._tag_tokens = {}
    assert codec.read("", ids, "length") == slow.read("", ids, "length")


@EVERY
@settings(deadline=None)
@given(data=st.data(), finish=st.sampled_from(["stop", "length"]))
def test_any_tokens_are_partitioned_without_loss_of_text(codec: TagCodec, data: Any, finish: str) -> None:
    parts = [*tag_strings()[:4], "<answer>", "</answer>", "a", "é", "😀", "\n", "<", ">"]
    ids = codec.encode("".join(data.draw(st.lists(st.sampled_from(parts), max_size=12))))
    ids = ids[: data.draw(st.integers(0, len(ids)))]  # may end inside a character
    before = data.draw(st.sampled_from(["", "<", "\n<"]))
    readings = codec.read(before, ids, finish)
    assert bool(readings) == bool(ids)
    if readings:
        assert_partition(readings, len(ids))
        rest = readings[-1].spill
        assert joined(readings) + rest == before + codec.decode(ids)
        assert all(reading.defect is None for reading in readings[:-1])


@EVERY
def test_end_tokens_belong_to_the_last_node_and_have_no_text(codec: TagCodec) -> None:
    ids = [*codec.encode("<answer>3</answer>"), codec.end_token_id]
    assert codec.read("", ids, "stop") == [
        Reading(tag="answer", start=0, stop=len(ids), text="<answer>3</answer>"),
    ]
    assert codec.read("", np.array(ids, dtype=np.int32), "stop") == codec.read("", ids, "stop")
    unclosed = [*codec.encode("<answer>3"), codec.end_token_id]
    assert codec.read("", unclosed, "stop") == [
        Reading(tag="answer", start=0, stop=len(unclosed), text="<answer>3", defect="unclosed")
    ]
    alone = codec.read("", [codec.end_token_id], "stop")
    assert alone == [Reading(tag=None, start=0, stop=1, text="", defect="unclosed")]


def test_an_end_token_after_a_spill_leaves_the_spill_as_a_piece() -> None:
    codec = merged()
    ids = codec.encode("<thinking>a</thinking><answer>3</answer>")
    first = codec.read("", ids, "stop")[0]
    readings = codec.read("", [*ids[: first.stop], codec.end_token_id], "stop")
    assert readings[0] == first
    assert readings[1:] == [
        Reading(tag=None, start=first.stop, stop=first.stop + 1, text=first.spill, defect="unclosed")
    ]


@EVERY
@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [
        # (tag, text, defect) of each piece.
        ("<thinking>a", "length", [("thinking", "<thinking>a", "truncated")]),
        ("<thinking>a", "stop", [("thinking", "<thinking>a", "unclosed")]),
        ("<thinking>a</think", "length", [("thinking", "<thinking>a</think", "truncated")]),
        ("<thin", "length", [(None, "<thin", "truncated")]),
        ("<thin", "stop", [(None, "<thin", "unclosed")]),
        ("so", "length", [(None, "so", "malformed")]),
        ("<other>a</other>", "stop", [(None, "<other>a</other>", "malformed")]),
        ("</answer>", "stop", [(None, "</answer>", "malformed")]),
        ("\n", "length", [(None, "\n", "truncated")]),
        (
            "<thinking>a</thinking> so <answer>3</answer>",
            "stop",
            [("thinking", "<thinking>a</thinking>", None), (None, " so <answer>3</answer>", "malformed")],
        ),
        (
            "<thinking>a<answer>3</answer></thinking><answer>3</answer>",
            "stop",
            [("thinking", "<thinking>a<answer>3</answer></thinking><answer>3</answer>", "malformed")],
        ),
        (
            "<thinking>a</thinking>\n<answer>b</thinking>",
            "length",
            [("thinking", "<thinking>a</thinking>", None), ("answer", "\n<answer>b</thinking>", "malformed")],
        ),
        ("<answer>3</answer>\n ", "stop", [("answer", "<answer>3</answer>\n ", None)]),
    ],
)
def test_defects(codec: TagCodec, text: str, finish: str, expected: list[tuple[str | None, str, str | None]]) -> None:
    readings = codec.read("", codec.encode(text), finish)
    # The white space of a token ">\n" belongs to the node that the token closes.
    assert [(r.tag, r.text.strip(), r.defect) for r in readings] == [(tag, t.strip(), d) for tag, t, d in expected]
    assert joined(readings) == text


def test_a_character_of_several_tokens_does_not_shift_the_cuts() -> None:
    codec = added()  # the emoji has four tokens, one per byte
    ids = codec.encode("<thinking>😀</thinking><answer>é</answer>")
    assert [(r.start, r.stop) for r in codec.read("", ids, "stop")] == [(0, 6), (6, 10)]
    cut_off = codec.read("", ids[:3], "length")
    assert cut_off == [Reading(tag="thinking", start=0, stop=3, text="<thinking>\ufffd", defect="truncated")]


def test_a_tag_spelled_in_bytes_is_a_tag() -> None:
    codec = added()
    spelled = [codec.encode(letter)[0] for letter in "</thinking>"]
    ids = [*codec.encode("<thinking>a"), *spelled, *codec.encode("<answer>3</answer>")]
    assert [(r.tag, r.start, r.stop) for r in codec.read("", ids, "stop")] == [("thinking", 0, 13), ("answer", 13, 16)]


def test_a_node_stops_at_any_tag() -> None:
    codec = added()
    assert merged().stop == Stop(strings=merged().tags)
    tokens = codec._tokenizer.convert_tokens_to_ids(list(codec.tags))
    assert codec.stop.strings == () and sorted(codec.stop.token_ids) == sorted(tokens)


def test_special_tokens_are_text_and_end_tokens_are_not() -> None:
    codec = added()
    user = codec._tokenizer.convert_tokens_to_ids("<user>")
    assert codec.decode([user, codec.end_token_id, *codec.encode("a")]) == "<user>a"


def test_prompt() -> None:
    tokenizer = added()._tokenizer
    codec = TagCodec(tokenizer, TAGS, [tokenizer.eos_token_id], digest="own", question_template="Do: {question}!")
    # The chat template is <user>, the text, <assistant>. A {question} in the question itself stays.
    assert codec.decode(codec.prompt("a {question}")) == "<user>Do: a {question}!<assistant>"
    plain = merged()
    assert plain.prompt("ab") == plain._tokenizer("ab")["input_ids"]


def test_a_tokenizer_that_begins_texts_with_a_space() -> None:
    """A tokenizer like SentencePiece puts a space before a text. Inside a chain there must be none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = ["</s>", "▁", *"abcdefghijklmnopqrstuvwxyz</>-3\n"]
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    codec = TagCodec(wrap(backend, "</s>"), TAGS, [0], digest="sp")
    first, second = codec.encode("<thinking>a b</thinking>"), codec.encode("<answer>3</answer>")
    assert codec.decode([*first, *second]) == "<thinking>a b</thinking><answer>3</answer>"
    assert [(r.tag, r.stop) for r in codec.read("", [*first, *second], "stop")] == [
        ("thinking", len(first)),
        ("answer", len(first) + len(second)),
    ]


def broken(kind: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    if kind == "unknown":
        unknown = "<unk>"
        backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token=unknown))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        return wrap(backend, "</s>")
    alphabet = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = {"lower": normalizers.Lowercase(), "dropped": normalizers.Replace("<", "")}[kind]
    return wrap(backend, "</s>")


@pytest.mark.parametrize(
    ("kind", "tags", "named"),
    [
        ("unknown", ("thinking",), "thinking"),
        ("lower", ("thinking", "Answer"), "Answer"),
        ("dropped", ("thinking",), "thinking"),
    ],
)
def test_a_tag_that_the_tokenizer_changes_is_named(kind: str, tags: tuple[str, ...], named: str) -> None:
    tokenizer = broken(kind)
    with pytest.raises(
        ConfigError, match=rf"^search\.nodes: the tag {named} is changed by .* another tag.*model\.path"
    ):
        TagCodec(tokenizer, tags, [tokenizer.eos_token_id], digest="x")


def test_a_tag_that_is_an_end_token_is_refused() -> None:
    tokenizer = build_tokenizer(tag_strings(), 512)
    with pytest.raises(ConfigError, match="the tag eos is changed by"):
        TagCodec(tokenizer, ("thinking", "eos"), [tokenizer.eos_token_id], digest="x")
