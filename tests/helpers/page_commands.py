"""How the tests run the commands of the documentation: what is smaller here, what must be seen, what cannot run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a command is run, and what must be seen.

    Attributes:
        prints: texts that stand in its output, beside those that the page prints.
        writes: files that exist afterwards, and not before.
        adds: arguments for a smaller run, appended to it.
        values: what stands here for the names in capitals, such as RUN and FOLDER.
        serves: the command is a server. Text of its output after which it is up; then it is asked, and interrupted.
        asks: a command for the time while it serves, and text of its answer.
        varies: beginnings of lines that the page prints and other processors print differently.
    """

    prints: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    adds: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    serves: str = ""
    asks: tuple[str, str] = ("true", "")
    varies: tuple[str, ...] = ()


ONE_STEP = "train.max_steps=1 train.groups_per_step=8 evaluation.prompts=8"
SMALL = f"warm_start.max_steps=4 {ONE_STEP}"
FINISHED = ("run directory: ", "held-out: greedy accuracy ")
PAGE_PORT, MODEL_PORT = 16007, 18000
VIEW = f"http://127.0.0.1:{PAGE_PORT}/"
CHAT = (
    f"curl -sS http://127.0.0.1:{MODEL_PORT}/v1/chat/completions -H 'Content-Type: application/json' "
    """-d '{"model": "%s", "temperature": 0, "messages": [{"role": "user", "content": "count b in abcab"}]}'"""
)
UP = "Application startup complete"
NEEDS_QUICKSTART = {
    "README.md",
    "docs/evaluation.md",
    "docs/export.md",
    "docs/methods.md",
    "docs/search.md",
    "docs/view.md",
}
"""Pages whose commands read `runs/quickstart`. All others begin in a folder without it."""

BEFORE = {
    "docs/export.md": [
        "rlsys train configs/quickstart_lora.yaml train.max_steps=1 train.groups_per_step=8 evaluation.prompts=8",
        "rlsys export runs/quickstart_lora --output adapter --adapter",
    ],
    "docs/tasks.md": ["""echo '{"problem": "What is 2 + 3?", "answer": "5"}' > math500.jsonl"""],
    "docs/view.md": ["cp -r runs/quickstart runs/other"],
}
"""Commands that a page takes for granted."""

