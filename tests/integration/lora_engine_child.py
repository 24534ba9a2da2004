"""Engines with an adapter, without Ray: write as JSON what each computed before, during and after updates.

Usage: lora_engine_child.py MODEL_FOLDER... An engine begins with the adapter in MODEL_FOLDER/adapter, if there is one.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from engine_child import CONFIG, completion_gap, fork_engines, publish, request, row_gap, step, updated_in_flight
from local_weights import deliveries

from actors.adapter_loading import ServedAdapter
from actors.engine import Engine
from learners.deepspeed.adapter import adapter_of, add_adapter
from learners.deepspeed.model import load_model
from learners.deepspeed.parameters import published_tensors
from rlsys.config.schema import LoraConfig
from rlsys.errors import WeightSyncError


def main(folder: Path) -> None:
    lora = LoraConfig(**json.loads((folder / "lora.json").read_text()))
    model, base = (load_model(folder, "fp32", "cpu") for _ in range(2))
    first = folder / "adapter"
    add_adapter(model, lora, first, seed=0)
    spec = adapter_of(model, lora, folder)
    adapter = ServedAdapter(spec=spec, folder=first if first.is_dir() else None)
    engine = Engine(folder, CONFIG, "cpu", end_token_ids=[1], adapter=adapter)
    measured: dict[str, Any] = {"gap_fresh": row_gap(engine, model), "gap_to_base": row_gap(engine, base)}
    engine.submit([request(0, "warm", 4)])[0].result()  # fills the prefix cache with version 0
    step(model, 0.05, seed=1)
    measured["gap_before_update"] = row_gap(engine, model)
    started = time.perf_counter()
    publish(engine, model, 1)
    measured["update_s"] = time.perf_counter() - started
    after, again = (engine.submit([request(0, name, 30)])[0].result() for name in ("after", "again"))
    measured["gap_same_prompt"] = max(completion_gap(each, model, 30) for each in (after, again))
    measured["cached_tokens"] = [after.cached_tokens, again.cached_tokens]
    measured["equal_tokens"] = after.token_ids.tolist() == again.token_ids.tolist()
    measured["gap_updated"] = row_gap(engine, model)
    measured["versions_after"] = [span.version for span in after.versions]
    measured |= updated_in_flight(engine, model)
    measured["gap_after_flight"] = row_gap(engine, model)
    measured["names"] = [name for name, _ in published_tensors(model, lambda p: p.detach())]
    measured["expected"] = sorted(adapter.expected.all)
    measured["refusal"] = refusal(engine, model, next(iter(spec.layers)))
    engine.close()
    (folder / "measured.json").write_text(json.dumps(measured))


def refusal(engine: Engine, model: Any, layer: str) -> str:
    """Publish all layers but one, and return the error of the engine."""
    tensors = [entry for entry in published_tensors(model, lambda p: p.detach()) if layer not in entry[0]]
    try:
        engine.update_weights(3, 0, deliveries(tensors, 3))
    except WeightSyncError as error:
        return error.message
    return ""


if __name__ == "__main__":
    fork_engines([Path(argument) for argument in sys.argv[1:]], main)
