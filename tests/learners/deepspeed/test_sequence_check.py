"""Models whose rows several ranks can share, and the one line that refuses the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_architectures import TOY_KINDS, toy_model
from torch import nn
from transformers import AttentionInterface, Qwen2ForCausalLM

from learners.deepspeed.sequence_check import TRIED, check_sequence_parallel, whole_row_need
from rlsys.errors import ConfigError
from rlsys.models.folder import ModelFolder

NEEDS = {
    "gemma2": "a window",
    "gemma3_text": "a window",
    "mistral": "a window",
    "mamba": "has ",
    "bloom": "the attention 'eager'",
}
REFUSED = "so ranks cannot share its rows; set learner.sequence_parallel to 1"


@pytest.mark.parametrize("kind", TOY_KINDS)
def test_rows_of_every_kind_of_model_are_shared_or_not(kind: str) -> None:
    need = whole_row_need(toy_model(kind))
    assert (need is None) == (kind not in NEEDS)
    assert NEEDS.get(kind, "") in (need or "")
    assert TRIED not in AttentionInterface()._global_mapping


@pytest.mark.parametrize(
    ("changes", "need"),
    [
        ({"attn_logit_softcapping": 2.0, "layer_types": ["full_attention"] * 2}, "softcap"),
        ({"attn_logit_softcapping": None, "layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_an_attention_with_a_feature_that_the_fast_one_drops_is_refused(
    changes: dict[str, Any], need: str | None
) -> None:
    found = whole_row_need(toy_model("gemma2", **changes))
    assert found == (None if need is None else f"has an attention with {need}")


def test_a_model_that_mixes_tokens_outside_its_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_model("qwen2")
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, states: plain(self, states + states.roll(1, dims=-2)))
    assert "mixes tokens outside its attention" in str(whole_row_need(model))


def folder(path: Path, **changes: Any) -> ModelFolder:
    toy_model("qwen2", **changes).save_pretrained(path)
    return ModelFolder(path)


@pytest.mark.parametrize(
    ("heads", "pairs", "sizes"), [(4, 2, {2, 4}), (6, 3, {3, 6}), (4, 1, {2, 4}), (8, 8, {2, 4, 8})]
)
def test_ranks_divide_heads(heads: int, pairs: int, sizes: set[int], tmp_path: Path) -> None:
    model = folder(tmp_path, hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=pairs)
    for size in range(2, heads + 2):
        if size in sizes:
            check_sequence_parallel(model, size)
            continue
        with pytest.raises(ConfigError) as refused:
            check_sequence_parallel(model, size)
        fitting = ", ".join(map(str, sorted({1} | sizes)))
        assert refused.value.message == (
            f"learner.sequence_parallel {size}: model.path {tmp_path} has {heads} attention heads and {pairs} "
            f"key-value heads, which {size} ranks cannot share; choose one of {fitting}"
        )


def test_a_model_that_cannot_share_rows_is_refused_in_one_line(tmp_path: Path) -> None:
    toy_model("mistral").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=REFUSED) as refused:
        check_sequence_parallel(ModelFolder(tmp_path), 2)
    assert refused.value.message.startswith(f"learner.sequence_parallel 2: model.path {tmp_path} has layers with a ")
    assert "\n" not in refused.value.message


def test_the_model_itself_is_not_changed() -> None:
    model = toy_model("qwen2")
    before = model.config.to_json_string()
    assert whole_row_need(model) is None
    assert model.config.to_json_string() == before and type(model) is Qwen2ForCausalLM
    assert model.config._attn_implementation == "sdpa"