_SMALL_MATH = (
    "task.path=math500.jsonl 'model={from_scratch: {hidden_size: 64, layers: 1, heads: 2}}' "
    "actors.max_model_len=256 sampling.max_tokens=64 train.group_size=2"
)
RUNS: dict[str, dict[str, Run]] = {
    "README.md": {
        "make quickstart": Run(),
        "rlsys export runs/quickstart": Run(writes=("letter-counter/README.md", "letter-counter/config.json")),
        "source .venv/bin/activate": Run(adds="&& type deactivate", prints=("deactivate is a function",)),
        "rlsys show runs/quickstart": Run(prints=("rollouts of step 10", "reward 0")),
        "rlsys view runs/quickstart": Run(adds=f"--port {PAGE_PORT}", serves=VIEW, asks=(f"curl -sS {VIEW}", "<html")),
        "tensorboard": Run(adds="--port 16006", serves="http://localhost:16006/"),
        "python -m vllm.entrypoints.openai.api_server": Run(
            adds=f"--port {MODEL_PORT}", serves=UP, asks=(CHAT % "letter-counter", "<answer>2</answer>")
        ),
        "rlsys evaluate runs/quickstart": Run(
            adds="evaluation.prompts=64", prints=("greedy accuracy", "sampled accuracy")
        ),
    },
    "docs/environments.md": {
        "rlsys train configs/sums_calculator.yaml 'stages=[warm_start]'": Run(
            adds="run.dir=runs/short warm_start.max_steps=4", prints=("run directory: ",)
        ),
        "rlsys train configs/sums_calculator.yaml": Run(adds=ONE_STEP, prints=FINISHED),
        "rlsys search": Run(adds="search.prompts=8", prints=("scored answers",)),
        "rlsys show": Run(prints=("environment, value",)),
        "rlsys train configs/search_sums_calculator.yaml": Run(adds=ONE_STEP, prints=FINISHED),
        "rlsys train configs/guess.yaml": Run(adds=SMALL, prints=FINISHED),
    },
    "docs/evaluation.md": {
        "rlsys evaluate runs/quickstart/stages/warm_start runs/quickstart": Run(
            writes=("evaluation.json", "evaluation.png"), varies=("  held_out-",)
        ),
    },
    "docs/export.md": {
        "rlsys export RUN": Run(
            values={"RUN": "runs/quickstart", "FOLDER": "exported"},
            writes=("exported/README.md", "exported/model.safetensors", "exported/generation_config.json"),
        ),
        "vllm serve BASE": Run(
            adds=f"--port {MODEL_PORT}",
            values={"BASE": "runs/quickstart/stages/warm_start", "FOLDER": "adapter"},
            serves=UP,
            asks=(CHAT % "policy", "<answer>2</answer>"),
        ),
    },
    "docs/guide.md": {
        "python make_data.py": Run(writes=("additions.jsonl",)),
        "rlsys check additions.yaml run.dir=runs/brief": Run(prints=("brevity -",)),
        "rlsys check additions.yaml run.dir=runs/tries": Run(prints=("reply of the environment to the turn",)),
        "rlsys check additions.yaml": Run(
            prints=("task.path: 100 of 3800 training rows left out: their questions are held out",)
        ),
        "rlsys train additions.yaml run.dir=runs/brief": Run(prints=("online 4/4",)),
        "rlsys train additions.yaml run.dir=runs/tries": Run(
            prints=("environment second_try.py:second_try", "online 4/4")
        ),
        "rlsys train additions.yaml": Run(),
        "rlsys status": Run(prints=("finished: all steps are made",)),
        "rlsys show": Run(prints=("rollouts of step 4",)),
        "rlsys evaluate": Run(prints=("difference to A",), writes=("comparison.json",)),
        "rlsys export": Run(writes=("adder/config.json", "adder/README.md")),
    },
    "docs/methods.md": {
        "rlsys train configs/joint_hard_letter_count.yaml": Run(
            adds=SMALL, values={"TEACHER": "runs/quickstart/stages/online"}, prints=FINISHED
        ),
    },
    "docs/models.md": {
        "python benchmarks/arithmetic.py": Run(writes=("runs/data/arithmetic/train.jsonl",)),
    },
    "docs/search.md": {
        "rlsys search": Run(adds="search.prompts=8", prints=("scored answers",)),
        "rlsys show": Run(prints=("thinking", "answer")),
        "rlsys view": Run(adds=f"--port {PAGE_PORT}", serves=VIEW, asks=(f"curl -sS {VIEW}", "<html")),
        "rlsys score": Run(values={"TEACHER": "runs/quickstart/stages/online"}, prints=("scores.jsonl",)),
        "rlsys extract": Run(writes=("runs/search_letter_count/data/README.md",)),
        "rlsys train": Run(values={"CONFIG": "configs/joint_online.yaml"}, adds=SMALL, prints=FINISHED),
        "rlsys evaluate": Run(adds="evaluation.prompts=8", prints=("ended: share of the searches",)),
    },
    "docs/tasks.md": {
        "rlsys check math.yaml": Run(adds=_SMALL_MATH, prints=("What is 2 + 3?",)),
        "rlsys train math.yaml": Run(adds=f"{_SMALL_MATH} {SMALL}", prints=FINISHED),
    },
    "docs/view.md": {
        "rlsys view RUN --export page.html": Run(values={"RUN": "runs/quickstart"}, writes=("page.html",)),
        "rlsys view RUN OTHER_RUN": Run(
            values={"RUN": "runs/quickstart", "OTHER_RUN": "runs/other"},
            adds=f"--port {PAGE_PORT}",
            serves=VIEW,
            asks=(f"curl -sS {VIEW}", "<html"),
        ),
        "rlsys view RUN": Run(
            values={"RUN": "runs/quickstart"},
            adds=f"--port {PAGE_PORT}",
            serves=VIEW,
            asks=(f"curl -sS {VIEW}", "<html"),
        ),
        "rlsys show RUN --step 40": Run(values={"RUN": "runs/quickstart"}, prints=("rollouts of step 40",)),
        "rlsys show RUN --pick wrong": Run(values={"RUN": "runs/quickstart"}, prints=("that are not right",)),
        "rlsys show RUN": Run(values={"RUN": "runs/quickstart"}, prints=("rollouts of step 60",)),
    },
}
"""By page and beginning of the command; the first that fits counts."""

_CLUSTER = "needs a Ray cluster; tests/integration/test_two_nodes.py trains on two nodes of one machine"
_TESTS = "runs the tests, of which this is one"
NOT_RUN: dict[str, dict[str, str]] = {
    "README.md": {
        "hf upload": "needs an account of the hub",
        "make test": _TESTS,
        "make lint": "checks the code, not the documentation",
    },
    "CONTRIBUTING.md": {
        "make install": "downloads the packages of the lock file",
        "make test": _TESTS,
        "make lint": "checks the code, not the documentation",
    },
    "docs/clusters.md": dict.fromkeys(("umask", "ray ", "export ", "rlsys check", "rlsys train"), _CLUSTER),
    "docs/export.md": {"python convert_": "needs the sources of llama.cpp"},
    "docs/models.md": {
        "python benchmarks/real_model.py": "downloads a package of 93 MB",
        "rlsys train configs/smollm2_arithmetic.yaml": "takes 45 minutes and 8 GiB",
    },
    "docs/tasks.md": {"rlsys evaluate": "reads GSM8K from the hub"},
    "docs/reliability.md": {"rlsys train config.yaml": "needs Slurm"},
}
"""Commands that no test runs, by page and beginning, with the reason."""


def run_of(page: str, command: str) -> Run | None:
    return next((run for begin, run in RUNS.get(page, {}).items() if command.startswith(begin)), None)


def reason_not_to_run(page: str, command: str) -> str | None:
    return next((reason for begin, reason in NOT_RUN.get(page, {}).items() if command.startswith(begin)), None)
