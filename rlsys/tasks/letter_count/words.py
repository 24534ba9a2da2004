"""Made-up words and questions about them, without a word list."""

from __future__ import annotations

import random
from string import ascii_lowercase

# The seven phrasings of the authors' questions: text before the first letter, between the second letter and the word,
# and after the word. Source: Marco-o1 v2, arXiv:2503.01461, published letter counting set.
PHRASINGS = (
    ("Add up the counts of", " in ", "."),
    ("Calculate the total occurrences of", " together in ", "."),
    ("Find out the total number of", " in ", "."),
    ("How many", " are there in total in ", "?"),
    ("What is the combined count of", " in ", "?"),
    ("What is the combined total of", " present in ", "?"),
    ("What is the sum of the counts of", " in ", "?"),
)

_ONSETS = (
    *"bcdfghjklmnprstvwxyz", "bl", "br", "ch", "cl", "cr", "dr", "fl", "gr", "ph", "pl", "pr", "qu", "sc",
    "sh", "sp", "st", "str", "th", "tr", "",
)  # fmt: skip
_VOWELS = (*"aaaeeeiiiooouuy", "ai", "ea", "ee", "ie", "io", "oo", "ou", "iu")
_CODAS = (*"bcdgklmnprst", "", "", "", "", "", "", "ck", "ll", "mp", "nd", "ng", "nt", "rt", "ss", "st", "tt")


def question_words() -> tuple[str, ...]:
    """Return the pieces of the seven phrasings. Each is one token of a from-scratch tokenizer."""
    return tuple(dict.fromkeys(piece for phrasing in PHRASINGS for piece in phrasing))


def ask(word: str, targets: str, rng: random.Random) -> str:
    """Return one of the seven questions about the two letters `targets` in `word`."""
    head, middle, end = rng.choice(PHRASINGS)
    return f"{head} {targets[0]} and {targets[1]}{middle}{word}{end}"


def made_up_word(length: int, rng: random.Random) -> str:
    """Return a word of `length` letters: pronounceable, random, or with many repeats of few letters."""
    kind = rng.random()
    if kind < 0.4:
        return _pronounceable(length, rng)
    if kind < 0.7:
        return "".join(rng.choices(ascii_lowercase, k=length))
    letters = rng.sample(ascii_lowercase, k=rng.randint(3, max(3, length - 1)))
    return "".join(rng.choices(letters, k=length))


def _pronounceable(length: int, rng: random.Random) -> str:
    word = ""
    while len(word) < length:
        word += rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
    start = rng.randint(0, len(word) - length)
    return word[start : start + length]


def pick_two_letters(word: str, rng: random.Random) -> str:
    """Return two different letters to count, mostly letters of the word, so that answers from 2 to 4 are common."""
    kind = rng.random()
    present = sorted(set(word))
    if len(present) < 2 or kind < 0.1:
        first, second = rng.sample(ascii_lowercase, 2)
    elif kind < 0.6:
        first, second = rng.sample(present, 2)
    else:
        # The probability of a letter is proportional to its count, so repeated letters are common targets.
        first = rng.choice(word)
        second = rng.choice([letter for letter in word if letter != first])
    return first + second
