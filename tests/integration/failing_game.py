"""A game of the user whose every twentieth position raises, so that failed turns are a part of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GAME = """
from rlsys.environments import Game, Reply
from rlsys.tasks.guess import reply


class Guess(Game):
    def __init__(self, problem, bonus):
        super().__init__(problem)
        self.turns, self.bonus = [], bonus

    def step(self, turn):
        self.turns.append(turn)
        position = len("".join(self.turns)) + int(self.problem.answer)
        if position % 20 == 0:
            raise RuntimeError(f"position {position}")
        hint = reply(self.problem, self.turns)
        return Reply(text=hint.text, done=hint.done, solved=hint.done and "right" in hint.text, reward=self.bonus)
"""
TASK: dict[str, Any] = {"type": "guess", "digits": 1, "min_width": 4, "max_width": 8}


def game_section(folder: Path, max_turns: int) -> dict[str, Any]:
    """Write the game into a folder, and return the section `environment` of a config with it."""
    (folder / "game.py").write_text(GAME)
    return {
        "fn": f"{folder / 'game.py'}:Guess",
        "arguments": {"bonus": -0.1},
        "stop": ["</guess>"],
        "max_turns": max_turns,
    }
