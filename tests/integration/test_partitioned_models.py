"""Models of ZeRO 3 ranks: they have the values of the whole model, of which no rank ever holds more than a share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_learner_ranks import run_ranks
from tiny_architectures import toy_model

from learners.deepspeed.critic import load_critic
from learners.deepspeed.tensor_files import write_tensors
from rlsys.models.tensors import persistent_buffers

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
LAYERS = 8
MISSING, SPARE = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.other.weight"


def glm4_moe() -> Any:
    """Build a model with persistent buffers, experts that transformers fuses, and an output layer of its own."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    model = Glm4MoeForCausalLM(
        Glm4MoeConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1, n_routed_experts=4, num_experts_per_tok=2,
            n_shared_experts=1, first_k_dense_replace=1, head_dim=8,
        )
    )  # fmt: skip
    for _, buffer in persistent_buffers(model):
        torch.nn.init.normal_(buffer)
    return model


def change(folder: Path, changed: Path, change: Any) -> str:
    """Copy a model folder with other tensors."""
    changed.mkdir()
    (changed / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    return str(changed)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank found."""
    folder = tmp_path_factory.mktemp("partitioned")
    torch.manual_seed(0)
    deep = toy_model("qwen2", vocab_size=60, num_hidden_layers=LAYERS, tie_word_embeddings=True)
    deep.save_pretrained(folder / "deep", max_shard_size="20KB")
    glm4_moe().save_pretrained(folder / "moe")
    toy_model("qwen2").save_pretrained(folder / "small")
    critic = load_critic(folder / "small", "fp32", "cpu")
    torch.nn.init.normal_(critic.score.weight)
    write_tensors(critic.named_parameters(), folder / "critic", "model", writes=True)
    refused = {
        change(
            folder / "small", folder / "missing", lambda tensors: tensors.pop(MISSING)
        ): f"tensor {MISSING} is missing",
        change(
            folder / "small", folder / "spare", lambda tensors: tensors.update({SPARE: torch.ones(1)})
        ): f"no place for tensor {SPARE}",
    }
    jobs = [
        {"name": "deep", "model": str(folder / "deep"), "reference": True},
        {"name": "bf16", "model": str(folder / "deep"), "dtype": "bf16"},
        {"name": "moe", "model": str(folder / "moe")},
        {"name": "critic", "model": str(folder / "small"), "critic": str(folder / "critic")},
        {"refused": refused},
    ]
    run_ranks(folder, {"ranks": (2, jobs)}, child="partition_child.py")
    return [json.loads((folder / f"ranks.{rank}.figures").read_text()) for rank in range(2)]


def test_partitioned_models_have_the_values_of_whole_ones(figures: list[dict[str, Any]]) -> None:
    # The ranks themselves have compared all values, and the log-probabilities of the reference policy.
    assert all(set(found) == {"deep", "bf16", "moe", "critic"} for found in figures)


@pytest.mark.parametrize("name", ["deep", "bf16"])
def test_no_rank_holds_the_whole_model(figures: list[dict[str, Any]], name: str) -> None:
    for found in (rank[name] for rank in figures):
        # Half of every parameter, rounded up. The embedding, the largest one, is whole for a moment.
        assert found["parts"] <= found["size"] / 2 + 12 * LAYERS
        assert found["peak"] < 0.7 * found["size"]
