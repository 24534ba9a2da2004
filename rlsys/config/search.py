"""The schema of the sections `search` and `extract`. `rlsys.config.patterns` checks and resolves the node tables."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlsys.config.search_values import AgreementValueConfig, ValueConfig
from rlsys.config.section import Section, Temperature
from rlsys.config.served_model import ServedModelConfig

START = "start"
"""Name of the prompt in a transition table."""


class NodeTypeConfig(Section):
    tag: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")
    """Name of the tag. The text of a node stands between <tag> and </tag>."""
    prefixes: tuple[str, ...] = ()
    """Texts to put after the opening tag. Each expansion draws one text, which all children of the expansion share."""
    writer: Literal["model", "reviewer", "nobody"] = "model"
    """Who writes the text of the node. `model`: the model that grows the tree; `reviewer`: search.reviewer, or the same
    model if there is no reviewer; `nobody`: the prefix is the whole text."""
    terminal: bool = False
    """Whether the node ends the chain, which the verifier then judges."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Maximum length of a node of this type, in generated tokens. By default search.max_node_tokens."""


class PatternConfig(Section):
    children: dict[str, dict[str, Annotated[int, Field(ge=1)]]]
    """Node type -> child type -> number of children of that type in an expansion. `start` is the prompt. With chain
    expansion the model chooses the types, and the sum of a row is the number of chains drawn from the node.
    `environment` is the reply of an environment, the only child of a type that ends a turn."""
    after_wrong: dict[str, dict[str, Annotated[int, Field(ge=1)]]] = Field(default={})
    """Node type -> child type -> maximum number. After a wrong answer, an ancestor of the first type (see
    search.backtrack_to) gets a child of the second type."""


class UcbConfig(Section):
    type: Literal["ucb"] = "ucb"
    form: Literal["paper", "code"] = "paper"
    """`paper`: Q + c sqrt(ln N_p / N); `code`: Q + c sqrt(2 ln N_p / N), as in the program of the paper's authors."""
    exploration: float = Field(default=2.0, ge=0)
    """The constant c. The authors' program has 1.414 with the form code, which equals 2.0 with the form paper."""


class PuctConfig(Section):
    type: Literal["puct"]
    exploration: float = Field(default=1.0, ge=0)
    """The constant c of Q + c P sqrt(N_p) / (1 + N)."""
    length_exponent: float = Field(default=1.0, ge=0)
    """Exponent a of the length: the prior P of a sibling is proportional to its number of draws times exp(sum of
    log-probabilities / tokens ** a)."""


class FrontierConfig(Section):
    type: Literal["frontier"]
    value_weight: float = Field(default=0.4, ge=0)
    """Weight of tanh(Q), with the value Q of the node, or of its parent as long as the node has none."""
    entropy_weight: float = Field(default=0.4, ge=0)
    """Weight of the node's mean negative log-probability, in nats per token."""
    depth_weight: float = Field(default=0.01, ge=0)
    """Weight of sqrt(depth / search.max_depth); without max_depth, of sqrt(depth / depth of the deepest node)."""
    exploration: float = Field(default=2.0, ge=0)
    """The constant c of UCB (form paper), which chooses among the children that a simulation has just expanded."""


class SurpriseConfig(Section):
    type: Literal["surprise"]
    unit: Literal["token", "node"] = "token"
    """`token`: a new chain keeps all tokens before the most surprising one; `node`: it keeps all nodes before the one
    that holds it."""
    chains: int = Field(default=1, ge=1)
    """Number of whole chains that are drawn from the prompt first."""


class RevisionConfig(Section):
    type: Literal["revision"]
    chains: int = Field(default=4, ge=1)
    """Number of whole chains that are drawn from the prompt first. The longest right one is revised."""
    draws: int = Field(default=1, ge=1)
    """Number of chains that are drawn after each of its thoughts (Retro-Search)."""


SelectionConfig = Annotated[
    UcbConfig | PuctConfig | FrontierConfig | SurpriseConfig | RevisionConfig, Field(discriminator="type")
]


class CorrectRule(Section):
    count: int = Field(ge=1)
    """Number of correct answers with different <thinking> texts that end the search of a tree."""
    after: int = Field(default=0, ge=0)
    """Number of finished simulations from which the rule applies."""


