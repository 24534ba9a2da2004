"""Ranks that load models partitioned (ZeRO 3), and check every value against the whole model.

Usage: as learner_child.py. A job has the folder of a model, and says whether a critic is loaded too.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_child import fork_ranks, join


def values(model: Any) -> dict[str, torch.Tensor]:
    """Return all whole parameters and the buffers of a saved model. Collective for a partitioned model."""
    import deepspeed

    from rlsys.models.tensors import persistent_buffers

    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            found[name] = parameter.detach().clone()
    return {**found, **dict(persistent_buffers(model))}


class Held:
    """Counts the elements of parameters that a rank holds while it loads a model."""

    def __init__(self) -> None:
        from learners.deepspeed import partition

        self.parts, self.peak, partitioner = 0, 0, partition._partitioner

        def counting(dtype: torch.dtype) -> Any:
            made = partitioner(dtype)
            convert = made._convert_to_zero_parameters

            def count(parameters: list[Any]) -> None:
                self.peak = max(self.peak, self.parts + sum(parameter.numel() for parameter in parameters))
                convert(parameters)
                assert all(parameter.numel() == 0 for parameter in parameters)
                self.parts += sum(parameter.ds_tensor.numel() for parameter in parameters)

            made._convert_to_zero_parameters = count
            return made

        partition._partitioner = counting


def compare(job: dict[str, Any], held: Held) -> dict[str, Any]:
    """Load a model whole and partitioned, and compare all values bit for bit."""
    from learners.deepspeed.critic import load_critic
    from learners.deepspeed.model import load_model

    load = load_critic if job.get("critic") else load_model
    options = {"saved": Path(job["critic"])} if job.get("critic") else {}
    folder, dtype = Path(job["model"]), job.get("dtype", "fp32")
    whole = load(folder, dtype, "cpu", **options)
    held.parts = held.peak = 0
    partitioned = load(folder, dtype, "cpu", partitioned=True, **options)
    expected, found = values(whole), values(partitioned)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())
    tied = "lm_head.weight" in expected and expected["lm_head.weight"] is expected.get("model.embed_tokens.weight")
    size = sum(parameter.numel() for parameter in whole.parameters())
    return {"size": size, "parts": held.parts, "peak": held.peak, "tied": tied, "names": len(expected)}


def references(job: dict[str, Any], settings: Any) -> None:
    """Compare the log-probabilities of a partitioned reference policy with those of a whole one."""
    from learners.deepspeed.model import load_model
    from learners.deepspeed.reference import ReferencePolicy

    ids = torch.arange(3, 27).reshape(2, 12)
    given = {
        "input_ids": ids,
        "targets": torch.arange(11),
        "target_ids": ids[0, 1:],
        "temperature": torch.ones(11),
        "parts": 2,
    }
    results = []
    for stage in (1, 3, 3):  # the second one replaces the first one
        own = replace(settings, learner=settings.learner.model_copy(update={"zero_stage": stage}))
        reference = ReferencePolicy(load_model(Path(job["model"]), "fp32", "cpu", partitioned=stage == 3), own)
        with torch.no_grad(), reference.in_use():
            results.append(reference(**given)[0])
        with torch.no_grad(), reference.in_use():
            assert torch.equal(reference(**given)[0], results[-1])
        reference.destroy()
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6)


def refusals(job: dict[str, Any]) -> None:
    """Refuse tensors that are missing or have no place, by name, without waiting for another rank."""
    from learners.deepspeed.model import load_model
    from rlsys.errors import ConfigError

    for folder, message in job["refused"].items():
        with pytest.raises(ConfigError, match=message):
            load_model(Path(folder), "fp32", "cpu", partitioned=True)


def main(rank: int, ranks: int, jobs_file: Path) -> None:
    learner, held = join(rank, ranks, jobs_file.with_suffix(".store")), Held()
    figures = {}
    for job in json.loads(jobs_file.read_text()):
        if "refused" in job:
            refusals(job)
            continue
        figures[job["name"]] = compare(job, held)
        if job.get("reference"):
            references(job, learner.settings)
    jobs_file.with_suffix(f".{rank}.figures").write_text(json.dumps(figures))


if __name__ == "__main__":
    fork_ranks(main)
