"""Compare the time of a publish, of a model by either transport and of an adapter, with vLLM's reload of the model.

A sender with the tensors of a model and two actors with a vLLM engine each are Ray processes, as in a run. A publish
begins when the sender is told to send and ends when both engines compute with the weights: gather, hash, transfer,
verification and load. The peer is `reload_weights` with the model's tensors, which are in the memory of each actor
already, in both actors at once. The adapter has rank 16 in all linear layers, and engines of its own. The probe's
log-probabilities are left out on all sides. Sides take turns in every round; the first round is not counted. Every
round is saved at once, and the same command continues after an interruption.

The exit code is 1 if a transport takes more than 2.0 times the time of the reload, or the adapter more than 0.1 times
(medians of the rounds).

The default model has the shapes of SmolLM2-135M in fp32: 538 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`
sys.path.append(str(ROOT / "benchmarks"))

from ratios import Ratio, keep  # noqa: E402

from actors.engine_build import engine_environment  # noqa: E402
from rlsys.config.schema import ActorsConfig, LoraConfig, WeightSyncConfig  # noqa: E402
from rlsys.launch.access import child_environment  # noqa: E402
from rlsys.weight_types import WeightOffer  # noqa: E402

TRANSPORTS = ("object_store", "collective")
ADAPTER, RELOAD = "adapter", "vllm_reload"
SIDES = (*TRANSPORTS, ADAPTER, RELOAD)
LIMITS = {**dict.fromkeys(TRANSPORTS, 2.0), ADAPTER: 0.1}
LORA = LoraConfig(rank=16, alpha=16)
ACTORS = 2
WARM_UP = 3  # the object store holds the buckets of two versions, so a third one still gets new memory
ENGINE = ActorsConfig(max_model_len=64, max_num_seqs=4, kv_cache_gib=0.1)
HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, VOCABULARY, BYTES = 576, 1536, 9, 3, 49_152, 4


def layers_for(megabytes: float, vocabulary: int) -> int:
    """Return the number of layers of SmolLM2's shape that make a model of about this size."""
    attention = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN * KEY_VALUE_HEADS // HEADS
    layer = attention + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN
    return max(1, round((megabytes * 1e6 / BYTES - vocabulary * HIDDEN) / layer))


