"""Compare generated tokens/s of the rollout actors and of bare vLLM engines with the same requests.

Our side is the whole path of a training step's rollouts: `Fleet.generate` on two Ray actors, with verifiers, group
building and the transfer to the driver. The driver measures the time from the call to the last group. The peer is two
plain processes with one bare `LLMEngine` each, built with the same arguments and stepped in a loop. Its time excludes
the making of requests and the reading of results. Every round has new prompts, so both sides start with cold caches.
The sides take turns, and both must sample the same tokens. The exit code is 1 if the median ratio is below the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where this file would hide the package `actors`
sys.path.append(str(ROOT / "benchmarks"))

from ratios import Ratio, keep, table  # noqa: E402

from rlsys.config.files import load_config  # noqa: E402
from rlsys.config.schema import ActorsConfig, Config  # noqa: E402
from rlsys.data.inputs import Inputs, prepare_model  # noqa: E402
from rlsys.models.folder import ModelFolder  # noqa: E402
from rlsys.processes import die_with_parent, quiet_worker  # noqa: E402
from rlsys.types import Prompt, SamplingSettings, TrajectoryGroup  # noqa: E402

LIMIT = 0.95
Tokens = list[list[int]]  # of every completion, in order of prompt and sample
Round = tuple[float, list[Tokens]]  # seconds, tokens by actor


def serve_bare(pipe: Any, model: Path, config: ActorsConfig, log: Path) -> None:
    """Run a bare engine in this process. It answers a list of requests with (start, end, tokens of each request)."""
    quiet_worker(str(log))
    die_with_parent()
    from actors.engine_build import build_engine, engine_environment

    os.environ.update(engine_environment(config, "cpu"))  # before vllm is imported
    engine = build_engine(model, config, "cpu", stop_strings=False)
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    pipe.send(None)
    while received := pipe.recv():
        requests, end_token = received
        prepared = []
        for request in requests:
            params = SamplingParams(
                temperature=request.temperature,
                top_p=request.top_p,
                max_tokens=request.max_tokens,
                seed=request.seed,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                stop_token_ids=[end_token],
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prepared.append((request.request_id, {"prompt_token_ids": list(request.token_ids)}, params))
        pipe.send(None)
        pipe.recv()  # the start signal, sent to both processes at once
        started = time.perf_counter()
        for request_id, prompt, params in prepared:
            engine.add_request(request_id, prompt, params)
        outputs: dict[str, Any] = {}
        while engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in engine.step() if output.finished}
        ended = time.perf_counter()
        pipe.send((started, ended, [list(outputs[name].outputs[0].token_ids) for name, *_ in prepared]))


class BareEngines:
    """The peer: one bare engine for every actor."""

    def __init__(self, model: Path, config: Config, folder: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.end_token = ModelFolder(model).end_token_ids[0]
        self.logs = [folder / f"bare-{number}.log" for number in range(config.actors.count)]
        self.pipes = []
        for log in self.logs:
            pipe, theirs = spawn.Pipe()
            spawn.Process(target=serve_bare, args=(theirs, model, config.actors, log), daemon=True).start()
            theirs.close()
            self.pipes.append(pipe)
        self._receive()

    def round(self, parts: Sequence[Sequence[Prompt]], settings: SamplingSettings) -> Round:
        """Return the seconds from the first start to the last end, measured in the processes, and the tokens."""
        from actors.rollouts.single_turn import completion_requests

        for pipe, part in zip(self.pipes, parts, strict=True):
            requests = [request for prompt in part for request in completion_requests(prompt, settings)]
            pipe.send((requests, self.end_token))
        self._receive()
        for pipe in self.pipes:
            pipe.send(True)
        starts, ends, tokens = zip(*self._receive(), strict=True)
        return max(ends) - min(starts), list(tokens)

    def _receive(self) -> list[Any]:
        try:
            return [pipe.recv() for pipe in self.pipes]
        except EOFError:
            raise SystemExit("\n".join(log.read_text()[-2000:] for log in self.logs)) from None


async def ours(pool: Any, parts: Sequence[Sequence[Prompt]], settings: SamplingSettings) -> Round:
    """Return the seconds until the driver has every group, and the tokens."""
    started = time.perf_counter()
    answers = await asyncio.gather(*(pool.generate(actor, part, settings) for actor, part in enumerate(parts)))
    seconds = time.perf_counter() - started
    return seconds, [[ids for group in answer for ids in _tokens(group)] for answer in answers]


def _tokens(group: Any) -> Iterator[list[int]]:
    if not isinstance(group, TrajectoryGroup):
        raise SystemExit(f"a rollout failed: {group.reason}")
    for trajectory in group.trajectories:
        yield trajectory.token_ids[len(group.prompt.token_ids) :].tolist()


async def measure(config: Config, model: Path, folder: Path, rounds: int) -> list[tuple[int, float, float]]:
    """Return (tokens, our seconds, the peer's seconds) of every round. A warm-up round comes first."""
    from rlsys.launch.placement import place
    from rlsys.launch.ray_cluster import ray_cluster
    from rlsys.launch.start import rollout_pool

    stream = Inputs(config, ModelFolder(model)).prompts
    sampling, train, count = config.sampling, config.train, config.actors.count
    settings = SamplingSettings(
        samples=train.group_size,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        seed=config.run.seed,
    )
    bare = BareEngines(model, config, folder)
    found = []
    with ray_cluster(config, folder, place(config).bundles) as cluster:
        async with rollout_pool(cluster, model) as pool:
            for _ in range(1 + rounds):
                prompts = [stream.take()[1] for _ in range(train.groups_per_step)]
                parts = [prompts[actor::count] for actor in range(count)]
                seconds, tokens = await ours(pool, parts, settings)
                bare_seconds, bare_tokens = bare.round(parts, settings)
                if tokens != bare_tokens:
                    raise SystemExit("the actors and the bare engines did not sample the same tokens")
                total = sum(len(ids) for part in tokens for ids in part)
                found.append((total, seconds, bare_seconds))
    return found[1:]


def as_ratio(found: list[tuple[int, float, float]], size: str) -> Ratio:
    """Return the rates of both sides, round by round."""
    ours, peer = ([row[0] / row[position] for row in found] for position in (1, 2))
    name = f"actors' generated tokens/s, {size}"
    return Ratio(name, "bare vLLM engines", ours, peer, "tokens/s", LIMIT, larger_is_better=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Actors' generated tokens/s against bare vLLM engines.")
    parser.add_argument("--rounds", type=int, default=9, help="number of timed rounds of each side")
    parser.add_argument("--prompts", type=int, default=64, help="number of prompts of a round")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--policy", type=Path, help="policy folder of a run; by default the untrained model")
    parser.add_argument("--name", default="1M", help="size of the model, for the table")
    parser.add_argument("--json", type=Path, help="also keep the ratio in this file")
    parser.add_argument("overrides", nargs="*", help="overrides of the config")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [f"train.groups_per_step={arguments.prompts}", *arguments.overrides]
        config = load_config(arguments.config, overrides)
        model = arguments.policy.absolute() if arguments.policy else prepare_model(config, folder).path
        found = asyncio.run(measure(config, model, folder, arguments.rounds))
    tokens = sum(row[0] for row in found) / len(found)
    size, actors = config.train.group_size, config.actors.count
    print(f"{arguments.prompts} prompts x {size} completions per round, {tokens:,.0f} tokens, {actors} actors")
    ratio = as_ratio(found, arguments.name)
    print(table([ratio]))
    if arguments.json:
        keep(arguments.json, [ratio])
    return int(not ratio.met)


if __name__ == "__main__":
    sys.exit(main())
