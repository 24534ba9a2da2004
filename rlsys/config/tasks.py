"""The schema of the section `task`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from rlsys.config.outside_tasks import BenchmarkConfig, CustomConfig, ReasoningGymConfig
from rlsys.config.section import PathName, Section
from rlsys.config.wording import bound
from rlsys.tables.templates import check_template


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


class GeneratedConfig(Section):
    """Base class of the tasks that generate their problems."""

    type: str
    demonstrations: Section
    """Sizes of the demonstrated problems; null: as in the other problems. So a warm start on easy problems comes before
    training on hard ones."""

    def demonstrated(self) -> Self | None:
        """Return the config of the demonstrated problems, or None if it is this one."""
        sizes = {name: value for name, value in self.demonstrations if value is not None}
        rest = self.model_dump(exclude={"demonstrations"})
        return type(self).model_validate(rest | sizes) if sizes else None

    @model_validator(mode="after")
    def _demonstrations(self) -> Self:
        try:
            self.demonstrated()
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(["demonstrations", *map(str, first["loc"])])
            limit = bound(first)
            wrong = f"expected {limit}, found {first['input']}" if limit else first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{where}: {wrong}") from None
        return self


class LetterCountSizes(Section):
    min_length: int | None = Field(default=None, ge=1, le=32)
    """Shortest word of a demonstration. null: that of the other problems."""
    max_length: int | None = Field(default=None, ge=1, le=32)
    """Longest word of a demonstration. null: that of the other problems."""


class BlocksworldSizes(Section):
    min_blocks: int | None = Field(default=None, ge=3, le=5)
    """Smallest number of blocks in a demonstration. null: that of the other problems."""
    max_blocks: int | None = Field(default=None, ge=3, le=5)
    """Largest number of blocks in a demonstration. null: that of the other problems."""


class CountdownSizes(Section):
    min_numbers: int | None = Field(default=None, ge=2, le=6)
    """Smallest count of given numbers in a demonstration. null: that of the other problems."""
    max_numbers: int | None = Field(default=None, ge=2, le=6)
    """Largest count of given numbers in a demonstration. null: that of the other problems."""
    max_number: int | None = Field(default=None, ge=2, le=99)
    """Largest given number in a demonstration. null: that of the other problems."""
    min_target: int | None = Field(default=None, ge=1, le=999)
    """Smallest target of a demonstration. null: that of the other problems."""


class SumsSizes(Section):
    min_terms: int | None = Field(default=None, ge=2, le=12)
    """Smallest number of terms in a demonstration. null: that of the other problems."""
    max_terms: int | None = Field(default=None, ge=2, le=12)
    """Largest number of terms in a demonstration. null: that of the other problems."""
    min_digits: int | None = Field(default=None, ge=1, le=6)
    """Smallest number of digits of a term in a demonstration. null: that of the other problems."""
    max_digits: int | None = Field(default=None, ge=1, le=6)
    """Largest number of digits of a term in a demonstration. null: that of the other problems."""


class LetterCountConfig(GeneratedConfig):
    type: Literal["letter_count"] = "letter_count"
    demonstrations: LetterCountSizes = LetterCountSizes()
    """Sizes of the demonstrated problems, if others than below: a warm start on easy problems before hard ones."""
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
    miscounts: Literal["both", "extra"] = "both"
    """Letters that such an error concerns. `both`: an asked letter is left out, or another one counted, so errors may
    cancel. `extra`: only another one is counted, so an answer is right only if no step is wrong."""
    shares: TagShares = TagShares()
    """How often each type of thought node appears in the demonstrations."""
    questions_path: PathName | None = None
    """JSON file with a list of {id, problem, solution}: the held-out problems, instead of generated ones."""

    @model_validator(mode="after")
    def _lengths(self) -> LetterCountConfig:
        if self.max_length < self.min_length:
            raise ValueError(f"max_length {self.max_length} is below min_length {self.min_length}")
        return self


class BlocksworldConfig(GeneratedConfig):
    type: Literal["blocksworld"] = "blocksworld"
    demonstrations: BlocksworldSizes = BlocksworldSizes()
    """Sizes of the demonstrated problems, if others than below: a warm start on easy problems before hard ones."""
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


class CountdownConfig(GeneratedConfig):
    type: Literal["countdown"] = "countdown"
    demonstrations: CountdownSizes = CountdownSizes()
    """Sizes of the demonstrated problems, if others than below: a warm start on easy problems before hard ones."""
    min_numbers: int = Field(default=4, ge=2, le=6)
    """Smallest count of given numbers."""
    max_numbers: int = Field(default=4, ge=2, le=6)
    """Largest count of given numbers."""
    max_number: int = Field(default=9, ge=2, le=99)
    """Largest given number. The smallest is 1."""
    min_target: int = Field(default=20, ge=1, le=999)
    """Smallest target. Small targets are easier: random operations often reach them."""
    max_result: int = Field(default=99, ge=2, le=999)
    """Largest target, and largest result of an operation in a demonstration."""
    greedy_rate: float = Field(default=0.0, ge=0, le=1)
    """Probability that an operation of a demonstration is the one whose result is nearest to the target. The others are
    chosen at random."""
    shares: TagShares = TagShares()
    """How often each type of thought node appears in the demonstrations. A reflection appears only after a plan that
    misses the target."""

    @model_validator(mode="after")
    def _numbers(self) -> CountdownConfig:
        if self.max_numbers < self.min_numbers:
            raise ValueError(f"max_numbers {self.max_numbers} is below min_numbers {self.min_numbers}")
        if self.max_result < max(self.max_number, self.min_target):
            raise ValueError(
                f"max_result {self.max_result} is below max_number {self.max_number} or min_target {self.min_target}"
            )
        return self


class SumsConfig(GeneratedConfig):
    type: Literal["sums"] = "sums"
    demonstrations: SumsSizes = SumsSizes()
    """Sizes of the demonstrated problems, if others than below: a warm start on easy problems before hard ones."""
    min_terms: int = Field(default=2, ge=2, le=12)
    """Smallest number of terms."""
    max_terms: int = Field(default=4, ge=2, le=12)
    """Largest number of terms."""
    min_digits: int = Field(default=2, ge=1, le=6)
    """Smallest number of digits of a term."""
    max_digits: int = Field(default=2, ge=1, le=6)
    """Largest number of digits of a term."""
    error_rate: float = Field(default=0.2, ge=0, le=1)
    """Probability that an addition of a demonstration forgets its carries and nothing corrects it."""
    tool_share: float = Field(default=0.0, ge=0, le=1)
    """Probability that an addition of a demonstration is a call of the calculator. Above 0, the task has the calculator
    as its environment, and its demonstrations have no optional nodes."""
    shares: TagShares = TagShares()
    """How often each type of thought node appears in the demonstrations. A reflection appears only if there is a carry
    to forget."""

    @model_validator(mode="after")
    def _ranges(self) -> SumsConfig:
        if self.max_terms < self.min_terms:
            raise ValueError(f"max_terms {self.max_terms} is below min_terms {self.min_terms}")
        if self.max_digits < self.min_digits:
            raise ValueError(f"max_digits {self.max_digits} is below min_digits {self.min_digits}")
        return self


class GuessSizes(Section):
    max_width: int | None = Field(default=None, ge=2, le=900)
    """Largest count of possible numbers in a demonstration. null: that of the other problems."""


class GuessConfig(GeneratedConfig):
    type: Literal["guess"] = "guess"
    demonstrations: GuessSizes = GuessSizes()
    """Sizes of the demonstrated problems, if others than below: a warm start on easy problems before hard ones."""
    digits: int = Field(default=2, ge=1, le=3)
    """Digits of every number."""
    min_width: int = Field(default=20, ge=2, le=900)
    """Smallest count of possible numbers."""
    max_width: int = Field(default=60, ge=2, le=900)
    """Largest count of possible numbers."""
    max_guesses: int = Field(default=8, ge=1)
    """Guess number k, if right, has the reward 1 - (k - 1) / max_guesses. A later one has none."""
    error_rate: float = Field(default=0.2, ge=0, le=1)
    """Probability that a guess of a demonstration ignores the hints."""

    @model_validator(mode="after")
    def _widths(self) -> GuessConfig:
        possible = 9 * 10 ** (self.digits - 1) + (self.digits == 1)
        if not self.min_width <= self.max_width <= possible:
            raise ValueError(
                f"expected min_width <= max_width <= {possible}, the numbers of {self.digits} digits; found "
                f"{self.min_width} and {self.max_width}"
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
    answer_column: str | None = "answer"
    """Column with the reference answer. A dot leads into a nested column (verl: reward_model.ground_truth). null: there
    is none, and rewards.functions judge; a completion then counts as right if its reward is above 0."""
    answer_pattern: str | None = None
    """Regular expression whose first group is the reference answer in answer_column (GSM8K: `#### (.+)`). By default,
    the whole text is the answer."""
    demonstration_column: str | None = None
    """Column with a worked solution, which is a demonstration. null: no demonstrations."""
    prompt_template: str = "{question}"
    """Text of the user message. {question} is replaced by the question, or by the last user message of a list of
    messages; the name of another column in braces is replaced by its text."""
    system_prompt: str | None = Field(default=None, min_length=1)
    """System message before every question. A conversation that has one keeps its own."""
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
        check_template(self.prompt_template, self.question_column)
        return self


TaskConfig = Annotated[
    LetterCountConfig
    | BlocksworldConfig
    | CountdownConfig
    | SumsConfig
    | GuessConfig
    | DatasetConfig
    | BenchmarkConfig
    | ReasoningGymConfig
    | CustomConfig,
    Field(discriminator="type"),
]

WITHOUT_STEPS = ("dataset", "benchmark", "reasoning_gym")
"""Types of tasks without rules for the steps of a chain."""
