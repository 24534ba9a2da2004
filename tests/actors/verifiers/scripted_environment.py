"""Environments that run the command in the last turn. They run only inside verifier processes."""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from rlsys.environments import Game, Reply
from rlsys.types import Problem


def obey(problem: Problem, turns: Sequence[str], *, greeting: str = "") -> Any:
    """Return a reply with the process id and number of turns, or fail as the last turn says."""
    command = turns[-1] if turns else "greet"
    match command:
        case "greet":
            return Reply(text=greeting)
        case "hang":
            time.sleep(60)
        case "raise":
            raise ValueError("no such room")
        case "exit":
            os._exit(3)
        case "fork":
            subprocess.Popen(["sleep", "60"])
        case "string":
            return "text"
        case "number":
            return Reply(text=4)  # type: ignore[arg-type]
        case "nan":
            return Reply(reward=math.nan)
        case "long":
            return Reply(text="é" * 200_000)
        case "longest":
            return Reply(text="\U0001f600" * 90_000)
        case "surrogate":
            return Reply(text="a\ud800b")
    return Reply(text=f"{problem.answer}:{len(turns)}", done=command == "end", reward=0.5, solved=command == "end")


class Counter(Game):
    """Adds up the numbers of the turns until the answer."""

    def __init__(self, problem: Problem, step: int = 1) -> None:
        super().__init__(problem)
        self.total, self.factor = 0, step

    def start(self) -> Reply:
        return Reply(text=f"reach {self.problem.answer}")

    def step(self, turn: str) -> Reply:
        self.total += self.factor * int(turn)
        solved = self.total == int(self.problem.answer)
        return Reply(text=str(self.total), done=solved, solved=solved, reward=float(solved))
