"""Solved fraction against generated tokens per prompt: tree search with and without backtracking, independent samples.

Every arm has the same policy, the same held-out prompts and the same sampling temperature. A search, or a row of
samples, ends at its first right answer or at the largest budget: what follows would change nothing. All generated
tokens of a prompt count; what the search itself puts into a chain (opening tags, prefixes) is not generated. A seed
draws its own problems, and its own tokens for them; the policy is one. There is no limit: the table is the result.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`

from rlsys.config.engine_roles import Searching  # noqa: E402
from rlsys.config.files import load_config  # noqa: E402
from rlsys.config.schema import Config  # noqa: E402
from rlsys.control.search_evaluation import grow_trees, sample_until, sampling_of  # noqa: E402
from rlsys.data.inputs import Inputs  # noqa: E402
from rlsys.launch.placement import place  # noqa: E402
from rlsys.launch.ray_cluster import Cluster, ray_cluster  # noqa: E402
from rlsys.models.folder import ModelFolder  # noqa: E402
from rlsys.search.compare import Attempts, solved_in_tokens, tree_attempts  # noqa: E402
from rlsys.stats import Estimate, mean_difference, mean_over_prompts  # noqa: E402
from rlsys.types import Prompt  # noqa: E402

BUDGETS = (32, 48, 64, 96, 128, 192, 256, 384, 512)
SAMPLES = "independent samples"
ARMS = {
    f"{expansion} expansion, {'' if backtracking else 'no '}backtracking": (expansion, backtracking)
    for expansion, backtracking in product(("chain", "node"), (True, False))
}
TABLES = {"chain": "chain", "node": "narrow"}  # of the config
POLICY = Path("runs/quickstart/stages/warm_start")
OWN_RUN = Path("runs/search_use")
PAGE, PICTURE = Path("docs/search_use.md"), Path("docs/search_use.png")
Solved = Mapping[str, np.ndarray]  # by arm: [seeds, prompts, budgets] bool


def find_policy(given: Path | None) -> Path:
    """A given policy, that of the quickstart, or a warm start of its own: of that one, in another folder, since the
    quickstart could not continue from a run without its second stage."""
    if given is not None or POLICY.is_dir():
        return (given or POLICY).absolute()
    own = OWN_RUN / "stages" / "warm_start"
    if not own.is_dir():
        command = ["train", "configs/quickstart.yaml", "stages=[warm_start]", f"run.dir={OWN_RUN}"]
        subprocess.run([Path(sys.executable).parent / "rlsys", *command], check=True)
    return own.absolute()


def config_of(policy: Path, expansion: str, backtracking: bool) -> Config:
    """One arm. Simulations never bind: nearly all of them generate something."""
    stop = f"{{simulations: {max(BUDGETS)}, tokens: {max(BUDGETS)}, correct: [{{count: 1}}]}}"
    return load_config(
        ROOT / "configs" / "search_letter_count.yaml",
        [
            f"model.path={policy}",
            "evaluation.search_answers=4",  # samples of one dispatch; more are drawn where they are needed
            f"search.expansion={expansion}",
            f"search.patterns=[{TABLES[expansion]}]",
            f"search.backtracking={str(backtracking).lower()}",
            f"search.stop={stop}",
            "search.parallel_simulations=1",  # each knows what all before it have found
        ],
    )


def prompts_of(config: Config, policy: Path, seed: int, count: int) -> list[Prompt]:
    """Held-out prompts that a seed draws. Their ids, which every token's seed is made of, name the seed too."""
    evaluation = config.evaluation.model_copy(update={"prompts": count})
    run = config.run.model_copy(update={"seed": seed})
    own = config.model_copy(update={"run": run, "evaluation": evaluation})
    prompts = Inputs(own, ModelFolder(policy), training=False).held_out
    return [replace(prompt, prompt_id=f"seed-{seed}/{prompt.prompt_id}") for prompt in prompts]


async def measure(policy: Path, seeds: int, count: int, folder: Path) -> dict[str, list[Attempts]]:
    """Attempts of every arm, seed by seed."""
    configs = {name: config_of(policy, *arm) for name, arm in ARMS.items()}
    first = next(iter(configs.values()))
    prompts = [prompt for seed in range(seeds) for prompt in prompts_of(first, policy, seed, count)]
    found: dict[str, list[Attempts]] = {}
    with ray_cluster(first, folder, place(first).bundles) as cluster:
        for name, config in configs.items():
            found |= await attempts_of(name, replace(cluster, config=config), policy, prompts, sample=config is first)
    return found


async def attempts_of(
    name: str, cluster: Cluster, policy: Path, prompts: Sequence[Prompt], *, sample: bool
) -> dict[str, list[Attempts]]:
    """Attempts of an arm and, where asked to, of independent samples.

    A function of its own: Ray gives the place of the actors free once nothing here holds their handles.
    """
    from rlsys.launch.start import rollout_pool

    config = cluster.config
    async with rollout_pool(cluster, policy, Searching()) as pool:
        started = time.perf_counter()
        found = {name: [tree_attempts(tree) for tree in await grow_trees(pool, prompts, config)]}
        report(name, found[name], started)
        if sample:
            started, limit = time.perf_counter(), config.train.max_verifier_failures
            found[SAMPLES] = await sample_until(pool, prompts, sampling_of(config), is_enough, limit)
            report(SAMPLES, found[SAMPLES], started)
    return found


