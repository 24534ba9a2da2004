"""The schema of the section `task`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlsys.config.section import PathName, Section


class TagShares(Section):
    """How often a demonstration holds each thought node (probabilities; thinking and answer always appear)."""

    sub_task: float = Field(default=0.3, ge=0, le=1)
    """Share with a <sub-task> node."""
    hypothesis: float = Field(default=0.1, ge=0, le=1)
    """Share with a <hypothesis> node."""
    double_check: float = Field(default=0.1, ge=0, le=1)
    """Share with a <double-check> node."""
    reflection: float = Field(default=0.1, ge=0, le=1)
    """Share with a planted error that a <reflection> node corrects."""
    reclarify: float = Field(default=0.1, ge=0, le=1)
    """Share with a <reclarify> node."""


class LetterCountConfig(Section):
    type: Literal["letter_count"] = "letter_count"
    form: Literal["simple", "words"] = "simple"
    """`simple`: one letter in a random string; `words`: two letters in a word, in the authors' seven phrasings."""
    min_length: int = Field(default=5, ge=1)
    """Shortest word, in letters."""
    max_length: int = Field(default=12, ge=1, le=32)
    """Longest word, in letters."""
    alphabet: str = Field(default="abcdefgh", pattern="^[a-z]+$")
    """Letters of the simple form."""
    chunk: int = Field(default=3, ge=1)
    """Letters worked through in one <thinking> node."""
    error_rate: float = Field(default=0.1, ge=0, lt=1)
    """Probability that one increment of a demonstration is wrong and stays wrong."""
    shares: TagShares = TagShares()
    """Shares of the thought nodes in the demonstrations."""
    questions_path: PathName | None = None
    """JSON list of {id, problem, solution} used as the held-out split instead of generated questions."""

    @model_validator(mode="after")
    def _lengths(self) -> LetterCountConfig:
        if self.max_length < self.min_length:
            raise ValueError(f"max_length {self.max_length} is below min_length {self.min_length}")
        return self


class BlocksworldConfig(Section):
    type: Literal["blocksworld"] = "blocksworld"
    min_blocks: int = Field(default=3, ge=3, le=5)
    """Fewest blocks of a generated problem."""
    max_blocks: int = Field(default=3, ge=3, le=5)
    """Most blocks of a generated problem."""
    alphabet: str = Field(default="abcdefghijkl", pattern="^[a-z]+$")
    """Names of blocks; each problem draws its own among them."""
    moves_per_node: int = Field(default=2, ge=1)
    """Moves worked through in one <thinking> node; two carry one block."""
    error_rate: float = Field(default=0.2, ge=0, le=1)
    """Share of the demonstrations that note the state after one node wrongly and plan on from there."""
    shares: TagShares = TagShares()
    """Shares of the thought nodes in the demonstrations."""
    problems_path: PathName | None = None
    """JSONL file of {instance, pddl} used as the held-out split instead of generated problems."""

    @model_validator(mode="after")
    def _blocks(self) -> BlocksworldConfig:
        if self.max_blocks < self.min_blocks:
            raise ValueError(f"max_blocks {self.max_blocks} is below min_blocks {self.min_blocks}")
        if len(set(self.alphabet)) < max(len(self.alphabet), self.max_blocks):
            raise ValueError(
                f"alphabet {self.alphabet!r}: expected at least max_blocks ({self.max_blocks}) letters, all different"
            )
        return self


class DatasetConfig(Section):
    type: Literal["dataset"] = "dataset"
    path: PathName
    """JSONL or Parquet file, or a Hugging Face dataset folder or id, for training."""
    held_out_path: PathName | None = None
    """The same for evaluation; without it every `held_out_every`-th row of `path` is held out."""
    held_out_every: int = Field(default=10, ge=2)
    """Without held_out_path: one row in this many is held out."""
    split: str = "train"
    """Split of a Hugging Face dataset for training."""
    held_out_split: str = "test"
    """Split of a Hugging Face dataset for evaluation."""
    subset: str | None = None
    """Configuration name of a Hugging Face hub dataset, for training and evaluation (GSM8K: main)."""
    question_column: str = "question"
    """Column with the question."""
    answer_column: str = "answer"
    """Column with the reference answer."""
    answer_pattern: str | None = None
    """Regular expression whose first group is the reference answer inside the column (GSM8K: `#### (.+)`)."""
    demonstration_column: str | None = None
    """Column with a worked solution, for the warm start."""
    prompt_template: str = "{question}"
    """The user message; {question} is replaced."""
    max_bad_rows: float = Field(default=0.01, ge=0, le=1)
    """Share of unreadable rows that is skipped and counted; more is an error."""

    @model_validator(mode="after")
    def _template(self) -> DatasetConfig:
        if "{question}" not in self.prompt_template:
            raise ValueError("prompt_template must contain {question}")
        return self


TaskConfig = Annotated[LetterCountConfig | BlocksworldConfig | DatasetConfig, Field(discriminator="type")]
