"""Detectors of formalistic thinking, on texts written by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlsys.evaluation.detectors import longest_loop, reflections, repeated_ngrams, signs, words
from rlsys.evaluation.records import Sample

SAMPLE = Sample(
    text="",
    tokens=9,
    right=False,
    reward=0.0,
    judged=True,
    answered=True,
    truncated=False,
    out_of_turns=False,
    reason="",
    logprob=-1.0,
)  # fmt: skip
PROSE = (
    "The train leaves at nine and needs two hours, so it arrives at eleven. The bus leaves half an hour later but "
    "needs only one hour, so it arrives at half past ten. The bus is therefore first. The answer is: the bus."
)


def test_words_are_words_numbers_and_signs() -> None:
    assert words("Say 12.5, a_b!") == ["Say", "12", ".", "5", ",", "a", "_", "b", "!"]
    assert words("我认为3") == ["我", "认", "为", "3"]
    assert words("--- !!!!!") == ["---", "!!!!", "!"]
    assert words("a" * 18 + "b1") == ["a", "a", "a", "a" * 15 + "b", "1"]


LOOPS = {
    "sentence": ("So far so good: " + "I should check it again. " * 4, "I should check it again. " * 4),
    # 11 words and signs, three times 33 of them: as long as a loop, but not four times.
    "three times": ("I should check it again, because I may err. " * 3, ""),
    # Four times, but only 20 words.
    "short": ("Is it so? " * 4 + "Then " + "1 + 1 + " * 2, ""),
    "lines": ("a1b1\n" * 12 + "end", ("a1b1\n" * 12).strip()),
    "word": ("no " * 24, ("no " * 24).strip()),
    "word too few": ("no " * 23, ""),
    "inside": ("First. " + "wait, " * 20 + "the answer is 4", ("wait, " * 20).rstrip()),
    "no spaces": ("答案是三。" * 6, "答案是三。" * 6),
    # The last 16 letters are a word of their own.
    "one long word": ("h" + "a" * 400, "a" * 384),
    "prose": (PROSE, ""),
    "ruler": ("a\n" + "-" * 80 + "\nb", ""),
    "table": ("| a | b | c | d |\n" + "| --- " * 4 + "|\n| 1 | 2 | 3 | 4 |", ""),
    "signs": ("so!" + "!" * 199, "!" * 200),
    "counting": (
        "<thinking>a1b1a2</thinking><thinking>c2a3d3</thinking><thinking>a4a5</thinking><answer>5</answer>",
        "",
    ),
    "empty": ("", ""),
}


@pytest.mark.parametrize(("text", "loop"), LOOPS.values(), ids=LOOPS)
def test_the_longest_loop(text: str, loop: str) -> None:
    if loop == "a" * 384:  # the first 16 letters are haaa..., then come 24 equal words and 1 letter
        assert longest_loop(text) == "a" * (16 * 24)
    else:
        assert longest_loop(text).split() == loop.split()


def test_repeated_ngrams_by_hand() -> None:
    # 12 words a b c d repeated have 12 - 2 + 1 = 11 pairs, of which 4 are distinct: ab, bc, cd, da.
    assert repeated_ngrams("a b c d " * 3, 2) == pytest.approx(1 - 4 / 11)
    assert repeated_ngrams("a b c", 8) == 0
    assert repeated_ngrams(PROSE) == 0
    # The same three lines in changing order: no loop, and yet little that is new.
    lines = [
        "I will now add the two numbers again.",
        "That does not look right at all.",
        "Let us go back to the start.",
    ]
    order = (0, 1, 2, 1, 0, 2, 0, 2, 1, 2, 0, 1, 0, 1, 2, 0)
    mixed = " ".join(lines[number] for number in order)
    assert longest_loop(mixed) == "" and signs(replace(SAMPLE, text=mixed)).repetition


REFLECTED = {
    "none": ("7 apples and 5 pears are 12 fruits. The answer is 12.", (0, 0)),
    "changes": ("So it is 7. Wait! something is wrong. It is 8.", (1, 0)),
    "confirms": ("So it is 7. Wait, let me check again: it is 7.", (1, 1)),
    "states nothing": ("So it is 7. Hmm, that looks strange. Is it? Perhaps.", (2, 2)),
    "every sentence": ("It is 4. Wait, perhaps 5. Alternatively 4. Maybe 4. Maybe 6.", (4, 1)),
    "nodes": (
        "<thinking>a1b2</thinking><reflection>2 is wrong, wait</reflection><thinking>b1</thinking>"
        "<double-check>perhaps 1</double-check><answer>1</answer>",
        (2, 1),
    ),
    "open node": ("<thinking>a1</thinking><reflection>maybe 1 maybe 1", (1, 1)),
    "boxed": (r"\boxed{3} for n = 4. Wait, n = 5 gives \boxed{3} too.", (1, 1)),
    "other words": ("The waiter said it may be 7. I await the letter.", (0, 0)),
}


@pytest.mark.parametrize(("text", "counts"), REFLECTED.values(), ids=REFLECTED)
def test_reflections_and_idle_ones(text: str, counts: tuple[int, int]) -> None:
    assert reflections(text) == counts


def test_three_idle_reflections_are_too_many() -> None:
    thrice = "It is 4. Wait, is it? Hmm, it is 4. Maybe it is 4. The answer is 4."
    assert reflections(thrice) == (3, 3)
    assert signs(replace(SAMPLE, text=thrice)).over_reflection
    assert not signs(replace(SAMPLE, text=thrice.replace("Maybe it is 4", "It is"))).over_reflection
    # Three that change the answer are thought, unless no answer comes of them.
    changing = "It is 4. Wait, 5. Hmm, 6. Maybe 7."
    assert reflections(changing) == (3, 0)
    assert not signs(replace(SAMPLE, text=changing)).over_reflection
    assert signs(replace(SAMPLE, text=changing, answered=False, truncated=True)).over_reflection


@pytest.mark.parametrize(
    ("changes", "ignored"),
    [
        ({}, False),
        ({"answered": False}, True),
        ({"answered": False, "truncated": True}, False),  # it had no room for the answer
        ({"answered": False, "out_of_turns": True}, False),  # it had no turn left for the answer
        ({"answered": False, "judged": False}, False),  # the verifier failed, not the model
    ],
)
def test_an_instruction_is_ignored_if_a_finished_completion_has_no_answer(
    changes: dict[str, bool], ignored: bool
) -> None:
    assert signs(replace(SAMPLE, text="12", **changes)).ignored_instruction is ignored
