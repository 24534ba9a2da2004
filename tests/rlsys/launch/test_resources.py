"""The resource plan: sums by hand, and the comparison with this machine."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlsys.config.engine_roles import ModelEngines, Searching, engine_settings
from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.launch import resources
from rlsys.launch.resources import GIB, Need, ResourcePlan, object_store_bytes, plan_resources
from rlsys.models.folder import ModelFolder

PARAMETERS = 2**30  # 1 Gi elements: 4 GiB in fp32, 2 GiB in bf16


@pytest.fixture
def model(tmp_path: Path) -> ModelFolder:
    """A model of headers without tensors: [2^15, 2^14] and [2^29] elements are 2^29 each."""
    for number, shape in enumerate(([2**15, 2**14], [2**29])):
        header = json.dumps({"__metadata__": {}, "w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
        (tmp_path / f"{number}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    return ModelFolder(tmp_path)


def config(**sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {"run": {"dir": "d"}, "model": {"path": "m"}, "task": {"type": "letter_count"}}
    values["train"] = {"updates_per_step": 1}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return parse_config(values, "test")


def needs_of(
    config: Config, model: ModelFolder, searching: Searching | None = None, *, learner: bool = True
) -> Sequence[Need]:
    return plan_resources(config, {"policy": model, "reviewer": model}, searching, learner=learner).needs


def amounts(needs: Sequence[Need]) -> dict[tuple[str, str], float]:
    return {(need.phase, need.resource): need.amount for need in needs}


def plan(needs: Sequence[Need]) -> ResourcePlan:
    return ResourcePlan(config=config(), auxiliary=(), ranks=0, needs=needs)


def memory(needs: Sequence[Need]) -> float:
    return amounts(needs)[("all", "memory, GiB")]


def test_parameters_are_counted_from_headers(model: ModelFolder) -> None:
    assert model.parameters == PARAMETERS


def test_cpu_plan_by_hand(model: ModelFolder) -> None:
    # 2 actors * (1.2 + 1 cache + 4 weights) = 12.4; 2 ranks * (0.8 + 4 weights + 4 gradients + (8 moments +
    # 4 of DeepSpeed's own weights)/2) = 29.6; store 4/2 + 8 * 64 MiB = 2.5;
    # copy of the published weights 4. Sum 48.5.
    needs = amounts(needs_of(config(), model))
    assert needs.pop(("all", "memory, GiB")) == pytest.approx(48.5)
    assert needs.pop(("all", "shared memory, GiB")) == pytest.approx(2.5)
    assert needs == {("rollout", "threads"): 2, ("learning", "threads"): 2}


def test_kl_reference_is_counted_where_it_is_loaded(model: ModelFolder) -> None:
    plain = memory(needs_of(config(), model))
    kl = {"kl": {"weight": 0.1}}
    assert memory(needs_of(config(objective=kl), model)) == pytest.approx(plain + 2 * 4)  # 2 ranks, 4 GiB
    warm = parse_config({**config(objective=kl).model_dump(), "stages": ["warm_start"]}, "test")
    assert memory(needs_of(warm, model)) == pytest.approx(plain)


def test_zero_3_divides_weights_gradients_and_reference(model: ModelFolder) -> None:
    kl = {"kl": {"weight": 0.1}}
    two, three = (memory(needs_of(config(learner={"zero_stage": n}, objective=kl), model)) for n in (2, 3))
    assert two - three == pytest.approx(2 * 3 * 4 / 2)  # 2 ranks have half of 4 GiB, three times


def test_on_gpus_the_reference_is_in_host_memory_unless_it_is_partitioned(model: ModelFolder) -> None:
    kl, cuda = {"kl": {"weight": 0.1}}, {"device": "cuda"}
    plain, one, three = (
        memory(needs_of(config(run=cuda, learner={"zero_stage": n}, objective=terms), model))
        for n, terms in ((1, {}), (1, kl), (3, kl))
    )
    assert (one - plain, three - plain) == (pytest.approx(2 * 4), 0)


def test_a_critic_is_counted_as_a_second_trained_model(model: ModelFolder) -> None:
    critic = {"policy": {"estimator": "gae"}, "value": {"weight": 0.5}}
    # 2 ranks * (4 weights + 4 gradients + 12/2 of state) more than the 48.5 of the plan without it.
    # With two models there are copies of both, 2 ranks * 2 models * 12 / 2, too.
    assert memory(needs_of(config(objective=critic), model)) == pytest.approx(48.5 + 28.0 + 24.0)
    offloaded = config(run={"device": "cuda"}, learner={"optimizer_offload": True}, objective=critic)
    assert memory(needs_of(offloaded, model)) == pytest.approx(10.5 + 2 * 2 * 12 / 2 + 24.0)


def test_a_teacher_that_every_rank_holds_is_counted(model: ModelFolder) -> None:
    own = config(learner={"ranks": 2})
    held = plan_resources(own, {"policy": model}, None, learner=True, held=model).needs
    # The 4 GiB of its weights, on both ranks.
    assert memory(held) - memory(needs_of(own, model)) == pytest.approx(8.0)


def test_an_adapter_alone_is_trained_and_published(model: ModelFolder) -> None:
    own = config(learner={"ranks": 2, "zero_stage": 1}, objective={"kl": {"weight": 0.1}})
    adapted = plan_resources(own, {"policy": model}, None, learner=True, trained=PARAMETERS // 16).needs
    # Per rank without an adapter: 4 GiB of weights, 4 of gradients, 12 / 2 of states, and 4 of the reference; the
    # published policy is 4. With one: the base of 4, and (4 + 12 / 2) / 16 of the adapter, which is published.
    saved = 2 * (18 - 4 - 10 / 16) + 4 - 4 / 16
    stores = (object_store_bytes(own, PARAMETERS) - object_store_bytes(own, PARAMETERS // 16)) / GIB
    assert memory(needs_of(own, model)) - memory(adapted) == pytest.approx(saved + stores, rel=1e-9)


def test_copies_for_taking_a_step_back_are_counted_where_they_are_kept(model: ModelFolder) -> None:
    several = {"updates_per_step": 2}
    assert memory(needs_of(config(train=several), model)) == pytest.approx(48.5 + 2 * 12 / 2)
    whole = config(train=several, learner={"zero_stage": 0})
    one = config(learner={"zero_stage": 0})
    assert memory(needs_of(whole, model)) == pytest.approx(memory(needs_of(one, model)) + 2 * 12)
    assert memory(needs_of(config(train=several, run={"device": "cuda"}), model)) == pytest.approx(10.5 + 12.0)
    warm = parse_config({**config(train=several).model_dump(), "stages": ["warm_start"]}, "test")
    assert memory(needs_of(warm, model)) == pytest.approx(48.5)


def test_evaluation_counts_actors_only(model: ModelFolder) -> None:
    needs = amounts(needs_of(config(), model, learner=False))
    assert needs.pop(("all", "memory, GiB")) == pytest.approx(12.4 + 0.5)
    assert needs == {("all", "shared memory, GiB"): 0.5, ("rollout", "threads"): 2}


def test_object_store_holds_a_few_buckets() -> None:
    assert resources.object_store_bytes(config(), PARAMETERS) == 2.5 * GIB
    assert resources.object_store_bytes(config(learner={"dtype": "bf16"}), PARAMETERS) == 1.5 * GIB
    huge = config(weight_sync={"bucket_mib": 2**20})
    assert resources.object_store_bytes(huge, PARAMETERS) == 10 * GIB, "two versions and a half at most"
    assert resources.object_store_bytes(config(), 1000) == 512 * 2**20


def test_a_store_beyond_shared_memory_is_refused(model: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_shared_memory_bytes", lambda: 2**26)
    needs = [need for need in needs_of(config(), model) if need.resource == "shared memory, GiB"]
    with pytest.raises(ConfigError, match=r"--shm-size.*the run needs 2.5 GiB of shared memory.* has 0\.0625"):
        plan(needs).check()


def test_on_gpus_this_machine_holds_no_models(model: ModelFolder) -> None:
    run = {"device": "cuda"}
    # 2 * 1.2 + 2 * 0.8 + store 10
    needs = amounts(needs_of(config(run=run), model))
    assert needs.pop(("all", "memory, GiB")) == pytest.approx(10.5)
    assert list(needs) == [("all", "shared memory, GiB")]
    offloaded = needs_of(config(run=run, learner={"optimizer_offload": True}), model)
    assert memory(offloaded) == pytest.approx(10.5 + 2 * 12 / 2)  # 12 bytes of state, shared by 2 ranks


def test_a_joined_cluster_is_not_compared_with_this_machine(model: ModelFolder) -> None:
    assert needs_of(config(run={"address": "10.0.0.1:6379"}), model) == []


def test_check_names_field_and_numbers() -> None:
    plan([Need("all", "memory, GiB", 4.0, 4.0, "x")]).check()
    with pytest.raises(ConfigError, match=r"actors\.threads: the rollout phase needs 3 threads, this machine has 2"):
        plan([Need("rollout", "threads", 3, 2, "actors.threads")]).check()
    with pytest.raises(ConfigError, match=r"the rollout phase needs 12,345 threads, this machine has 2;"):
        plan([Need("rollout", "threads", 12345, 2, "actors.threads")]).check()


def reviewer(config: Config) -> Searching:
    assert config.search.reviewer is not None
    actors = engine_settings(config, "reviewer", config.search.reviewer)
    return Searching(auxiliary=(ModelEngines(role="reviewer", path=Path("r"), actors=actors),))


def test_auxiliary_engines_are_counted(model: ModelFolder) -> None:
    own = config(search={"reviewer": {"path": "r", "count": 3, "dtype": "bf16", "kv_cache_gib": 0.5}})
    # 3 * (1.2 + 0.5 cache + 2 weights) = 11.1 on top of the 48.5 of the plan without them.
    needs = needs_of(own, model, reviewer(own))
    assert memory(needs) == pytest.approx(48.5 + 11.1)
    assert amounts(needs)[("rollout", "threads")] == 5
    assert [need.field for need in needs if need.resource == "threads" and need.phase == "rollout"] == [
        "search.reviewer.count, actors.count or actors.threads"
    ]
    alone = needs_of(own, model, reviewer(own), learner=False)
    assert memory(alone) == pytest.approx(12.4 + 0.5 + 11.1)
    on_gpus = config(run={"device": "cuda"}, search=own.search.model_dump())
    assert memory(needs_of(on_gpus, model, reviewer(on_gpus))) == pytest.approx(10.5 + 3 * 1.2)
