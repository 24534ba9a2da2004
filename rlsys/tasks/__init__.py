"""Tasks: prompts, verifiers and demonstrations. They import neither ray nor torch."""

from __future__ import annotations

from rlsys.config.tasks import TaskConfig
from rlsys.interfaces import Task


def build_task(config: TaskConfig, seed: int) -> Task:
    """Build the task of a config section. Only the module of this task is imported.

    Args:
        config: The `task` section.
        seed: run.seed. The same config and seed give the same problems in every process.
    """
    if config.type == "letter_count":
        from rlsys.tasks.letter_count.task import LetterCountTask

        return LetterCountTask(config, seed)
    if config.type == "blocksworld":
        from rlsys.tasks.blocksworld.task import BlocksworldTask

        return BlocksworldTask(config, seed)
    if config.type == "countdown":
        from rlsys.tasks.countdown.task import CountdownTask

        return CountdownTask(config, seed)
    if config.type == "sums":
        from rlsys.tasks.sums.task import SumsTask

        return SumsTask(config, seed)
    if config.type == "guess":
        from rlsys.tasks.guess import GuessTask

        return GuessTask(config, seed)
    from rlsys.tasks.dataset import DatasetTask

    return DatasetTask(config, seed)