class StopConfig(Section):
    simulations: int = Field(default=128, ge=1)
    """Maximum number of simulations of one tree."""
    tokens: int | None = Field(default=None, ge=1)
    """Maximum number of tokens that all models generate for one tree. Requests in progress at the limit are completed
    and counted. null: no limit."""
    answers: int | None = Field(default=None, ge=1)
    """Maximum number of distinct scored answers of one tree. null: no limit."""
    correct: tuple[CorrectRule, ...] = (CorrectRule(count=8), CorrectRule(count=4, after=32))
    """Rules that end the search after a number of correct answers."""
    sure: float | None = Field(default=None, gt=0.5, lt=1)
    """Probability, as if all chains so far were independent draws, that the most frequent answer is more probable than
    the second one, at which the search ends (adaptive consistency). Chains that were told of a wrong answer have no
    vote. null: no limit."""


class SearchModelConfig(ServedModelConfig):
    question_template: str = "{question}"
    """Text of the user message for this model, with any instructions about tags. {question} is replaced by the
    question. The text is not part of the extracted data."""

    @model_validator(mode="after")
    def _template(self) -> SearchModelConfig:
        if "{question}" not in self.question_template:
            raise ValueError("question_template must contain {question}")
        return self


class SearchConfig(Section):
    fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the prompts of each online training step that are searched instead of sampled."""
    unsolved: bool = False
    """Whether online training also searches prompts that no sample solved, in place of other prompts. The search is one
    of the train.dynamic_sampling_rounds; prompts that are sampled in the last round are not searched."""
    split: Literal["train", "held_out"] = "train"
    """Split of the problems that `rlsys search` and the stage search grow trees for."""
    prompts: int = Field(default=512, ge=1)
    """Number of these problems, from the first one."""
    shard_size: int = Field(default=64, ge=1)
    """Trees in one file."""
    model: SearchModelConfig | None = None
    """The model that grows the trees. By default the policy."""
    reviewer: SearchModelConfig | None = None
    """The model that writes the nodes of writer `reviewer`. By default the model that grows the trees."""
    nodes: dict[str, NodeTypeConfig] = Field(default={})
    """Node types by name. They replace or extend the shipped types: sub_task, thinking, hypothesis, double_check,
    reflection, reclarify, answer, thinking_from_scratch."""
    tables: dict[str, PatternConfig] = Field(default={})
    """Transition tables by name. They replace or extend the shipped tables (see patterns)."""
    patterns: tuple[str, ...] = Field(default=("a",), min_length=1)
    """Names of transition tables. Each tree draws one of them. Shipped: a, b, c, d (the four of the paper) and
    letter_count (from the program of its authors)."""
    expansion: Literal["node", "chain"] = "node"
    """`node`: an expansion generates all children of a node; `chain`: it samples the rest of the chain in one call and
    splits it into nodes at the tags."""
    selection: SelectionConfig = UcbConfig()
    """Rule that selects the node that a simulation expands."""
    value: ValueConfig | None = None
    """Estimates of the values of thought nodes, for the time before the first right answer. `steps`: the task checks
    the steps, and a wrong one ends its chain; `agreement`: the reward of an answer is the share of the tree's answers
    that are the same, whatever the verifier says; `rollouts`: the mean reward of chains drawn from the node; `model`: a
    judge model. null: none."""
    parallel_simulations: int = Field(default=8, ge=1)
    """Number of simulations of one tree that run at the same time (WU-UCT). More simulations keep the engines busy;
    with fewer, each selection knows more results. A quarter of stop.simulations is a good upper bound."""
    backtracking: bool = True
    """Whether to apply the rows after_wrong of the tables."""
    max_backtracks: int | None = Field(default=1, ge=1)
    """Maximum number of children of the rows after_wrong in one chain. null: no limit. With many, a chain guesses by
    elimination: it is told of every wrong answer."""
    backtrack_to: Literal["nearest", "surprise", "value"] = "nearest"
    """Ancestor of a wrong answer that gets the child of the rows after_wrong, among those with such a row. `nearest`:
    the last one; `surprise`: the one with the most surprising token; `value`: the one with the lowest mean reward."""
    temperature: Temperature | None = None
    """Sampling temperature of the search. By default sampling.temperature."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Nucleus (top-p) mass of the search. By default sampling.top_p."""
    max_node_tokens: int = Field(default=64, ge=1)
    """Maximum length of a node, in generated tokens. A node that reaches it is invalid."""
    max_depth: int | None = Field(default=16, ge=1)
    """Maximum number of nodes in a chain. null: no limit, which is allowed only for tables without loops."""
    max_failed_trees: float = Field(default=0.1, ge=0, le=1)
    """Largest share of the trees, and of the verifications, that may fail in `rlsys search` or the stage search.
    Failures are recorded; a larger share is an error."""
    stop: StopConfig = StopConfig()
    """Limits at which the search of a tree ends."""

    @property
    def online(self) -> bool:
        """Whether online training searches prompts."""
        return self.fraction > 0 or self.unsolved

    @model_validator(mode="after")
    def _whole_chains(self) -> SearchConfig:
        if isinstance(self.selection, SurpriseConfig | RevisionConfig) and self.expansion != "chain":
            raise ValueError(f"selection {{type: {self.selection.type}}} draws whole chains: set expansion to chain")
        return self

    @model_validator(mode="after")
    def _agreement(self) -> SearchConfig:
        if isinstance(self.value, AgreementValueConfig) and (self.backtracking or self.stop.correct):
            raise ValueError(
                "value {type: agreement} does not use the verifier's verdicts: set backtracking to false and "
                "stop.correct to []"
            )
        return self


