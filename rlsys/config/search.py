"""The schema of the sections `search` and `extract`; `rlsys.config.patterns` gives its node tables their meaning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlsys.config.section import Section

START = "start"
"""The name of the prompt in a table of transitions."""


class NodeTypeConfig(Section):
    tag: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")
    """The node's text stands between <tag> and </tag>."""
    prefixes: tuple[str, ...] = ()
    """Texts put after the opening tag; one is drawn per expansion, and all siblings of it share it."""
    writer: Literal["model", "reviewer", "nobody"] = "model"
    """`model` grows the tree; `reviewer` is search.reviewer (the model itself where there is none); `nobody`: the
    prefix is the whole text."""
    terminal: bool = False
    """A node that ends the chain: the verifier judges the chain then."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest node of this type, in generated tokens; by default search.max_node_tokens."""


class PatternConfig(Section):
    children: dict[str, dict[str, Annotated[int, Field(ge=1)]]]
    """Type of a node -> type of its children -> how many of them an expansion asks for; with chain expansion, where the
    writer chooses the types, their sum is how many chains are drawn from the node. `start` is the prompt."""
    after_wrong: dict[str, dict[str, Annotated[int, Field(ge=1)]]] = Field(default={})
    """After a wrong answer the nearest ancestor of the first type gets one child of the second, at most so many."""


class UcbConfig(Section):
    type: Literal["ucb"] = "ucb"
    form: Literal["paper", "code"] = "paper"
    """`paper`: Q + c sqrt(ln N_p / N); `code`: Q + c sqrt(2 ln N_p / N), the authors' program."""
    exploration: float = Field(default=2.0, ge=0)
    """The constant c; the authors' program has 1.414 in its form, which is 2.0 in the paper's."""


class PuctConfig(Section):
    type: Literal["puct"]
    exploration: float = Field(default=1.0, ge=0)
    """The constant c of Q + c P sqrt(N_p) / (1 + N)."""
    length_exponent: float = Field(default=1.0, ge=0)
    """The prior P of a sibling is proportional to exp(sum of log-probabilities / tokens ** this)."""


class FrontierConfig(Section):
    type: Literal["frontier"]
    value_weight: float = Field(default=0.4, ge=0)
    """Weight of tanh(Q of the node's parent)."""
    entropy_weight: float = Field(default=0.4, ge=0)
    """Weight of the node's mean negative log-probability, nats per token."""
    depth_weight: float = Field(default=0.01, ge=0)
    """Weight of sqrt(depth / search.max_depth)."""
    exploration: float = Field(default=2.0, ge=0)
    """The constant c of UCB (paper's form) among the children that a simulation has just expanded."""


SelectionConfig = Annotated[UcbConfig | PuctConfig | FrontierConfig, Field(discriminator="type")]


class CorrectRule(Section):
    count: int = Field(ge=1)
    """Distinct correct answers that end the search of a tree ..."""
    after: int = Field(default=0, ge=0)
    """... once so many simulations are finished."""


class StopConfig(Section):
    simulations: int = Field(default=128, ge=1)
    """Simulations of one tree."""
    tokens: int | None = Field(default=None, ge=1)
    """Generated tokens of one tree, of all models; what is under way when they are reached is still counted."""
    answers: int | None = Field(default=None, ge=1)
    """Distinct scored answers of one tree."""
    correct: tuple[CorrectRule, ...] = (CorrectRule(count=8), CorrectRule(count=4, after=32))
    """Thresholds on distinct correct answers."""


class SearchModelConfig(Section):
    path: str
    """Folder or hub id of the model."""
    count: int = Field(default=1, ge=1)
    """Engines of this model, one process each."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs of one engine; above 1 only with run.device cuda."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format of the engine's weights and cache."""
    max_model_len: int = Field(default=256, ge=16)
    """Longest prompt plus chain, in tokens of this model."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Sequences an engine decodes at once."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Key-value cache of one engine, GiB."""
    question_template: str = "{question}"
    """What this model is asked, instructions on the tags included; {question} is replaced. Never part of the data."""

    @model_validator(mode="after")
    def _template(self) -> SearchModelConfig:
        if "{question}" not in self.question_template:
            raise ValueError("question_template must contain {question}")
        return self


class SearchConfig(Section):
    fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of each online step's prompts that are searched instead of sampled."""
    split: Literal["train", "held_out"] = "train"
    """Problems that `rlsys search` works on."""
    prompts: int = Field(default=512, ge=1)
    """How many of them, from the first on."""
    shard_size: int = Field(default=64, ge=1)
    """Trees of one file."""
    model: SearchModelConfig | None = None
    """The model that grows the trees; by default the policy."""
    reviewer: SearchModelConfig | None = None
    """The model that writes the nodes of writer `reviewer`; by default the one that grows the trees."""
    nodes: dict[str, NodeTypeConfig] = Field(default={})
    """Node types by name, in place of or beside the shipped ones: sub_task, thinking, hypothesis, double_check,
    reflection, reclarify, answer, thinking_from_scratch."""
    tables: dict[str, PatternConfig] = Field(default={})
    """Transition tables by name, in place of or beside the shipped ones (see patterns)."""
    patterns: tuple[str, ...] = Field(default=("a",), min_length=1)
    """Names of tables; each tree draws one of them. Shipped: a, b, c, d (the paper's four) and letter_count (of its
    authors' program)."""
    expansion: Literal["node", "chain"] = "node"
    """`node` asks for all children of a node, node by node; `chain` samples the rest of the chain in one call and cuts
    it into nodes at the tags."""
    selection: SelectionConfig = UcbConfig()
    """Which node a simulation expands."""
    parallel_simulations: int = Field(default=8, ge=1)
    """Simulations of one tree that are under way at once (WU-UCT). More fill the engines, fewer see more results before
    they choose; a quarter of stop.simulations is a good bound."""
    backtracking: bool = True
    """Follow the tables' after_wrong."""
    temperature: float | None = Field(default=None, gt=0, le=5)
    """Sampling temperature; by default sampling.temperature."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Nucleus mass; by default sampling.top_p."""
    max_node_tokens: int = Field(default=64, ge=1)
    """Longest node, in generated tokens; one that reaches it is invalid."""
    max_depth: int | None = Field(default=16, ge=1)
    """Nodes of the longest chain; null for no limit, where no table has a loop."""
    max_failed_trees: float = Field(default=0.1, ge=0, le=1)
    """Share of the trees, and of the verifications, of `rlsys search` that may fail and be recorded; more is an
    error."""
    stop: StopConfig = StopConfig()
    """When a tree is finished."""


class ExtractConfig(Section):
    supervised: Literal["highest_value", "longest", "median", "shortest", "none"] = "longest"
    """Which correct chain of a tree becomes a supervised row."""
    chosen: Literal["highest_value", "longest", "median", "shortest", "none"] = "shortest"
    """Which correct chain of a tree is the chosen side of a preference pair."""
    pairs_per_tree: int = Field(default=1, ge=1)
    """Preference pairs of one tree, those with the shortest common prefix first."""
    step_preferences: bool = True
    """Pairs of sibling nodes whose values differ."""
    step_min_visits: int = Field(default=2, ge=1)
    """Visits that both siblings of a step preference need."""
    step_min_gap: float = Field(default=0.25, gt=0)
    """Difference of their values, at least."""
