"""The pages of the documentation, as blocks and commands.

The language of a block says what it is: `sh` has commands, `output` the end of what the command before it prints,
`text` neither. All other blocks are files, or parts of files. The name of a file is in its first line, or, where its
language has no comments, behind the language.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    name.relative_to(ROOT).as_posix()
    for name in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
]

_FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_NAME = re.compile(r'(?:"""|# )([\w.]+\.(?:py|yaml))')
_COMMENT = re.compile(r"(^|\s)#\s.*$", re.MULTILINE)
_NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?")
MEASURED = re.compile(
    r"\d[\d,.]*(?= (?:s|ms|min|h|KiB|MiB|GiB|steps/min|tokens/s)\b)"  # times, sizes, rates
    r"|(?<=:)\d+(?=/)|(?<=process )\d+"  # a port, the number of a process
    r"|(?<=<= )\d+|(?<= of )\d+(?= right$)|\d+(?= of [\d,]+ completions)"  # lengths and counts of what was sampled
)
NOISE = 0.03
"""A decimal up to this one counts as 0: its sign may change."""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: its first line in the page, from 1.
        name: name of the file that it shows, or None if it shows a part of one.
    """

    page: str
    line: int
    language: str
    text: str
    name: str | None

    def commands(self) -> list[str]:
        """Return the commands of an `sh` block without comments, each in one line with single spaces outside quotes."""
        lines = _COMMENT.sub("", self.text).replace("\\\n", " ").splitlines()
        return [re.sub(r"\s+", " ", line).strip() for line in lines if line.strip()]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_page(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[Block]:
    """Return the blocks of a page, or those of some languages."""
    page_text = read_page(page)
    every = []
    for match in _FENCE.finditer(page_text):
        language, _, name = match[2].partition(" ")
        text = re.sub(f"(?m)^{match[1]}", "", match[3])
        if language in ("python", "yaml") and (first_line := _NAME.match(text)):
            name = first_line[1]
        every.append(Block(page, page_text.count("\n", 0, match.start()) + 1, language, text, name or None))
    return [block for block in every if not languages or block.language in languages]


def all_blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page, *languages)]


def write_files(page: str, folder: Path) -> None:
    """Write every file that a page shows under its name."""
    for block in blocks(page):
        if block.name:
            (folder / block.name).write_text(block.text)


def spans(text: str) -> list[str]:
    """Return the code in the sentences and tables of a text."""
    return re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))


def unprinted_lines(documented: str, printed: str, *, counts: bool = True) -> list[str]:
    """Return the lines of a page that a command did not print.

    White space does not count, and a line of three dots stands for any lines. All words must be the same, and all
    signs that are written. Of the numbers,

    - whole numbers must be the same, such as those of problems, samples, steps and weight versions, which the config
      decides. Without `counts` they may differ, for a command that is run with smaller settings;
    - decimals up to 1, such as shares, may differ by 0.1, and larger ones by half. What is clearly above or below 0
      must stay so;
    - what another machine or processor changes is not compared: `MEASURED` lists it by the words beside it.
    """
    rest = [(_words(line), _NUMBER.findall(line)) for line in printed.splitlines()]
    missing = []
    for line in filter(str.strip, documented.splitlines()):
        words, numbers = _words(line), _compared(line)
        if line.strip() != "..." and not any(words == w and _agree(numbers, n, counts) for w, n in rest):
            missing.append(line)
    return missing


def _words(line: str) -> str:
    return " ".join(_NUMBER.sub("\0", line).split())


def _compared(line: str) -> list[str | None]:
    """Return the numbers of a line, with None for those that are not compared."""
    free = {place for match in MEASURED.finditer(line) for place in range(*match.span())}
    return [None if match.start() in free else match.group() for match in _NUMBER.finditer(line)]


def _agree(documented: list[str | None], printed: list[str], counts: bool) -> bool:
    pairs = zip(documented, printed, strict=True)
    return all(number is None or _is_close(number, other, counts) for number, other in pairs)


def _is_close(documented: str, printed: str, counts: bool) -> bool:
    kinds = [("." in text, text[0] in "+-") for text in (documented, printed)]
    number, other = (float(text.replace(",", "")) for text in (documented, printed))
    if kinds[0] != kinds[1]:
        return False
    if "." not in documented:
        return number == other or not counts
    if abs(number) > NOISE and number * other < 0:
        return False
    return abs(other - number) <= (0.1 if abs(number) <= 1 else abs(number) / 2)
