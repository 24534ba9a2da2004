"""IFEval: prompts with instructions that a program can check.

Source: Zhou et al., Instruction-Following Evaluation for Large Language Models, arXiv:2311.07911.
"""

from __future__ import annotations

from functools import cached_property

from rlsys.config.outside_tasks import BenchmarkConfig
from rlsys.tasks.benchmarks import BenchmarkTask
from rlsys.tasks.dataset import Data
from rlsys.tasks.instructions import instructions, missed_note
from rlsys.types import Problem, Verdict


class IfevalTask(BenchmarkTask):
    """Task whose reward is the share of the instructions that a completion follows. It is right if it follows all."""

    one_answer = False

    def __init__(self, config: BenchmarkConfig, seed: int) -> None:
        super().__init__(config, seed)
        # At the start, so that no verification has to wait for the imports.
        self._instructions = instructions("ifeval")

    def notes(self) -> tuple[str, ...]:
        return self._data.notes

    def verify(self, problem: Problem, completion: str, finished: bool = True) -> Verdict:
        """Return the share of instructions that are followed, by the strict rules."""
        if not finished and not self.config.accept_cut_off:
            return Verdict(outcome="wrong", reward=0.0, answered=False, detail="no answer: the completion was cut off")
        row = problem.metadata
        names = row["instruction_id_list"]
        followed = self._instructions.followed(completion, names, row["kwargs"], row["prompt"])
        if not followed:
            return Verdict(outcome="wrong", reward=0.0, answered=False, detail="no answer: it is empty")
        return Verdict(
            outcome="ok" if all(followed) else "wrong",
            reward=sum(followed) / len(followed),
            answered=True,
            detail=missed_note(names, followed),
        )

    @cached_property
    def _data(self) -> Data:
        data, names = super()._data, set[str]()
        for example in data.train + data.held_out:
            row = example.columns
            self._instructions.check_row(f"row {example.number}", row.get("instruction_id_list"), row.get("kwargs"))
            names.update(row["instruction_id_list"])
        self._instructions.check_data(names)
        return data
