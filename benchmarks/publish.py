"""Compare the time of a publish, by either transport, with vLLM's own reload of the same tensors from memory.

A sender with the tensors of a model and two actors with a vLLM engine each are Ray processes, as in a run. A publish
begins when the sender is told to send and ends when both engines compute with the weights: gather, hash, transfer,
verification and load. The peer is `reload_weights` with tensors that are in the memory of each actor already, in both
actors at once. The probe's log-probabilities are left out on all sides. Sides take turns in every round; the first
round is not counted. Every round is saved at once, and the same command continues after an interruption.

The exit code is 1 if a transport takes more than 2.0 times the time of the reload (median of the rounds).

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
from rlsys.config.schema import ActorsConfig, WeightSyncConfig  # noqa: E402
from rlsys.launch.access import child_environment  # noqa: E402
from rlsys.types import WeightOffer  # noqa: E402

TRANSPORTS = ("object_store", "collective")
RELOAD = "vllm_reload"
SIDES = (*TRANSPORTS, RELOAD)
LIMIT = 2.0
ACTORS = 2
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

    def __init__(self, model: Path, weight_sync: WeightSyncConfig, store: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from learners.learner_actor import weight_sender
        from learners.settings import RankSettings

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        fields = dict.fromkeys(RankSettings.__dataclass_fields__)
        settings = {**fields, "device": "cpu", "store": store, "weight_sync": weight_sync, "engine_workers": 1}
        self.sender = weight_sender(RankSettings(**settings))  # type: ignore[arg-type]

    def send(self, version: int) -> int:
        """Change every tensor a little, send all, and return their bytes."""
        import torch

        from learners.deepspeed.parameters import published_tensors

        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(1e-4)
        tensors = published_tensors(self.model, lambda parameter: parameter.detach())
        members = [f"{actor}.0" for actor in range(ACTORS)]
        return self.sender.send(tensors, version=version, attempt=0, members=members).bytes

    @ray.method(concurrency_group="transfer")
    def take(self, request: Any) -> Any:
        return self.sender.take(request)


class Receiver:
    """An actor with an engine that takes publishes, and reloads tensors that it holds."""

    def __init__(self, model: Path, number: int) -> None:
        from actors.engine import Engine
        from rlsys.transfer.object_store import BucketReceiver

        self.engine = Engine(model, ENGINE, "cpu", [1], name=f"{number}")
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
        self.receivers = [
            ray.remote(Receiver).options(num_cpus=0, runtime_env=engine).remote(model, n) for n in range(ACTORS)
        ]
        ray.get([receiver.hold.remote(model) for receiver in self.receivers])
        sender = ray.remote(concurrency_groups={"transfer": 2 * ACTORS})(Sender)
        plain = {"env_vars": {**variables, "OMP_NUM_THREADS": "1"}}
        self.senders = {
            transport: sender.options(num_cpus=0, runtime_env=plain).remote(
                model, WeightSyncConfig(transport=transport, bucket_mib=bucket_mib), str(model.parent / transport)
            )
            for transport in TRANSPORTS
        }
        self.bytes = 0

    def publish(self, transport: str) -> None:
        """Publish by a transport, and return when both engines have the weights."""
        self.version += 1
        sender = self.senders[transport]
        offer = WeightOffer(version=self.version, attempt=0, source=sender)
        sent = sender.send.remote(self.version)
        ray.get([receiver.receive.remote(offer) for receiver in self.receivers])
        self.bytes = ray.get(sent)

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
            for side in SIDES:  # first loads, allocations and the group of the broadcast are not counted
                sides.work(side)()
            result["bytes"] = sides.bytes
            while len(result["rounds"]) < arguments.rounds:
                seconds = {}
                for side in SIDES:
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
    lines = [f"{result['bytes'] / 1e6:.0f} MB to {ACTORS} actors, medians of {len(result['rounds'])}"]
    lines += [f"{side:13} {medians[side]:8.3f} s  {medians[side] / medians[RELOAD]:6.2f} x reload" for side in SIDES]
    return "\n".join(lines)


def ratios(result: dict[str, Any]) -> list[Ratio]:
    """Return the ratio of every transport to vLLM's reload."""
    seconds = {side: [each[side] for each in result["rounds"]] for side in SIDES}
    size, against = f"{result['bytes'] / 1e6:.0f} MB to {ACTORS} actors", "vLLM's reload from memory"
    return [
        Ratio(f"publish of {size}, {transport}", against, seconds[transport], seconds[RELOAD], "s", LIMIT, at_most=True)
        for transport in TRANSPORTS
    ]


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
