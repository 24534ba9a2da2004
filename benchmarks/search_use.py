"""Solved fraction against generated tokens per prompt: tree searches and independent samples.

Every arm has the same policy, the same held-out prompts and the same sampling temperature. A search, or a sequence of
samples, ends at its first right answer or at the largest budget, because later tokens cannot change the result. All
generated tokens of a prompt count. Opening tags and prefixes that the search puts into a chain are not generated. Every
seed has different problems and different random draws; the policy is the same. There is no limit to meet: the table is
the result.
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
TABLES = {"chain": "chain", "node": "narrow"}  # of the config
ARMS = {
    f"{expansion} expansion, {'' if backtracking else 'no '}backtracking": [
        f"search.expansion={expansion}",
        f"search.patterns=[{TABLES[expansion]}]",
        f"search.backtracking={str(backtracking).lower()}",
    ]
    for expansion, backtracking in product(("chain", "node"), (True, False))
} | {
    f"surprise, {unit}": [f"search.selection={{type: surprise, unit: {unit}}}", "search.backtracking=false"]
    for unit in ("token", "node")
}
POLICY = Path("runs/quickstart/stages/warm_start")
OWN_RUN = Path("runs/search_use")
PAGE, PICTURE = Path("docs/search_use.md"), Path("docs/search_use.png")
Solved = Mapping[str, np.ndarray]  # by arm: [seeds, prompts, budgets] bool


def find_policy(given: Path | None) -> Path:
    """Return the given policy, that of the quickstart, or a new warm start of the quickstart's config.

    The new warm start has a separate folder, because the quickstart cannot continue a run without its second stage.
    """
    if given is not None or POLICY.is_dir():
        return (given or POLICY).absolute()
    own = OWN_RUN / "stages" / "warm_start"
    if not own.is_dir():
        command = ["train", "configs/quickstart.yaml", "stages=[warm_start]", f"run.dir={OWN_RUN}"]
        subprocess.run([Path(sys.executable).parent / "rlsys", *command], check=True)
    return own.absolute()


def config_of(policy: Path, arm: Sequence[str]) -> Config:
    """Return the config of an arm. The limit of simulations is never reached, as nearly all of them generate tokens."""
    stop = f"{{simulations: {max(BUDGETS)}, tokens: {max(BUDGETS)}, correct: [{{count: 1}}]}}"
    return load_config(
        ROOT / "configs" / "search_letter_count.yaml",
        [
            f"model.path={policy}",
            "evaluation.search_answers=4",  # samples of one dispatch; unsolved prompts get more
            f"search.stop={stop}",
            "search.parallel_simulations=1",  # each knows the results of all earlier ones
            *arm,
        ],
    )


def prompts_of(config: Config, policy: Path, seed: int, count: int) -> list[Prompt]:
    """Return the held-out prompts of a seed. Their ids include the seed, because the ids seed the sampling."""
    evaluation = config.evaluation.model_copy(update={"prompts": count})
    run = config.run.model_copy(update={"seed": seed})
    own = config.model_copy(update={"run": run, "evaluation": evaluation})
    prompts = Inputs(own, ModelFolder(policy), training=False).held_out
    return [replace(prompt, prompt_id=f"seed-{seed}/{prompt.prompt_id}") for prompt in prompts]


async def measure(policy: Path, seeds: int, count: int, folder: Path) -> dict[str, list[Attempts]]:
    """Return the attempts of every arm, seed by seed."""
    configs = {name: config_of(policy, arm) for name, arm in ARMS.items()}
    first = next(iter(configs.values()))
    prompts = [prompt for seed in range(seeds) for prompt in prompts_of(first, policy, seed, count)]
    attempts: dict[str, list[Attempts]] = {}
    with ray_cluster(first, folder, place(first).bundles) as cluster:
        for name, config in configs.items():
            own = replace(cluster, config=config)
            attempts |= await attempts_of(name, own, policy, prompts, sample=config is first)
    return attempts


async def attempts_of(
    name: str, cluster: Cluster, policy: Path, prompts: Sequence[Prompt], *, sample: bool
) -> dict[str, list[Attempts]]:
    """Return the attempts of an arm and, if `sample`, of independent samples.

    This is a separate function because Ray frees the resources of the actors once nothing holds their handles.
    """
    from rlsys.launch.start import rollout_pool

    config = cluster.config
    async with rollout_pool(cluster, policy, Searching()) as pool:
        started = time.perf_counter()
        attempts = {name: [tree_attempts(tree) for tree in await grow_trees(pool, prompts, config)]}
        report(name, attempts[name], started)
        if sample:
            started, limit = time.perf_counter(), config.train.max_verifier_failures
            attempts[SAMPLES] = await sample_until(pool, prompts, sampling_of(config), is_enough, limit)
            report(SAMPLES, attempts[SAMPLES], started)
    return attempts


def is_enough(samples: Attempts) -> bool:
    return bool(samples.right.any()) or samples.total >= max(BUDGETS)


def report(name: str, attempts: Sequence[Attempts], started: float) -> None:
    seconds, tokens = time.perf_counter() - started, sum(attempt.total for attempt in attempts)
    print(f"{name}: {tokens:,} tokens in {seconds:.0f} s", file=sys.stderr)


def tables(solved: Solved, ended: Mapping[str, float]) -> str:
    """Return the figures as Markdown. `ended` has the share of early ended searches by arm, for the last line."""
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
        f"Share of the searches that ended unsolved before {max(BUDGETS)} tokens because nothing was left to search: "
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


def _interval(estimate: Estimate, sign: str = "") -> str:
    return f"{estimate.mean:{sign}.3f} ({estimate.low:{sign}.3f} to {estimate.high:{sign}.3f})"


def page(figures: str, config: Config, seeds: int, prompts: int) -> str:
    """Return the page: the method and the figures."""
    settings = sampling_of(config)
    paragraph = (
        "The policy is the warm start of `configs/quickstart.yaml`. The search has the settings of the section "
        "`search` of `configs/search_letter_count.yaml` (node expansion has the table `narrow`; surprise has the "
        "selection `{type: surprise}` without backtracking), except that a tree "
        "runs one simulation at a time and ends at its first right answer or at the largest budget. Independent "
        "samples of the policy are drawn one after the other and end in the same way. Both have temperature "
        f"{settings.temperature:g} and top_p {settings.top_p:g}; a chain has at most {settings.max_tokens} "
        f"tokens. Each of {seeds} seeds has {prompts} held-out problems and different random draws; the policy is "
        "the same. All tokens that were generated for a prompt before its right answer count, in the order in which "
        "the search requested them. This includes discarded branches and duplicates. Prompts, and the opening tags "
        "and prefixes that the search puts into a chain, do not count."
    )
    return f"""# Solved fraction against generated tokens