def is_enough(samples: Attempts) -> bool:
    return bool(samples.right.any()) or samples.total >= max(BUDGETS)


def report(name: str, attempts: Sequence[Attempts], started: float) -> None:
    seconds, tokens = time.perf_counter() - started, sum(found.total for found in attempts)
    print(f"{name}: {tokens:,} tokens in {seconds:.0f} s", file=sys.stderr)


def tables(solved: Solved, ended: Mapping[str, float]) -> str:
    """The figures as Markdown. ended: of every search, see the last line."""
    seeds, prompts, _ = solved[SAMPLES].shape
    lines = [
        f"Solved fraction (95 % interval over {seeds * prompts} prompts; lowest to highest of {seeds} seeds):",
        "",
        *_table(solved, lambda name, i: _share(solved[name][:, :, i])),
        "",
        "Search minus independent samples, paired by prompt (95 % interval):",
        "",
        *_table(ended, lambda name, i: _difference(solved[name][:, :, i], solved[SAMPLES][:, :, i])),
        "",
        f"Share of the searches that ended unsolved before {max(BUDGETS)} tokens, as nothing was left to search: "
        + "; ".join(f"{name} {share:.3f}" for name, share in ended.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def _table(names: Mapping[str, object], cell: Callable[[str, int], str]) -> list[str]:
    rows = [f"| {budget} | " + " | ".join(cell(name, i) for name in names) + " |" for i, budget in enumerate(BUDGETS)]
    return ["| tokens | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|", *rows]


def _share(solved: np.ndarray) -> str:
    of_seeds = solved.mean(axis=1)
    return f"{_interval(mean_over_prompts(solved.reshape(-1, 1)))[:-1]}; {of_seeds.min():.3f} to {of_seeds.max():.3f})"


def _difference(search: np.ndarray, samples: np.ndarray) -> str:
    return _interval(mean_difference(search.ravel(), samples.ravel()), "+")


def _interval(found: Estimate, sign: str = "") -> str:
    return f"{found.mean:{sign}.3f} ({found.low:{sign}.3f} to {found.high:{sign}.3f})"


def page(figures: str, config: Config, seeds: int, prompts: int) -> str:
    """What was measured, and how."""
    settings = sampling_of(config)
    paragraph = (
        "The policy is the warm start of `configs/quickstart.yaml`, the search is the section `search` of "
        "`configs/search_letter_count.yaml` (for node expansion with the table `narrow`), one simulation of a tree at "
        "a time, with other stop rules: a search ends at its first right answer or at the largest budget, and so do "
        "independent samples of the policy, which are taken in their order. Temperature "
        f"{settings.temperature:g} and top_p {settings.top_p:g} for both; a chain has at most {settings.max_tokens} "
        f"tokens. Each of {seeds} seeds draws {prompts} held-out problems, and its own tokens for them; the policy is "
        "the same. All tokens that were generated for a prompt before its answer count, those of discarded branches "
        "and duplicates too, in the order in which the search asked for them; opening tags and prefixes that the "
        "search puts there itself, and prompts, do not."
    )
    return f"""# Solved fraction against generated tokens

As measured by `python benchmarks/search_use.py --prompts {prompts} --seeds {seeds} --write`.

{paragraph}

![solved fraction against generated tokens]({PICTURE.name})

{figures}"""


def plot(solved: Solved) -> None:
    """Means of the seeds as lines, from the lowest to the highest seed as bands."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, values in solved.items():
        of_seeds = values.mean(axis=1)
        [line] = axes.plot(BUDGETS, of_seeds.mean(axis=0), "k--" if name == SAMPLES else "-o", label=name, markersize=3)
        axes.fill_between(BUDGETS, of_seeds.min(axis=0), of_seeds.max(axis=0), color=line.get_color(), alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
    axes.set(xlabel="generated tokens per prompt", ylabel="solved at least once", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description="Solved fraction against tokens: tree search, independent samples.")
    parser.add_argument("--policy", type=Path, help=f"policy folder; by default {POLICY}, or a warm start made for it")
    parser.add_argument("--prompts", type=int, default=512, help="held-out prompts of a seed")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE} and {PICTURE}")
    arguments = parser.parse_args()
    policy, started = find_policy(arguments.policy), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(policy, arguments.seeds, arguments.prompts, Path(folder)))
    shape = (arguments.seeds, arguments.prompts, len(BUDGETS))
    solved = {name: solved_in_tokens(found[name], BUDGETS).reshape(shape) for name in (*ARMS, SAMPLES)}
    ended = {name: ended_unsolved(found[name]) for name in ARMS}
    figures = tables(solved, ended)
    print(figures)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    if arguments.write:
        config = config_of(policy, *next(iter(ARMS.values())))
        plot(solved)
        PAGE.write_text(page(figures, config, arguments.seeds, arguments.prompts), encoding="utf-8")
    return 0


def ended_unsolved(attempts: Sequence[Attempts]) -> float:
    return float(np.mean([not found.right.any() and found.total < max(BUDGETS) for found in attempts]))


if __name__ == "__main__":
    sys.exit(main())
