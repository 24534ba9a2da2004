r"""Extraction: where the answer of a completion stands.

Reasoning that ends with `</think>` is left out. The first of these places in the rest of a completion counts:

1. the last complete `<answer>` tag; text may follow it;
2. the last `\boxed{}`; boxes with only "and", "or" and punctuation between them are one list;
3. the rest of the line after the last lead-in, such as "The answer is", "Final answer:" or "####", or the next line;
4. the whole completion, if it is an answer alone.

A number or formula beside other words is no answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlsys.tasks.answers.normalise import peel

# Enough for the last page of a proof.
MAX_COMPLETION_CHARS = 8192
# A whole completion that is longer is not an answer alone.
MAX_ALONE_CHARS = 300

_END_OF_REASONING = re.compile(r"</think(?:ing)?>|\[/THINK\]")
_END_TOKEN = re.compile(r"(?:<\|[\w ]{1,30}\|>|</s>|<eos>|<end_of_turn>){1,9}\Z")
_TAG = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL | re.IGNORECASE)
# A box without braces, such as \boxed 18.
_BARE_BOX = re.compile(r"(\\(?:boxed|fbox))\s+(-?\d+(?:\.\d+)?|[A-Za-z])(?=\s*(?:\Z|\n|[$.,;)]|\\[)\]]))")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
_BETWEEN_BOXES = re.compile(
    r"(?:\s|\$|\\[()\[\],;:! ]|[,;.*]|\\(?:quad|qquad)|\\text\s*\{\s*(?:,?\s*(?:and|or)\s*)\}|\band\b|\bor\b)*"
)
# Spaces are bounded: a long run of them must not cost quadratic time.
_SPACES = r"[^\S\n]{0,4}"
_SUBJECT = r"(?:(?:the|my|our) )?(?:(?:final|correct|right|complete) ){0,3}(?:answers?|result)(?: to [^.:\n]{1,80})?"
_LEAD_IN = re.compile(
    rf"(?im)(?:\b{_SUBJECT}{_SPACES}(?:\*\*|__)?{_SPACES}(?:(?:is|are)\b{_SPACES}:?|[:=])|####"
    rf"|^[^\S\n]{{0,4}}[#*_]{{0,6}}{_SPACES}(?:the )?final answer[ *_:]{{0,6}}$){_SPACES}"
)
_WORDS_AROUND = re.compile(
    r"(?i)(?:(?!\b(?:not|never|or|wrong|incorrect|false|except|unless|maybe|perhaps)\b|n't\b)[^\d\\+=<>])*"
)
_CONNECTIVE = r"(?:[Ss]o|[Tt]hus|[Hh]ence|[Tt]herefore),?\s+(?=\$?[a-zA-Z]\w?\s*=)"


@dataclass(frozen=True, slots=True)
class Extracted:
    """The text of an answer, and whether it is the whole completion."""

    text: str
    alone: bool = False


def find_answer(completion: str) -> Extracted | None:
    """Return the answer of a completion, or None if it has none."""
    completion = _END_OF_REASONING.split(completion[-MAX_COMPLETION_CHARS:])[-1]
    completion = _BARE_BOX.sub(r"\1{\2}", _END_TOKEN.sub("", completion.rstrip()))
    tags = _TAG.findall(completion)
    if tags:
        return Extracted(_inside_tag(tags[-1].strip()))
    boxed = _last_boxes(completion)
    if boxed is not None:
        return Extracted(boxed[0])
    led = _led_in(completion)
    if led is not None:
        return Extracted(led)
    text = re.sub(rf"\A{_CONNECTIVE}", "", completion.strip())
    return Extracted(text, alone=True) if 0 < len(text) <= MAX_ALONE_CHARS else None


def _inside_tag(text: str) -> str:
    """Return the answer inside a tag.

    It is a box among words without numbers, the text after a lead-in, or the whole text.
    """
    boxed = _last_boxes(text)
    if boxed is not None:
        answer, start, end = boxed
        return answer if _WORDS_AROUND.fullmatch(text[:start] + text[end:]) else text
    marked = peel(text).lstrip("*_# ")
    match = _LEAD_IN.match(marked)
    rest = _balanced(marked[match.end() :]) if match else ""
    return rest or text


def _last_boxes(text: str) -> tuple[str, int, int] | None:
    """Return the content of the last box, joined with the boxes right before it, and its place."""
    boxes: list[tuple[int, int, str]] = []
    for match in _BOX.finditer(text):
        if boxes and match.start() < boxes[-1][1]:  # inside a box
            continue
        end = _closing_brace(text, match.end())
        if end is None:  # an open box
            break
        boxes.append((match.start(), end, text[match.end() + 1 : end - 1]))
    if not boxes:
        return None
    first = len(boxes) - 1
    while first and _BETWEEN_BOXES.fullmatch(text[boxes[first - 1][1] : boxes[first][0]]):
        first -= 1
    contents = list(dict.fromkeys(_unboxed(content.strip()) for _, _, content in boxes[first:]))
    return ", ".join(contents), boxes[first][0], boxes[-1][1]


def _unboxed(content: str) -> str:
    """Return the content of up to three boxes around it."""
    for _ in range(3):
        match = _BOX.match(content)
        if match is None or _closing_brace(content, match.end()) != len(content):
            break
        content = content[match.end() + 1 : -1].strip()
    return content


def _closing_brace(text: str, start: int) -> int | None:
    """Return the position after the brace that closes the one at `start`, or None."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return match.end()
    return None


def _led_in(text: str) -> str | None:
    """Return the text after the last lead-in, up to the end of its sentence or line."""
    match = None
    for match in _LEAD_IN.finditer(text):  # noqa: B007 - the last one counts
        pass
    if match is None:
        return None
    rest = _balanced(text[match.end() :].split("\n")[0])
    if not rest:
        following = text[match.end() :].strip()
        rest = following.split("\n")[0]
        if following.startswith((r"\[", "$$", "```")):
            rest = following.split("\n\n")[0]
        rest = _balanced(rest)
    return _balanced(re.split(r"(?<=[\w)}\]$*°%])[.!]\s+(?=[A-Z])", rest)[0])


def _balanced(text: str) -> str:
    """Return a text without a bold mark that has no partner: the lead-in may stand inside the bold text."""
    text = text.strip()
    for mark in ("**", "__", "*"):
        if text.count(mark) % 2:
            text = text.removeprefix(mark).strip() if text.startswith(mark) else text.removesuffix(mark).strip()
    return text