As measured by `python benchmarks/search_use.py --prompts {prompts} --seeds {seeds} --write`.

{paragraph}

![solved fraction against generated tokens]({PICTURE.name})

{figures}"""


def plot(solved: Solved) -> None:
    """Draw the mean of the seeds as a line, and the range of the seeds as a band."""
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
    parser.add_argument("--policy", type=Path, help=f"policy folder; by default {POLICY}, or a new warm start")
    parser.add_argument("--prompts", type=int, default=512, help="number of held-out prompts of a seed")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE} and {PICTURE}")
    arguments = parser.parse_args()
    policy, started = find_policy(arguments.policy), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        attempts = asyncio.run(measure(policy, arguments.seeds, arguments.prompts, Path(folder)))
    shape = (arguments.seeds, arguments.prompts, len(BUDGETS))
    solved = {name: solved_in_tokens(attempts[name], BUDGETS).reshape(shape) for name in (*ARMS, SAMPLES)}
    ended = {name: ended_unsolved(attempts[name]) for name in ARMS}
    figures = tables(solved, ended)
    print(figures)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    if arguments.write:
        config = config_of(policy, next(iter(ARMS.values())))
        plot(solved)
        PAGE.write_text(page(figures, config, arguments.seeds, arguments.prompts), encoding="utf-8")
    return 0


def ended_unsolved(attempts: Sequence[Attempts]) -> float:
    return float(np.mean([not each.right.any() and each.total < max(BUDGETS) for each in attempts]))


if __name__ == "__main__":
    sys.exit(main())