def build(megabytes: float, folder: Path) -> None:
    """Write a random model of about this size. A small one also has a small vocabulary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = VOCABULARY if megabytes >= 200 else VOCABULARY // 16
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers_for(megabytes, vocabulary),
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)


class Sender:
    """The sending side of learner rank 0, with a model that no DeepSpeed holds."""

    def __init__(self, model: Path, weight_sync: WeightSyncConfig, store: str, adapted: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from learners.deepspeed.adapter import add_adapter
        from learners.learner_actor import weight_sender
        from learners.settings import RankSettings

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if adapted:
            add_adapter(self.model, LORA, model, seed=0)
        fields = dict.fromkeys(RankSettings.__dataclass_fields__)
        settings = {**fields, "device": "cpu", "store": store, "weight_sync": weight_sync, "engine_workers": 1}
        self.sender = weight_sender(RankSettings(**settings))  # type: ignore[arg-type]

    def change(self) -> None:
        """Change every trained tensor a little."""
        import torch

        from learners.deepspeed.parameters import trained_parameters

        with torch.no_grad():
            for _, parameter in trained_parameters(self.model):
                parameter.add_(1e-4)

    def send(self, version: int) -> int:
        """Send all tensors, and return their bytes."""
        from learners.deepspeed.parameters import published_tensors

        tensors = published_tensors(self.model, lambda parameter: parameter.detach())
        members = [f"{actor}.0" for actor in range(ACTORS)]
        return self.sender.send(tensors, version=version, attempt=0, members=members).bytes

    @ray.method(concurrency_group="transfer")
    def take(self, request: Any) -> Any:
        return self.sender.take(request)


class Receiver:
    """An actor with an engine that takes publishes, of models or of adapters, and reloads tensors that it holds."""

    def __init__(self, model: Path, number: int, adapted: bool) -> None:
        from actors.adapter_loading import ServedAdapter
        from actors.engine import Engine
        from rlsys.models.adapters import adapter_spec
        from rlsys.models.tensors import empty_model
        from rlsys.transfer.object_store import BucketReceiver

        adapter = ServedAdapter(spec=adapter_spec(empty_model(model), LORA, model)) if adapted else None
        self.engine = Engine(model, ENGINE, "cpu", [1], name=f"{number}", adapter=adapter)
        self.receiver = BucketReceiver(
            f"{number}", f"{number}.0", lambda source, request: ray.get(source.take.remote(request)), ray.get
        )
        self.tensors: list[Any] = []

    def hold(self, model: Path) -> None:
        """Put the tensors for `reload` into the memory of this process."""
        from transformers import AutoModelForCausalLM

        from learners.deepspeed.parameters import published_tensors

        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
        self.tensors = list(published_tensors(loaded, lambda parameter: parameter.detach()))

    def receive(self, offer: WeightOffer) -> None:
        from rlsys.transfer.pipeline import prefetched

        self.engine.update_weights(offer.version, 0, prefetched(self.receiver.receive(offer)))

    def reload(self) -> None:
        arguments = {"weights_iterator": iter(self.tensors)}
        reload = self.engine._run_on_thread(
            lambda: self.engine._engine.collective_rpc("reload_weights", kwargs=arguments)
        )
        reload.result()


class Sides:
    """The processes of all sides."""

    def __init__(self, model: Path, bucket_mib: float) -> None:
        self.version = 0
        variables = child_environment(local=True)
        engine = {"env_vars": {**variables, **engine_environment(ENGINE, "cpu")}}
        actor = ray.remote(Receiver).options(num_cpus=0, runtime_env=engine)
        self.receivers = [actor.remote(model, number, False) for number in range(ACTORS)]
        self.adapted = [actor.remote(model, number, True) for number in range(ACTORS)]
        ray.get([receiver.hold.remote(model) for receiver in self.receivers])
        sender = ray.remote(concurrency_groups={"transfer": 2 * ACTORS})(Sender)
        plain = {"env_vars": {**variables, "OMP_NUM_THREADS": "1"}}
        self.senders = {}
        for side in (*TRANSPORTS, ADAPTER):
            config = WeightSyncConfig(transport=side if side in TRANSPORTS else "object_store", bucket_mib=bucket_mib)
            arguments = (model, config, str(model.parent / side), side == ADAPTER)
            self.senders[side] = sender.options(num_cpus=0, runtime_env=plain).remote(*arguments)
        self.bytes: dict[str, int] = {}

    def change(self, side: str) -> None:
        """Change the weights of the sender of a side, as training would before its next publish."""
        if side in self.senders:
            ray.get(self.senders[side].change.remote())

    def publish(self, side: str) -> None:
        """Publish a model or an adapter, and return when both engines have it."""
        self.version += 1
        sender = self.senders[side]
        offer = WeightOffer(version=self.version, attempt=0, source=sender)
        sent = sender.send.remote(self.version)
        ray.get([each.receive.remote(offer) for each in (self.adapted if side == ADAPTER else self.receivers)])
        self.bytes[side] = ray.get(sent)

    def reload(self) -> None:
        """Let vLLM reload the same tensors in both engines."""
        ray.get([receiver.reload.remote() for receiver in self.receivers])

    def work(self, side: str) -> Callable[[], None]:
        return self.reload if side == RELOAD else lambda: self.publish(side)


def measure(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Measure the rounds that are missing in a result, and save it after every round."""
    with tempfile.TemporaryDirectory(prefix="rlsys-publish-") as folder:
        model = Path(folder) / "model"
        build(arguments.megabytes, model)
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        try:
            sides = Sides(model, arguments.bucket_mib)
            for side in SIDES * WARM_UP:  # first loads, allocations and the group of the broadcast are not counted
                sides.change(side)
                sides.work(side)()
            result["bytes"] = sides.bytes
            while len(result["rounds"]) < arguments.rounds:
                seconds = {}
                for side in SIDES:
                    sides.change(side)
                    started = time.perf_counter()
                    sides.work(side)()
                    seconds[side] = time.perf_counter() - started
                result["rounds"].append(seconds)
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        finally:
            ray.shutdown()


def table(result: dict[str, Any]) -> str:
    """Return the medians, and their ratios to vLLM's reload."""
    medians = {side: statistics.median(seconds[side] for seconds in result["rounds"]) for side in SIDES}
    size, adapter = (result["bytes"][side] / 1e6 for side in (TRANSPORTS[0], ADAPTER))
    lines = [f"{size:.0f} MB and an adapter of {adapter:.1f} MB to {ACTORS} actors, medians of {len(result['rounds'])}"]
    lines += [f"{side:13} {medians[side]:8.3f} s  {medians[side] / medians[RELOAD]:6.2f} x reload" for side in SIDES]
    return "\n".join(lines)


def ratios(result: dict[str, Any]) -> list[Ratio]:
    """Return the ratio of every publish to vLLM's reload of the model."""
    seconds = {side: [each[side] for each in result["rounds"]] for side in SIDES}

    def ratio(side: str, limit: float) -> Ratio:
        name = f"publish of {result['bytes'][side] / 1e6:,.4g} MB to {ACTORS} actors, {side}"
        return Ratio(name, "vLLM's reload from memory", seconds[side], seconds[RELOAD], "s", limit, at_most=True)

    return [ratio(side, limit) for side, limit in LIMITS.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=538.0)
    parser.add_argument("--bucket-mib", type=float, default=64.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("publish.json"), help="result so far, and its end")
    parser.add_argument("--json", type=Path, help="file that keeps the ratios")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    settings = {"megabytes": arguments.megabytes, "bucket_mib": arguments.bucket_mib, "actors": ACTORS}
    result: dict[str, Any] = {"settings": settings, "rounds": []}
    if arguments.out.exists():
        result = json.loads(arguments.out.read_text())
        if result["settings"] != settings:
            sys.exit(f"{arguments.out} holds rounds of other settings, {result['settings']}; give another --out")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if len(result["rounds"]) < arguments.rounds:
        measure(arguments, result)
    print(table(result))
    if arguments.json:
        keep(arguments.json, ratios(result))
    return int(not all(ratio.met for ratio in ratios(result)))


if __name__ == "__main__":
    sys.exit(main())
