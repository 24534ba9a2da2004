"""Compare the learner with plain torch at the size of SmolLM2-135M: rows that share prompts, and memory of the logits.

`tokens` trains groups of 8 completions whose prompt is half of the row. The learner computes every prompt once; plain
torch computes every row alone, padded. Both make whole updates with the same threads, in turns, each in a process of
its own with the environment that it has in use. Tokens per second count the tokens of the rows alone. The gradients of
the first update must agree to 1e-5 of their norm. Limit: 1.5 times the tokens per second.

`memory` runs one row forward and backward: by parts of its targets, as the learner does, and with whole logits, each
round in processes of their own. It prints the peak beyond weights and gradients. The gradient norms must agree. Limit:
0.6 times the peak, with gradient checkpointing on both sides. Without it, both hold the activations of all layers;
that ratio is printed, too.

The exit code is 1 if gradients differ or, at full size, a median misses its limit. Weights and tokens are random.
`--small` shows in a minute that everything runs.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, whose actors.py would hide the package of that name
sys.path.append(str(ROOT / "benchmarks"))

from learner import OVERRIDES, plain_policy_loss, policy_items  # noqa: E402
from ratios import Ratio, keep  # noqa: E402

from learners.cpu_products import fast_products  # noqa: E402
from learners.settings import RankSettings, learner_environment  # noqa: E402
from rlsys.config.files import load_config  # noqa: E402
from rlsys.config.schema import Config, LearnerConfig  # noqa: E402
from rlsys.config.stages import StageSettings  # noqa: E402
from rlsys.types import Prompt, TrainingBatch, Trajectory, TrajectoryGroup, VersionSpan  # noqa: E402

GROUP = 8
TOLERANCE = 1e-5
RATE_LIMIT, MEMORY_LIMIT = 1.5, 0.6
Update = Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Sizes of the model and its rows, in tokens."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    row: int
    memory_row: int
    groups: int
    micro_batch: int


REAL = Size(
    hidden=576, layers=30, intermediate=1536, vocabulary=49152, row=512, memory_row=2048, groups=2, micro_batch=4096
)
SMALL = Size(
    hidden=72, layers=3, intermediate=192, vocabulary=32768, row=64, memory_row=2048, groups=2, micro_batch=512
)


def make_model(size: Size, folder: Path) -> Path:
    """Write a model with 9 heads, 3 key-value heads, a tied output layer and random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            intermediate_size=size.intermediate,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
        )
    ).save_pretrained(folder / "model")
    return folder / "model"


def make_groups(size: Size) -> list[TrajectoryGroup]:
    """Make groups whose prompts are half of every row, with rewards 0 and 1."""
    rng, half = np.random.default_rng(0), size.row // 2
    groups = []
    for _ in range(size.groups):
        prompt = rng.integers(3, size.vocabulary, half).astype(np.int32)
        completions = [rng.integers(3, size.vocabulary, size.row - half).astype(np.int32) for _ in range(GROUP)]
        trajectories = tuple(
            Trajectory(
                token_ids=np.concatenate([prompt, completion]),
                loss_mask=np.arange(size.row) >= half,
                behavior_logprobs=np.zeros(size.row, dtype=np.float32),
                versions=(VersionSpan(start=half, version=0),),
                finish_reason="stop",
                reward=float(number % 2),
                outcome="ok",
                answered=True,
            )
            for number, completion in enumerate(completions)
        )
        groups.append(
            TrajectoryGroup(prompt=Prompt(prompt_id="", token_ids=prompt, answer=""), trajectories=trajectories)
        )
    return groups


def learner_update(model: Path, size: Size, config: Config, threads: int) -> tuple[Update, dict[str, Any]]:
    """Return the update of the learner, and the gradients and tokens that it will have seen."""
    from learners.rank import LearnerRank

    settings = RankSettings(
        rank=0,
        ranks=1,
        device="cpu",
        store=str(model.parent / "store"),
        seed=0,
        pad_token_id=0,
        temperature=config.sampling.temperature,
        max_tokens=size.row,
        learner=LearnerConfig(ranks=1, zero_stage=0, threads=threads, micro_batch_tokens=size.micro_batch),
        objective=config.objective,
    )
    learner, batch = LearnerRank(settings), TrainingBatch(groups=tuple(make_groups(size)))
    stage = StageSettings(stage="online", steps=10**6, updates_per_step=1, optimizer=config.train.optimizer)
    learner.start_stage(stage, model, None, None)
    seen: dict[str, Any] = {}
    policy: Any = learner.policy
    check = policy.check_finite

    def keep_gradients() -> None:
        if "gradients" not in seen:
            named = policy.module.named_parameters()
            seen["gradients"] = {name: parameter.grad.clone() for name, parameter in named}
        check()

    policy.check_finite = keep_gradients  # at ZeRO 0, the gradients of all passes are there before it
    steps = itertools.count()

    def update() -> None:
        number = next(steps)
        seen["tokens"] = learner.train(batch, number, number + 1)["learner/tokens"]

    return update, seen