ChainRule = Literal["highest_value", "longest", "median", "shortest", "by_difficulty", "retrospective", "none"]


class ExtractConfig(Section):
    supervised: ChainRule | Literal["divergence"] = "longest"
    """Which correct chain of a tree becomes a supervised row. by_difficulty: the one whose length is closest to a
    budget, from the shortest where the tree solves the problem always to the longest where it seldom does;
    retrospective: the shortest that begins with the first node of the longest; divergence: the one whose nodes a
    teacher finds more probable than the policy does, for `rlsys extract` after `rlsys score`. none: no supervised
    rows."""
    supervised_nodes: tuple[str, ...] = ()
    """Types of the nodes that supervised rows train; the others are context. Empty: all nodes."""
    supervised_rows: Literal["chain", "node"] = "chain"
    """`chain`: one row for the whole chain; `node`: one row for every node, which trains that node alone after the
    nodes before it (chunk-wise training)."""
    skip: tuple[str, ...] = ()
    """Types of nodes that are left out of the chain of a supervised row, where another correct chain of the tree has
    none of that type (Skip-Thinking)."""
    chosen: ChainRule = "shortest"
    """Which correct chain of a tree becomes the chosen side of preference pairs. none: no pairs of chains."""
    max_backtracks: int | None = Field(default=0, ge=0)
    """Maximum number of nodes after a wrong answer in the chains of supervised rows and pairs. null: no limit. The
    verifier told such a chain that it was wrong, so its steps are often wrong and its answer often guessed."""
    pairs: Literal["shortest_prefix", "longest_prefix", "same_type"] = "shortest_prefix"
    """Which wrong chains of a tree make pairs. shortest_prefix, longest_prefix: those with the shortest or longest
    common prefix come first; same_type: only those whose first different node has the type of that of the chosen
    chain, with the shortest prefix first."""
    pairs_per_tree: int = Field(default=1, ge=1)
    """Maximum number of preference pairs of one tree."""
    step_values: bool = True
    """Whether to write the table step_values, with every chain of a tree and the values of its nodes."""
    step_value: Literal["mean", "estimate"] = "mean"
    """Value of a node in step_values and step_preferences. `mean`: the mean reward of its chains; `estimate`: that of
    search.value, for all nodes that have one, each with one visit, whatever step_min_visits says."""
    step_preferences: bool = True
    """Whether to extract step preferences: pairs of sibling nodes whose values differ."""
    step_min_visits: int = Field(default=4, ge=1)
    """Minimum number of visits of both siblings of a step preference. With two, chance decides which one is better."""
    step_min_gap: float = Field(default=0.25, gt=0)
    """Minimum difference of the values of the two siblings."""
