"""The schema of `search.value`: who estimates the values of thought nodes while a tree grows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlsys.config.section import Section
from rlsys.config.served_model import ServedModelConfig
from rlsys.plugins import PluginName


class StepsValueConfig(Section):
    type: Literal["steps"]


class AgreementValueConfig(Section):
    type: Literal["agreement"]


class RolloutsValueConfig(Section):
    type: Literal["rollouts"]
    count: int = Field(default=4, ge=1)
    """Number of chains that are drawn from each new node and judged. The estimate is their mean reward."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Longest time for the values of the nodes of one completion, in seconds. After it they count as failed."""
    prune_below: float | None = Field(default=None, ge=-1, le=1)
    """Nodes with an estimate below this are ended: nothing is drawn after them. null: none."""


class FunctionValueConfig(Section):
    type: Literal["function"]
    fn: PluginName
    """Function of your own, `module:function` or `file.py:function`, from a chain to the value of its last node
    (docs/extending.md). It runs in the verifier processes."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of every call, by name."""
    prune_below: float | None = Field(default=None, ge=-1, le=1)
    """Nodes with an estimate below this are ended: nothing is drawn after them. null: none."""


class ModelValueConfig(ServedModelConfig):
    type: Literal["model"]
    template: str = "{question}\n\n{chain}\n\nIs the last step right? Answer yes or no."
    """Text of the user message for the judge. {question} and {chain} are replaced; the chain ends with the node."""
    right: str = "yes"
    """Answer of the judge for a right step, in quotes. Its first token counts."""
    wrong: str = "no"
    """Answer of the judge for a wrong step, in quotes. Its first token must differ from that of `right`."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Longest time for the values of the nodes of one completion, in seconds. After it they count as failed."""
    prune_below: float | None = Field(default=None, ge=0, le=1)
    """Nodes with an estimate below this are ended: nothing is drawn after them. null: none."""

    @model_validator(mode="after")
    def _template(self) -> ModelValueConfig:
        for name in ("{question}", "{chain}"):
            if name not in self.template:
                raise ValueError(f"template must contain {name}")
        return self


ValueConfig = Annotated[
    StepsValueConfig | AgreementValueConfig | RolloutsValueConfig | FunctionValueConfig | ModelValueConfig,
    Field(discriminator="type"),
]
