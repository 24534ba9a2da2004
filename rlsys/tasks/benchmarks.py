"""Benchmarks by name: the data sets, columns and prompts that published results use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from rlsys.config.outside_tasks import BenchmarkConfig, BenchmarkName
from rlsys.config.tasks import DatasetConfig
from rlsys.errors import DataError
from rlsys.tables.sources import Source, read_source
from rlsys.tasks.dataset import Data, DatasetTask, load_held_out, load_splits

BOXED = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A data set of held-out problems.

    Attributes:
        path: id on the Hugging Face hub.
        split: split with the held-out problems.
        answer: column of the reference answer; None if instructions are checked.
        train_split: split with training problems, if there is one.
    """

    path: str
    split: str = "test"
    subset: str | None = None
    question: str = "problem"
    answer: str | None = "answer"
    pattern: str | None = None
    template: str = BOXED
    train_split: str | None = None


BENCHMARKS: dict[BenchmarkName, Benchmark] = {
    "gsm8k": Benchmark(
        path="openai/gsm8k", subset="main", question="question", pattern=r"#### (.+)", train_split="train"
    ),
    "math500": Benchmark(path="HuggingFaceH4/MATH-500"),
    "aime24": Benchmark(path="HuggingFaceH4/aime_2024", split="train"),
    "aime25": Benchmark(path="math-ai/aime25"),
    "amc": Benchmark(path="math-ai/amc23", question="question"),
    "olympiad": Benchmark(
        path="Hothan/OlympiadBench",
        subset="OE_TO_maths_en_COMP",
        split="train",
        question="question",
        answer="final_answer",
    ),
    "minerva": Benchmark(path="math-ai/minervamath", question="question"),
    "ifeval": Benchmark(path="google/IFEval", split="train", question="prompt", answer=None, template="{question}"),
    "multi_if": Benchmark(
        path="facebook/Multi-IF", split="train", question="turn_1_prompt", answer=None, template="{question}"
    ),
}


class BenchmarkTask(DatasetTask):
    """Task with the problems of a benchmark, which the judge of the task `dataset` verifies."""

    fields = ("task.train_path", "task.path")

    def __init__(self, config: BenchmarkConfig, seed: int) -> None:
        super().__init__(dataset_config(config), seed)
        self.name = config.name

    def _read(self, path: str, split: str, field: str, subset: str | None) -> Source:
        """Return the rows of the data set, with the columns of `Benchmark`."""
        return read_source(path, split, field, subset)

    @cached_property
    def _data(self) -> Data:
        known = BENCHMARKS[self.name]
        try:
            if self.config.held_out_path is None:
                return load_held_out(self.config, "task.path", self._read)
            return load_splits(self.config, self.fields, self._read)
        except DataError as error:
            columns = " and ".join(name for name in (known.question, known.answer) if name)
            fault = re.sub(r"^task\.\w+_(?:column|template): |; (?:set|name) .*", "", error.message)  # no keys here
            raise DataError(
                f"task.name {self.name}: {fault}; expected {known.path}, or a copy of it with the columns {columns}; "
                "task.type dataset reads other files"
            ) from None


def dataset_config(config: BenchmarkConfig) -> DatasetConfig:
    """Return the config of the task `dataset` that reads a benchmark. Without training data, it has one path."""
    known = BENCHMARKS[config.name]
    own_train = known.path if config.path is None and known.train_split else None
    held_out, train = config.path or known.path, config.train_path or own_train
    return DatasetConfig(
        path=train or held_out,
        split=(known.train_split or "train") if train else known.split,
        held_out_path=held_out if train else None,
        held_out_split=known.split,
        subset=known.subset,
        question_column=known.question,
        answer_column=known.answer,
        answer_pattern=known.pattern,
        prompt_template=config.prompt_template or known.template,
        system_prompt=config.system_prompt,
        accept_cut_off=config.accept_cut_off,
        max_bad_rows=0,  # a figure of a part of a benchmark has another meaning
    )


def build_benchmark(config: BenchmarkConfig, seed: int) -> BenchmarkTask:
    """Build the task of a benchmark."""
    if config.name == "ifeval":
        from rlsys.tasks.ifeval import IfevalTask

        return IfevalTask(config, seed)
    if config.name == "multi_if":
        from rlsys.tasks.multi_if import MultiIfTask

        return MultiIfTask(config, seed)
    return BenchmarkTask(config, seed)
