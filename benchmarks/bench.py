"""Measure the ratios of all benchmarks that have a peer: one table and one JSON file. Or compare two such files.

`python benchmarks/bench.py [NAMES] [--output FILE]` (`make bench`) runs the benchmarks one after the other, with
nothing else on the machine, and keeps every ratio in FILE as soon as it is measured. A benchmark whose ratios are there
already is not run again, unless it is named. `python benchmarks/bench.py --compare BEFORE AFTER` compares two files.
Exit code 1 if a ratio misses its limit or a benchmark failed. The 135M model is that of `real_model.py`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this folder, where a file would hide the package `actors`
sys.path.append(str(ROOT / "benchmarks"))

import arithmetic  # noqa: E402
import real_model  # noqa: E402
from ratios import Ratio, compared, read, table  # noqa: E402

OUTPUT = Path("runs/bench.json")
REAL = ROOT / "runs" / "models" / "smollm2-135m-instruct"
DATA = ROOT / "runs" / "data" / "arithmetic"
CONFIG = ROOT / "configs" / "smollm2_arithmetic.yaml"
WARM = "runs/bench/warm"
BIG = ["--name=135M", f"--config={CONFIG}", f"--policy={REAL}"]
DATA_KEYS = [f"task.path={DATA / 'train.jsonl'}", f"task.held_out_path={DATA / 'held_out.jsonl'}"]
# With an entropy term, every row has a gradient: the untrained model's groups have equal rewards, which are left out.
ALL_ROWS = "objective.policy.entropy_coef=1e-9"
TWO_ACTORS = ["actors.count=2", "actors.threads=1"]
# Arguments of each benchmark.
BENCHMARKS = {
    "step": ["step.py"],
    "grpo_1m": ["grpo_step.py"],
    "grpo_135m": ["grpo_step.py", *BIG, "--steps=3", *DATA_KEYS, "train.groups_per_step=4", ALL_ROWS],
    "actors_1m": ["actors.py", f"--policy={WARM}/stages/warm_start"],
    "actors_135m": ["actors.py", *BIG, "--prompts=12", "--rounds=3", *DATA_KEYS, *TWO_ACTORS],
    "rows": ["learner_rows.py", "tokens"],
    "memory": ["learner_rows.py", "memory"],
    "publish": ["publish.py", "--out=runs/bench/publish.json"],
    "asynchronous": ["asynchronous.py"],
    "search": ["search.py", f"--policy={WARM}/stages/warm_start"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"benchmarks to run: {', '.join(BENCHMARKS)}")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    arguments = parser.parse_args()
    if arguments.compare:
        missing = [str(path) for path in arguments.compare if not path.exists()]
        if missing:
            parser.error(f"no such file: {', '.join(missing)}")
        print(compared(*map(read, arguments.compare)))
        return 0
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; known are {', '.join(BENCHMARKS)}")
    output = arguments.output.absolute()
    names = arguments.names or left(output)
    prepare(names)
    failed = [name for name in names if not measured(name, output)]
    ratios = read(output)
    print(table(ratios))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed) or not all(ratio.met for ratio in ratios))


def prepare(names: Sequence[str]) -> None:
    """Make the models and data that several benchmarks use."""
    arguments = [each for name in names for each in BENCHMARKS[name]]
    if f"--policy={REAL}" in arguments:
        real_model.model_folder(REAL)
        if not DATA.exists():
            arithmetic.write_files(DATA)
    if any(WARM in each for each in arguments) and not (ROOT / WARM / "stages" / "warm_start").exists():
        command = [Path(sys.executable).parent / "rlsys", "train", "configs/quickstart.yaml", f"run.dir={WARM}"]
        subprocess.run([*command, "stages=[warm_start]"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def left(output: Path) -> list[str]:
    """Return the benchmarks that no earlier command has finished."""
    record = finished_file(output)
    done = json.loads(record.read_text(encoding="utf-8")) if record.exists() else []
    return [name for name in BENCHMARKS if name not in done]


def finished_file(output: Path) -> Path:
    return output.with_suffix(".finished.json")


def measured(name: str, output: Path) -> bool:
    """Run a benchmark. Return whether it kept its ratios and all its checks held.

    A limit of a ratio is judged from the file. Exit code 1 with every limit met says that another check failed, such as
    equal weights.
    """
    script, *rest = BENCHMARKS[name]
    started, before = time.monotonic(), output.read_bytes() if output.exists() else b""
    print(f"== {name}", flush=True)
    command = [sys.executable, ROOT / "benchmarks" / script, f"--json={output}", *rest]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    print(f"   {time.monotonic() - started:.0f} s", flush=True)
    if code not in (0, 1) or not output.exists() or output.read_bytes() == before:
        return False
    done = [each for each in BENCHMARKS if each not in left(output) or each == name]
    finished_file(output).write_text(json.dumps(done), encoding="utf-8")
    return code == 0 or not all(ratio.met for ratio in changed(before, output))


def changed(before: bytes, output: Path) -> list[Ratio]:
    """Return the ratios that a benchmark has added or replaced."""
    earlier = {json.dumps(each) for each in json.loads(before or b"{}").get("ratios", [])}
    names = [each["name"] for each in json.loads(output.read_bytes())["ratios"] if json.dumps(each) not in earlier]
    return [ratio for ratio in read(output) if ratio.name in names]


if __name__ == "__main__":
    sys.exit(main())
