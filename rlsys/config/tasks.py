"""The schema of the section `task`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlsys.config.section import PathName, Section


class TagShares(Section):
    """Probability that a demonstration has a thought node of each type. Thinking and answer nodes always appear."""

    sub_task: float = Field(default=0.3, ge=0, le=1)
    """Share of demonstrations with a <sub-task> node."""
    hypothesis: float = Field(default=0.1, ge=0, le=1)
    """Share of demonstrations with a <hypothesis> node."""
    double_check: float = Field(default=0.1, ge=0, le=1)
    """Share of demonstrations with a <double-check> node."""
    reflection: float = Field(default=0.1, ge=0, le=1)
    """Share of demonstrations with a planted error that a <reflection> node corrects."""
    reclarify: float = Field(default=0.1, ge=0, le=1)
    """Share of demonstrations with a <reclarify> node."""


class LetterCountConfig(Section):
    type: Literal["letter_count"] = "letter_count"
    form: Literal["simple", "words"] = "simple"
    """`simple`: count one letter in a random string. `words`: count two letters in a word, in the seven phrasings of
    the paper's authors."""
    min_length: int = Field(default=5, ge=1)
    """Shortest word, in letters."""
    max_length: int = Field(default=12, ge=1, le=32)
    """Longest word, in letters."""
    alphabet: str = Field(default="abcdefgh", pattern="^[a-z]+$")
    """Letters of the random strings, for the form simple."""
    chunk: int = Field(default=3, ge=1)
    """Letters that one <thinking> node of a demonstration counts."""
    error_rate: float = Field(default=0.1, ge=0, lt=1)
    """Probability that a demonstration miscounts a letter and does not correct it."""
    shares: TagShares = TagShares()
    """How often each type of thought node appears in the demonstrations."""
    questions_path: PathName | None = None
    """JSON file with a list of {id, problem, solution}: the held-out problems, instead of generated ones."""

    @model_validator(mode="after")
    def _lengths(self) -> LetterCountConfig:
        if self.max_length < self.min_length:
            raise ValueError(f"max_length {self.max_length} is below min_length {self.min_length}")
        return self


class BlocksworldConfig(Section):
    type: Literal["blocksworld"] = "blocksworld"
    min_blocks: int = Field(default=3, ge=3, le=5)
    """Smallest number of blocks in a generated problem."""
    max_blocks: int = Field(default=3, ge=3, le=5)
    """Largest number of blocks in a generated problem."""
    alphabet: str = Field(default="abcdefghijkl", pattern="^[a-z]+$")
    """Letters that name blocks. Each problem draws its block names from them."""
    moves_per_node: int = Field(default=2, ge=1)
    """Moves that one <thinking> node of a demonstration makes. Carrying one block takes two moves."""
    error_rate: float = Field(default=0.2, ge=0, le=1)
    """Share of demonstrations that write a wrong state after one node and continue from it."""
    shares: TagShares = TagShares()
    """How often each type of thought node appears in the demonstrations."""
    problems_path: PathName | None = None
    """JSONL file of {instance, pddl}: the held-out problems, instead of generated ones."""

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
    """Training data: a file (JSON lines, JSON array, CSV, TSV, Parquet, Arrow; also compressed), or the folder or hub
    id of a Hugging Face dataset (docs/data.md)."""
    held_out_path: PathName | None = None
    """Evaluation data, in the same formats. By default, every `held_out_every`-th row of `path` is held out."""
    held_out_every: int = Field(default=10, ge=2)
    """Without held_out_path, one row in this many is held out."""
    split: str = "train"
    """Split of a Hugging Face dataset that is used for training."""
    held_out_split: str = "test"
    """Split of a Hugging Face dataset that is used for evaluation."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset, for both splits (GSM8K: main)."""
    question_column: str = "question"
    """Column with the question, as text or as a list of messages. A dot leads into a nested column."""
    answer_column: str = "answer"
    """Column with the reference answer. A dot leads into a nested column (verl: reward_model.ground_truth)."""
    answer_pattern: str | None = None
    """Regular expression whose first group is the reference answer in answer_column (GSM8K: `#### (.+)`). By default,
    the whole text is the answer."""
    demonstration_column: str | None = None
    """Column with a worked solution, which is a demonstration. null: no demonstrations."""
    prompt_template: str = "{question}"
    """Text of the user message. {question} is replaced by the question, or by the last user message of a list of
    messages."""
    strictness: Literal["text", "value", "lenient"] = "value"
    """Answers that are right. `text`: the text of the reference, whatever its markup. `value`: also other forms of its
    value. `lenient`: also a number without its percent sign, and a rounded decimal. docs/answers.md has the rules."""
    relative_tolerance: float = Field(default=1e-6, ge=0, le=0.1)
    """Largest relative difference from a reference that is a decimal. It stays below half a unit of its last digit."""
    accept_cut_off: bool = False
    """Also judge completions that were cut off at sampling.max_tokens. By default they have no answer."""
    max_bad_rows: float = Field(default=0.01, ge=0, le=1)
    """Largest share of rows that are unreadable or too long. They are left out and counted. A larger share is an
    error."""

    @model_validator(mode="after")
    def _template(self) -> DatasetConfig:
        if "{question}" not in self.prompt_template:
            raise ValueError("prompt_template must contain {question}")
        return self


TaskConfig = Annotated[LetterCountConfig | BlocksworldConfig | DatasetConfig, Field(discriminator="type")]
