"""A game of several turns: guess a hidden number by hints. Problems, environment, verifier and demonstrations."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

from rlsys.config.tasks import GuessConfig
from rlsys.interfaces import Reply
from rlsys.tasks.generated import GeneratedTask, wrong
from rlsys.tasks.reasons import read_and_expected
from rlsys.types import Problem, Verdict

HELD_OUT_EVERY = 10
"""The hash of the question assigns one range in HELD_OUT_EVERY to the held-out split, for every seed."""

HIGHER, LOWER, RIGHT, NO_GUESS = (f"<hint>{word}</hint>" for word in ("higher", "lower", "right", "no guess"))
_GUESS = re.compile(r"<guess>([0-9]{1,9})</guess>")


class Range(NamedTuple):
    """The hidden number, and the smallest and the largest number that it may be."""

    number: int
    low: int
    high: int


def reply(problem: Problem, turns: Sequence[str]) -> Reply:
    """Return the hint for the guess in the last turn. The right guess ends the game."""
    if not turns:
        return Reply()
    guesses = _GUESS.findall(turns[-1])
    if not guesses:
        return Reply(text=NO_GUESS, done=True, detail="a turn without a guess")
    hint = hint_for(int(guesses[-1]), int(problem.answer))
    return Reply(text=hint, done=hint == RIGHT)


def hint_for(guess: int, number: int) -> str:
    """Return the text of the environment after a guess."""
    return RIGHT if guess == number else HIGHER if guess < number else LOWER


def guess_node(number: int) -> str:
    """Return a guess as the policy writes it."""
    return f"<guess>{number}</guess>"


class GuessTask(GeneratedTask[GuessConfig, Range]):
    """Guess a hidden number: `guess 17 to 48`.

    The sha256 of the question decides the split of a problem, so no range of one split is in the other.
    """

    one_answer = True
    noun = "range"

    def vocabulary(self) -> tuple[str, ...]:
        """Return the tags, hints, pieces of questions, and digits."""
        return ("<guess>", "</guess>", HIGHER, LOWER, RIGHT, NO_GUESS, "guess ", " to ", *"0123456789")

    def verify(self, problem: Problem, completion: str, finished: bool = True) -> Verdict:
        """Return the reward of the last guess if it is right: the fewer guesses, the more."""
        guesses = [int(guess) for guess in _GUESS.findall(completion)]
        if not guesses:
            return wrong("no guess", answered=False)
        if guesses[-1] != int(problem.answer):
            return wrong(f"the number was not guessed: {read_and_expected(str(guesses[-1]), problem.answer)}")
        reward = 1 - (len(guesses) - 1) / self.config.max_guesses
        if reward <= 0:
            return wrong(f"guess {len(guesses)} is later than task.max_guesses")
        return Verdict(outcome="ok", reward=reward, answered=True)

    def _read_problems(self) -> tuple[Problem, ...]:
        return ()

    def _draw(self, rng: random.Random) -> Range:
        width = rng.randint(self.config.min_width, self.config.max_width)
        smallest, end = _bounds(self.config.digits)
        low = rng.randint(smallest, end - width)
        return Range(rng.randint(low, low + width - 1), low, low + width - 1)

    def _problem(self, problem_id: str, instance: Range) -> Problem:
        question = f"guess {instance.low} to {instance.high}"
        return Problem(problem_id=problem_id, question=question, answer=str(instance.number))

    def _chain(self, instance: Range, rng: random.Random) -> tuple[str, ...]:
        """Return the game of a weak player.

        A guess is any number that the hints allow, or one that ignores them. The game ends with the right guess, or
        after task.max_guesses.
        """
        number, low, high = instance
        pieces: list[str] = []
        first, last, guess = low, high, None
        while guess != number and len(pieces) < 2 * self.config.max_guesses:
            ignores = rng.random() < self.config.error_rate
            guess = rng.randint(low, high) if ignores else rng.randint(first, last)
            pieces += [guess_node(guess), hint_for(guess, number)]
            first, last = (max(first, guess + 1), last) if guess < number else (first, min(last, guess - 1))
        return tuple(pieces)

    def _judge(self, problem_answer: str, text: str) -> Verdict:
        raise NotImplementedError("verify judges the guesses of a game, which has no <answer>")

    def identity(self, question: str) -> str:
        return question

    def _is_held_out(self, identity: str) -> bool:
        return hashlib.sha256(identity.encode()).digest()[0] % HELD_OUT_EVERY == 0

    def _advice(self) -> str:
        return (
            f"ranges of {self.config.min_width} to {self.config.max_width} numbers of {self.config.digits} digits; "
            "raise task.max_width or task.digits"
        )


def _bounds(digits: int) -> tuple[int, int]:
    """Return the smallest number with so many digits, and the first one after the largest."""
    return (0 if digits == 1 else 10 ** (digits - 1)), 10**digits