def torch_update(model: Path, size: Size, config: Config) -> tuple[Update, dict[str, Any]]:
    """Return the update of plain torch on padded rows that share nothing, and the gradients that it will have seen."""
    import torch
    from transformers import AutoModelForCausalLM

    from learners.samples.batching import collate
    from learners.samples.planning import plan_micro_batches

    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    options = config.train.optimizer
    adam = torch.optim.AdamW(
        module.parameters(),
        options.learning_rate,
        (options.beta1, options.beta2),
        options.eps,
        options.weight_decay,
        fused=True,
    )
    items, loss_tokens = policy_items(make_groups(size), config.objective)
    lengths = [item.length for item in items]
    passes = plan_micro_batches(lengths, ranks=1, budget_tokens=size.micro_batch)[0]
    seen: dict[str, Any] = {"tokens": sum(lengths)}

    def update() -> None:
        adam.zero_grad()
        for numbers in passes:
            batch = collate([items[number] for number in numbers], 0)
            (plain_policy_loss(module, batch, config.objective) / loss_tokens).backward()
        if "gradients" not in seen:
            seen["gradients"] = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
        torch.nn.utils.clip_grad_norm_(module.parameters(), options.max_grad_norm)
        adam.step()

    return update, seen


def difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return |found - expected| / |expected| over all parameters."""
    apart = sum(float((found[name] - value).double().square().sum()) for name, value in expected.items())
    return math.sqrt(apart / sum(float(value.double().square().sum()) for value in expected.values()))


def serve(pipe: Any, ours: bool, model: Path, size: Size, threads: int) -> None:
    """Make the updates of a side, in a process of its own: for each question, send its seconds and computed tokens."""
    import torch
    from safetensors.torch import save_file

    config = load_config(ROOT / "configs" / "quickstart.yaml", OVERRIDES)
    torch.set_num_threads(threads)
    if ours:
        fast_products()
        update, seen = learner_update(model, size, config, threads)
    else:
        update, seen = torch_update(model, size, config)
    while pipe.recv():
        started = time.perf_counter()
        update()
        pipe.send((time.perf_counter() - started, seen["tokens"]))
    save_file(seen["gradients"], model.parent / f"{'ours' if ours else 'theirs'}.safetensors")
    pipe.send(None)


def start_side(ours: bool, model: Path, size: Size, threads: int) -> Any:
    """Start the process of a side, in the environment that it has in use, and return a pipe to it."""
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    before, variables = dict(os.environ), {"OMP_NUM_THREADS": str(threads)}
    if ours:
        variables = learner_environment(LearnerConfig(ranks=1, threads=threads), "cpu", 0)
    os.environ.update(variables)
    spawn.Process(target=serve, args=(theirs, ours, model, size, threads), daemon=True).start()
    os.environ.clear()
    os.environ.update(before)
    theirs.close()
    return pipe


def measure_tokens(size: Size, folder: Path, rounds: int, threads: int) -> tuple[bool, Ratio]:
    """Print tokens per second of both sides. Return whether their gradients agree, and the ratio."""
    from safetensors.torch import load_file

    model = make_model(size, folder)
    names = {True: "learner, prompts once", False: "plain torch, rows alone"}
    pipes = {ours: start_side(ours, model, size, threads) for ours in names}
    seconds: dict[bool, list[float]] = {ours: [] for ours in names}
    computed = {}
    for _ in range(rounds + 1):  # the first round is a warm-up
        for ours, pipe in pipes.items():
            pipe.send(True)
            taken, computed[ours] = pipe.recv()
            seconds[ours].append(taken)
    for pipe in pipes.values():
        pipe.send(False)
        pipe.recv()
    tokens = GROUP * size.groups * size.row
    print(f"{size.groups} groups of {GROUP} rows of {size.row} tokens, half of them prompt; {threads} threads")
    print(f"{'':26}{'computed tokens':>16}{'s: min':>9}{'median':>9}{'max':>9}{'tokens/s':>10}")
    for ours, name in names.items():
        found = seconds[ours][1:]
        figures = f"{min(found):>9.2f}{statistics.median(found):>9.2f}{max(found):>9.2f}"
        print(f"{name:26}{computed[ours]:>16,.0f}{figures}{tokens / statistics.median(found):>10,.0f}")
    apart = difference(*(load_file(folder / f"{name}.safetensors") for name in ("ours", "theirs")))
    print(f"gradients differ by {apart:.1e} of their norm")
    rates = {ours: [tokens / each for each in found[1:]] for ours, found in seconds.items()}
    name = f"learner's tokens/s, groups of {GROUP}, prompts of half the row"
    ratio = Ratio(name, names[False], rates[True], rates[False], "tokens/s", RATE_LIMIT, larger_is_better=True)
    print(f"learner to plain torch: {ratio.median:.2f}")
    return apart <= TOLERANCE, ratio


@contextmanager
def peak_memory(found: dict[str, float]) -> Iterator[None]:
    """Note the largest memory of this process in the body beyond that at its start, MiB."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    yield
    found["peak"] = (memory("VmHWM") - before) / 1024


