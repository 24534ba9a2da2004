"""Compare the greedy accuracy of an exported policy in lm-evaluation-harness with that of `rlsys evaluate`.

`python benchmarks/lm_eval_parity.py [RUN] [--answer REGEX]`

Both sides get the same held-out problems of the run's task, in fp32 on the CPU. Ours: vLLM on the policy inside the
run, and the task's verifier. Theirs: `rlsys export`, then the harness with transformers, the exported chat template,
and its own filter and metric (the last match of REGEX, compared with the reference as text). So the export, the
template, the end tokens, two implementations of the model and two judges must agree. The task is made here, of local
files; nothing is downloaded but the harness itself, which pip installs into a folder of its own. Exit code 1 if a
problem differs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`

from rlsys.commands import export  # noqa: E402
from rlsys.data.inputs import Inputs  # noqa: E402
from rlsys.models.folder import ModelFolder  # noqa: E402
from rlsys.run.policies import RunPolicy, find_run_policy  # noqa: E402
from rlsys.types import Question  # noqa: E402

NAME = "rlsys_held_out"
ANSWER = r"<answer>\s*(.*?)\s*</answer>"
TRL = Path(sys.prefix) / "trl"  # has accelerate
HARNESS = "lm-eval==0.4.13"
# What the harness imports beside what rlsys has. Without its dependencies, because torch would be replaced by another
# build.
PACKAGES = (
    HARNESS, "DataProperty==1.1.1", "absl-py==2.5.1", "chardet==7.7.0", "colorama==0.4.6", "evaluate==0.4.6",
    "joblib==1.6.0", "lxml==6.1.3", "mbstrdecoder==1.1.5", "more_itertools==11.2.1", "narwhals==2.29.0", "nltk==3.10.4",
    "pathvalidate==3.3.1", "portalocker==4.4.2", "pytablewriter==1.2.1", "python-dateutil==4.0.0", "pytz==2026.6",
    "rouge-score==0.1.2", "sacrebleu==2.6.0", "scikit-learn==1.9.1", "scipy==1.17.1", "six==1.17.0",
    "sqlitedict==2.1.0", "tabledata==1.3.5", "tabulate==0.10.0", "tcolorpy==0.1.7", "threadpoolctl==3.8.0",
    "typepy==2.0.0", "word2number==1.1",
)  # fmt: skip


def install(folder: Path) -> None:
    """Install the harness into a folder, if it is not there."""
    if not (folder / "lm_eval").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, *PACKAGES], check=True)


def our_verdicts(policy: RunPolicy, problems: int, output: Path) -> list[bool]:
    """Return whether `rlsys evaluate` finds the greedy answer of each held-out problem right."""
    overrides = ["evaluation.samples=0", "evaluation.greedy=true", f"evaluation.prompts={problems}"]
    program = [sys.executable, "-m", "rlsys.cli", "evaluate", str(policy.folder), *overrides]
    subprocess.run([*program, "--output", str(output)], check=True, env=environment(), stdout=sys.stderr)
    return [bool(share) for share in json.loads(output.read_text())["greedy"]["by_problem"]["accuracy"]]


def environment(*folders: Path) -> dict[str, str]:
    """Return the environment of a process that imports rlsys and the packages in some folders."""
    path = [str(ROOT), *map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def split(question: Question) -> tuple[str, str]:
    """Return the message of the system, or "", and that of the user."""
    if isinstance(question, str):
        return "", question
    roles = [message.role for message in question]
    if roles not in (["user"], ["system", "user"]):
        sys.exit(f"expected problems of one user turn, after a system message or none, found {roles}")
    return (question[0].content if len(roles) > 1 else ""), question[-1].content


def write_task(folder: Path, items: Sequence[Mapping[str, str]], answer: str, max_tokens: int) -> None:
    """Write the task of the harness: its problems, and the file that describes it."""
    folder.mkdir()
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (folder / "held_out.jsonl").write_text(lines, encoding="utf-8")
    task = {
        "task": NAME,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "held_out.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": max_tokens},
        "filter_list": [
            {
                "name": "answer",
                "filter": [
                    {"function": "regex", "regex_pattern": answer, "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{NAME}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def their_samples(model: Path, task: Path, system: str, packages: Path, output: Path) -> list[dict[str, Any]]:
    """Return what the harness logs for each problem, in order."""
    program = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", NAME, "--include_path", str(task)]
    program += ["--model_args", f"pretrained={model},dtype=float32", "--device", "cpu", "--batch_size", "32"]
    program += ["--log_samples", "--output_path", str(output)]
    if ModelFolder(model).tokenizer.chat_template:
        program += ["--apply_chat_template", *(["--system_instruction", system] if system else [])]
    subprocess.run(program, check=True, env=environment(packages, TRL), stdout=sys.stderr)
    [log] = output.rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return sorted(samples, key=lambda sample: int(sample["doc_id"]))


def compare(ours: Sequence[bool], theirs: Sequence[Mapping[str, Any]]) -> tuple[list[str], int]:
    """Return the figures as lines of Markdown, and the number of problems that differ."""
    right = [bool(sample["exact_match"]) for sample in theirs]
    pairs = list(zip(ours, theirs, strict=True))
    different = [(mine, sample) for mine, sample in pairs if mine != bool(sample["exact_match"])]
    lines = [
        "| problems | `rlsys evaluate`, greedy | lm-evaluation-harness, greedy | problems that differ |",
        "|---|---|---|---|",
        f"| {len(ours)} | {sum(ours) / len(ours):.4f} | {sum(right) / len(right):.4f} | {len(different)} |",
    ]
    for mine, sample in different[:10]:
        verdict = "right by rlsys alone" if mine else "right by the harness alone"
        reply = sample["resps"][0][0]
        lines += ["", f"{verdict}: {sample['doc']['question']!r}, {sample['doc']['answer']!r}: {reply!r}"]
    return lines, len(different)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", nargs="?", default="runs/quickstart", help="run directory, or another target of export")
    parser.add_argument("--answer", default=ANSWER, help="regular expression with one group, the answer in a reply")
    parser.add_argument("--problems", type=int, default=512, help="number of held-out problems")
    parser.add_argument("--packages", type=Path, default=Path("runs/lm_eval"), help="folder of the harness")
    arguments = parser.parse_args()
    install(packages := arguments.packages.absolute())
    policy = find_run_policy(arguments.run)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, task = folder / "model", folder / "task"
        print(export.run(policy, model), file=sys.stderr)
        evaluation = policy.config.evaluation.model_copy(update={"prompts": arguments.problems})
        config = policy.config.model_copy(update={"evaluation": evaluation})
        prompts = Inputs(config, ModelFolder(model), training=False).held_out
        parts = [split(prompt.question) for prompt in prompts]
        if len({system for system, _ in parts}) > 1:
            sys.exit("expected one system message for all problems, found several")
        items = [{"question": user, "answer": p.answer} for (_, user), p in zip(parts, prompts, strict=True)]
        write_task(task, items, arguments.answer, config.sampling.max_tokens)
        ours = our_verdicts(policy, arguments.problems, folder / "ours.json")
        lines, different = compare(ours, their_samples(model, task, parts[0][0], packages, folder / "theirs"))
    print("\n".join(lines))
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
