"""Letter counting, the paper authors' own example: a generator, its verifier and worked chains."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase

from rlsys.config.tasks import LetterCountConfig
from rlsys.errors import ConfigError, DataError
from rlsys.tasks import tags
from rlsys.tasks.generated import hashed_random
from rlsys.tasks.letter_count import chains, words
from rlsys.types import Problem, Split, Verdict

# One word in HELD_OUT_EVERY belongs to the held-out split, by its hash, whatever the seed.
HELD_OUT_EVERY = 10
_MAX_DRAWS = 10_000


class LetterCountTask:
    """How often one letter (form simple) or two letters (form words) occur in a word.

    A word belongs to the held-out split if its sha256 falls into a fixed bucket, so the two splits
    share no word for any seeds and indices. With `questions_path` the held-out split is that file,
    and its words are excluded from the train split.
    """

    one_answer = True

    def __init__(self, config: LetterCountConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.questions = load_questions(config.questions_path) if config.questions_path else ()
        self.excluded = frozenset(_last_word(question.question) for question in self.questions)

    def size(self, split: Split) -> int | None:
        """Number of questions of a held-out file; None for the generators."""
        return len(self.questions) if split == "held_out" and self.questions else None

    def problem(self, split: Split, index: int) -> Problem:
        """The index-th problem of a split."""
        if split == "held_out" and self.questions:
            return self.questions[index]
        return self._generate(split, index)[0]

    def demonstration(self, index: int, rng: random.Random) -> tuple[Problem, str]:
        """The index-th train problem and a chain for it; `rng` decides tags and errors."""
        problem, word, targets = self._generate("train", index)
        chain = chains.build_chain(
            word,
            targets,
            chunk=self.config.chunk,
            error_rate=self.config.error_rate,
            shares=self.config.shares,
            rng=rng,
        )
        return problem, chain

    def verify(self, problem_answer: str, completion: str) -> Verdict:
        """Reward 1 where the one final <answer> is the right integer, else 0."""
        text = tags.final_answer(completion)
        if text is None:
            return Verdict(outcome="wrong", reward=0.0, answered=False, detail="no final <answer>")
        if not re.fullmatch(r"[0-9]{1,9}", text):
            return Verdict(outcome="wrong", reward=0.0, answered=False, detail=f"not a number: {text[:40]!r}")
        if int(text) != int(problem_answer):
            return Verdict(outcome="wrong", reward=0.0, answered=True)
        return Verdict(outcome="ok", reward=1.0, answered=True)

    def digest(self) -> str:
        """sha256 of the held-out questions that were read, "" where all are generated."""
        rows = [[question.problem_id, question.question, question.answer] for question in self.questions]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest() if rows else ""

    def notes(self) -> tuple[str, ...]:
        return ()

    def vocabulary(self) -> tuple[str, ...]:
        """Tags, pieces of questions and chains, letters and digits."""
        asked = words.question_words() if self.config.form == "words" else ()
        characters = sorted({character for question in self.questions for character in question.question})
        letters = self.config.alphabet if self.config.form == "simple" else ascii_lowercase
        # A letter that is asked for follows a space and is one token with it, as in byte-pair tokenizers:
        # the letter to look for and the letters of the word are then easy to tell apart.
        named = (f" {letter}" for letter in letters)
        pieces = (*tags.tag_strings(), *chains.PIECES, " in ", *asked, *named, *letters, *"0123456789?", *characters)
        return tuple(dict.fromkeys(pieces))

    def _generate(self, split: Split, index: int) -> tuple[Problem, str, str]:
        """Problem, word and letters to count, by rejection of words of the other split."""
        rng = hashed_random(self.seed, split, index)
        draw = self._draw_simple if self.config.form == "simple" else self._draw_words
        for _ in range(_MAX_DRAWS):
            word, targets, question = draw(rng)
            if is_held_out(word) == (split == "held_out") and word not in self.excluded:
                answer = sum(word.count(letter) for letter in targets)
                problem = Problem(problem_id=f"{split}-{index}", question=question, answer=str(answer))
                return problem, word, targets
        raise ConfigError(
            f"task: no {split} word among {_MAX_DRAWS} drawn; expected many possible words, found "
            f"alphabet {self.config.alphabet!r} with {self.config.min_length} to {self.config.max_length} "
            "letters; widen task.alphabet or task.max_length"
        )

    def _draw_simple(self, rng: random.Random) -> tuple[str, str, str]:
        length = rng.randint(self.config.min_length, self.config.max_length)
        target = rng.choice(self.config.alphabet)
        density = rng.uniform(0.1, 0.5)
        word = "".join(target if rng.random() < density else rng.choice(self.config.alphabet) for _ in range(length))
        return word, target, f"count {target} in {word}"

    def _draw_words(self, rng: random.Random) -> tuple[str, str, str]:
        length = rng.randint(self.config.min_length, self.config.max_length)
        word = words.made_up_word(length, rng)
        targets = words.pick_two_letters(word, rng)
        return word, targets, words.ask(word, targets, rng)


def is_held_out(word: str) -> bool:
    """Whether a word belongs to the held-out split."""
    return hashlib.sha256(word.encode()).digest()[0] % HELD_OUT_EVERY == 0


def _last_word(question: str) -> str:
    found = re.findall(r"[a-z]+", question.lower())
    return found[-1] if found else ""


def load_questions(path: str) -> tuple[Problem, ...]:
    """Read a JSON list of {id, problem, solution}; `${NAME}` in the path is an environment variable.

    Raises:
        ConfigError: a variable of the path is not set.
        DataError: the file is missing, not JSON, empty, a row has another form, or an id occurs twice.
    """
    file = Path(re.sub(r"\$\{(\w+)\}", _variable(path), path))
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"task.questions_path {file}: expected a readable JSON file: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"task.questions_path {file}: expected a list of questions, found {str(rows)[:40]}")
    questions = tuple(_question(row, number, file) for number, row in enumerate(rows))
    [(name, times)] = Counter(question.problem_id for question in questions).most_common(1)
    if times > 1:  # seeds of completions are hashed from the id
        raise DataError(f"task.questions_path {file}: two questions have the id {name!r}; expected one each")
    return questions


def _variable(path: str) -> Callable[[re.Match[str]], str]:
    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise ConfigError(
                f"task.questions_path {path}: environment variable {name} is not set; "
                f"set it to the folder of the file or give the path itself"
            )
        return os.environ[name]

    return value


def _question(row: object, number: int, file: Path) -> Problem:
    row = row if isinstance(row, dict) else {}
    text, count = row.get("problem"), row.get("solution")
    # `type(...) is int`, because true is an int for isinstance.
    if not isinstance(text, str) or type(count) is not int or count < 0:
        raise DataError(
            f"task.questions_path {file}: row {number}: expected {{id, problem: text, solution: integer}}, "
            f"found problem {str(text)[:40]!r}, solution {count!r}"
        )
    return Problem(problem_id=str(row.get("id", number)), question=text, answer=str(count))
