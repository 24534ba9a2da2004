"""Prompts, verifiers and demonstrations; one file per task. No ray, no torch."""

from __future__ import annotations

from rlsys.config.tasks import TaskConfig
from rlsys.interfaces import Task


def build_task(config: TaskConfig, seed: int) -> Task:
    """Build the task of a config section. The module of a task is imported only when it is used.

    Args:
        config: the `task` section.
        seed: run.seed; the same config and seed give the same problems in every process.
    """
    if config.type == "letter_count":
        from rlsys.tasks.letter_count.task import LetterCountTask

        return LetterCountTask(config, seed)
    if config.type == "blocksworld":
        from rlsys.tasks.blocksworld.task import BlocksworldTask

        return BlocksworldTask(config, seed)
    from rlsys.tasks.dataset import DatasetTask

    return DatasetTask(config, seed)