def memory(key: str) -> int:
    """Return a memory figure of this process, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def one_pass(pipe: Any, model: Path, length: int, threads: int, by_parts: bool, checkpointing: bool) -> None:
    """Run one row forward and backward in a process of its own; send the peak of memory and the gradient norm."""
    os.environ.update(learner_environment(LearnerConfig(ranks=1, threads=threads), "cpu", 0))
    import torch

    from learners.deepspeed.model import load_model
    from learners.language_model import CHUNK_LOGITS, LanguageModel

    torch.set_num_threads(threads)
    module = load_model(model, "fp32", "cpu").train()
    if checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    language_model, found = LanguageModel(module), {}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, module.config.vocab_size, (1, length), generator=generator)

    def backward(row: Any) -> None:
        targets = row[0, 1:]
        if by_parts:
            places, ones = torch.arange(len(targets)), torch.ones(len(targets))
            parts = max(1, -(-len(targets) * module.config.vocab_size // CHUNK_LOGITS))
            logprobs, *_ = language_model(row, places, targets, ones, parts=parts)
        else:
            logits = module(input_ids=row, use_cache=False).logits[0, :-1]
            logprobs = logits.log_softmax(-1).gather(-1, targets[:, None])
        logprobs.mean().backward()

    backward(ids[:, :16])  # makes the gradients
    module.zero_grad(set_to_none=False)
    with peak_memory(found):
        backward(ids)
    squares = sum(float(parameter.grad.double().square().sum()) for parameter in module.parameters())
    pipe.send({**found, "norm": math.sqrt(squares)})


def peak_of(model: Path, size: Size, threads: int, by_parts: bool, checkpointing: bool) -> dict[str, float]:
    """Return the peak memory and the gradient norm of one row in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=one_pass, args=(theirs, model, size.memory_row, threads, by_parts, checkpointing))
    process.start()
    theirs.close()
    try:
        found: dict[str, float] = pipe.recv()
    except EOFError:
        raise SystemExit("the process of one pass ended") from None
    process.join()
    return found


def measure_memory(size: Size, folder: Path, rounds: int, threads: int) -> tuple[bool, Ratio]:
    """Print the peak memory by parts and with whole logits. Return whether the gradients agree, and the ratio."""
    model, agrees = make_model(size, folder), True
    sides = list(itertools.product((True, False), repeat=2))  # gradient checkpointing, by parts
    peaks: dict[tuple[bool, bool], list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        found = {side: peak_of(model, size, threads, side[1], side[0]) for side in sides}
        norms = [figures["norm"] for figures in found.values()]
        agrees = agrees and all(math.isclose(norm, norms[0], rel_tol=TOLERANCE) for norm in norms)
        for side, figures in found.items():
            peaks[side].append(figures["peak"])
    logits = size.memory_row * size.vocabulary * 4 / 2**20
    print(f"one row of {size.memory_row} tokens, {logits:,.0f} MiB of logits; MiB beyond weights and gradients:")
    for checkpointing in (True, False):
        ours, whole = (statistics.median(peaks[checkpointing, by_parts]) for by_parts in (True, False))
        name = f"{'with' if checkpointing else 'without'} gradient checkpointing"
        print(f"{name:30} by parts {ours:>7,.0f}, whole logits {whole:>7,.0f}, ratio {ours / whole:.2f}")
    name = f"learner's peak memory, one row of {size.memory_row:,} tokens, gradient checkpointing on both sides"
    return agrees, Ratio(name, "whole logits", peaks[True, True], peaks[True, False], "MiB", MEMORY_LIMIT, at_most=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("figure", choices=("tokens", "memory"))
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of every side")
    parser.add_argument("--threads", type=int, default=2, help="threads of every side")
    parser.add_argument("--small", action="store_true", help="a small model and short rows")
    parser.add_argument("--json", type=Path, help="file that keeps the ratio")
    arguments = parser.parse_args()
    size = SMALL if arguments.small else REAL
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        measure = measure_memory if arguments.figure == "memory" else measure_tokens
        agrees, ratio = measure(size, Path(folder), arguments.rounds, arguments.threads)
    if not agrees:
        print(f"the gradients differ by more than {TOLERANCE:g}")
        return 1
    if arguments.json:
        keep(arguments.json, [ratio])
    return 0 if arguments.small or ratio.met else 1


if __name__ == "__main__":
    sys.exit(main())
