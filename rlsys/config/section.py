"""The base class of all config sections."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

PathName = Annotated[str, Field(min_length=1)]
"""A path that is not empty. To name no file, write null."""

LayerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")]
"""The end of the dotted name of a layer, in whole parts: q_proj, or self_attn.q_proj."""

Temperature = Annotated[float, Field(ge=0.01, le=2)]
"""A sampling temperature. vLLM refuses one above 2, and would sample at 0.01 if it were lower."""

NOT_A_TRUTH_VALUE: Final = "not_a_truth_value"
"""Type of the problem of a true or false in the place of another value."""


class Section(BaseModel):
    """Base class of a section. It refuses unknown keys and infinite numbers, and instances are immutable."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _no_truth_value_as_number(cls, values: Any) -> Any:
        # YAML reads `yes` and `on` as true, which pydantic would convert to the number 1.
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise PydanticCustomError(NOT_A_TRUTH_VALUE, "{name}", {"name": name, "value": str(value).lower()})
        return values
