"""Letter counting, the example of the paper's authors: generator, verifier and worked chains."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from string import ascii_lowercase
from typing import NamedTuple

from rlsys.config.tasks import LetterCountConfig
from rlsys.errors import DataError
from rlsys.tables.sources import expand
from rlsys.tasks import tags
from rlsys.tasks.generated import CORRECT, GeneratedTask, check_ids, wrong
from rlsys.tasks.letter_count import chains, words
from rlsys.tasks.letter_count.steps import CountSteps, count_steps
from rlsys.tasks.reasons import quoted, read_and_expected
from rlsys.types import Problem, Verdict

HELD_OUT_EVERY = 10
"""The hash of a word assigns one word in HELD_OUT_EVERY to the held-out split, for every seed."""


class Question(NamedTuple):
    """A question about the number of the letters `targets` in a word."""

    word: str
    targets: str
    text: str


class LetterCountTask(GeneratedTask[LetterCountConfig, Question]):
    """Counting of one letter (form simple) or two letters (form words) in a word.

    The sha256 of the word decides the split of a question, so the splits share no word. `questions_path` names a
    held-out file.
    """

    one_answer = True
    noun = "word"

    def vocabulary(self) -> tuple[str, ...]:
        """Return the tags, pieces of questions and chains, letters and digits."""
        phrases = words.question_words() if self.config.form == "words" else ()
        characters = sorted({character for problem in self._file_problems for character in str(problem.question)})
        letters = self.config.alphabet if self.config.form == "simple" else ascii_lowercase
        # A target letter follows a space and is one token with it, as in byte-pair tokenizers.
        # It is then easy to tell from the letters of the word.
        targets = (f" {letter}" for letter in letters)
        pieces = (
            *tags.tag_strings(), *chains.PIECES, " in ", *phrases, *targets, *letters, *"0123456789?", *characters,
        )  # fmt: skip
        return tuple(dict.fromkeys(pieces))

    def _read_problems(self) -> tuple[Problem, ...]:
        return load_questions(self.config.questions_path) if self.config.questions_path else ()

    def _draw(self, rng: random.Random) -> Question:
        length = rng.randint(self.config.min_length, self.config.max_length)
        if self.config.form == "words":
            word = words.made_up_word(length, rng)
            targets = words.pick_two_letters(word, rng)
            return Question(word, targets, words.ask(word, targets, rng))
        target = rng.choice(self.config.alphabet)
        density = rng.uniform(0.1, 0.5)
        word = "".join(target if rng.random() < density else rng.choice(self.config.alphabet) for _ in range(length))
        return Question(word, target, f"count {target} in {word}")

    def _problem(self, problem_id: str, instance: Question) -> Problem:
        answer = sum(instance.word.count(letter) for letter in instance.targets)
        return Problem(problem_id=problem_id, question=instance.text, answer=str(answer))

    def _chain(self, instance: Question, rng: random.Random) -> str:
        return chains.build_chain(
            instance.word,
            instance.targets,
            chunk=self.config.chunk,
            error_rate=self.config.error_rate,
            miscounts=self.config.miscounts,
            shares=self.config.shares,
            rng=rng,
        )

    def _judge(self, problem_answer: str, text: str) -> Verdict:
        if not re.fullmatch(r"[0-9]{1,9}", text):
            return wrong(f"not a number: {quoted(text)}", answered=False)
        right = int(text) == int(problem_answer)
        return CORRECT if right else wrong(read_and_expected(text, problem_answer))

    def _step_rules(self, question: str) -> CountSteps | None:
        return count_steps(question)

    def identity(self, question: str) -> str:
        """Return the last word of a question."""
        return (re.findall(r"[a-z]+", question.lower()) or [""])[-1]

    def _is_held_out(self, identity: str) -> bool:
        return is_held_out(identity)

    def _advice(self) -> str:
        return (
            f"alphabet {self.config.alphabet!r} with {self.config.min_length} to {self.config.max_length} "
            "letters; widen task.alphabet or task.max_length"
        )


def is_held_out(word: str) -> bool:
    """Return whether a word belongs to the held-out split."""
    return hashlib.sha256(word.encode()).digest()[0] % HELD_OUT_EVERY == 0


def load_questions(path: str) -> tuple[Problem, ...]:
    """Read a JSON list of {id, problem, solution}.

    Raises:
        ConfigError: An environment variable in the path is not set.
        DataError: The file is missing, not JSON, or empty; a row has another form; or two rows have the same id.
    """
    file = Path(expand(path, "task.questions_path"))
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"task.questions_path {file}: expected a readable JSON file: {error}") from None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"task.questions_path {file}: expected a list of questions, found {str(rows)[:40]}")
    questions = tuple(_question(row, number, file) for number, row in enumerate(rows))
    check_ids(questions, f"task.questions_path {file}: two questions have the id")
    return questions


def _question(row: object, number: int, file: Path) -> Problem:
    row = row if isinstance(row, dict) else {}
    text, count = row.get("problem"), row.get("solution")
    # `type(...) is int`, because isinstance accepts true as an int.
    if not isinstance(text, str) or type(count) is not int or count < 0:
        raise DataError(
            f"task.questions_path {file}: row {number}: expected {{id, problem: text, solution: integer}}, "
            f"found problem {str(text)[:40]!r}, solution {count!r}"
        )
    return Problem(problem_id=str(row.get("id", number)), question=text, answer=str(count))
