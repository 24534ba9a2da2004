"""Tasks: prompts, verifiers and demonstrations. They import neither ray nor torch."""

from __future__ import annotations

from rlsys.config.tasks import TaskConfig
from rlsys.interfaces import Task
from rlsys.plugins import command_folder


def build_task(config: TaskConfig, seed: int, folder: str | None = None) -> Task:
    """Build the task of a config section. Only the module of this task is imported.

    Args:
        config: The `task` section.
        seed: run.seed. The same config and seed give the same problems in every process.
        folder: Folder in which the command was started, where plug-ins are looked up. None: that of this command.
    """
    match config.type:
        case "letter_count":
            from rlsys.tasks.letter_count.task import LetterCountTask

            return LetterCountTask(config, seed)
        case "blocksworld":
            from rlsys.tasks.blocksworld.task import BlocksworldTask

            return BlocksworldTask(config, seed)
        case "countdown":
            from rlsys.tasks.countdown.task import CountdownTask

            return CountdownTask(config, seed)
        case "sums":
            from rlsys.tasks.sums.task import SumsTask

            return SumsTask(config, seed)
        case "guess":
            from rlsys.tasks.guess import GuessTask

            return GuessTask(config, seed)
        case "benchmark":
            from rlsys.tasks.benchmarks import build_benchmark

            return build_benchmark(config, seed)
        case "reasoning_gym":
            from rlsys.tasks.reasoning_gym import ReasoningGymTask

            return ReasoningGymTask(config, seed)
        case "custom":
            from rlsys.tasks.custom import CustomTask

            return CustomTask(config, seed, folder or command_folder())
        case "dataset":
            from rlsys.tasks.dataset import DatasetTask

            return DatasetTask(config, seed)
