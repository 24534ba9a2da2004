"""Run `rlsys check`, and a case's own command, on every folder of small inputs; print expected against got.

`python benchmarks/input_cases.py FOLDER [NAME ...]`. A case is a folder with config.yaml, a README.md that contains
"Command: `... rlsys check|train config.yaml OVERRIDES`" and "Expected: TEXT Got:", and, if it needs a model, a
make_model.py that writes it into the working directory. Cases run in copies, in a temporary folder.

TEXT is prose. Its words in `OUTCOMES` tell which exit codes are right: "refusal by check" is 2, "trains" is 0, and
"reads it, or says that CSV is not read" is either. A text without such a word is a problem of the case.

The exit code is 1 if a command ends with another exit code than expected, with a traceback or without an end, or if
`check` accepts what `train` refuses.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cells import RLSYS

COMMAND = re.compile(r"Command: `.*?rlsys (check|train) config\.yaml ?([^`]*)`")
EXPECTED = re.compile(r"Expected: (.*?) Got:", re.DOTALL)
OUTCOMES = {
    0: re.compile(r"\b(trains|reads it|are used|left out|accept\w*|the question in the prompt|exit( code)? 0)\b"),
    2: re.compile(r"\b(refus\w+|one line|says that|named|exit( code)? 2)\b"),
}
"""Words of an expectation that allow an exit code."""
NAMES = {0: "accepted", 2: "refused"}
LIMIT_S = 600.0


def run(command: list[str], folder: Path) -> tuple[int, str, float]:
    """Run a command in a folder. Return its exit code (-1: ended after `LIMIT_S`), its errors and the seconds."""
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return -1, "", LIMIT_S
    return done.returncode, done.stderr.strip(), time.perf_counter() - start


def allowed_codes(expected: str) -> list[int]:
    """Return the exit codes that the text of an expectation allows."""
    return [code for code, words in OUTCOMES.items() if words.search(expected)]


def problems(case: Path) -> list[str]:
    """Run one case, print what was expected and what came, and return what is wrong."""
    readme = (case / "README.md").read_text(encoding="utf-8")
    if (case / "make_model.py").exists():
        code, said, _ = run([sys.executable, "make_model.py"], case)
        if code:
            return [f"{case.name}: make_model.py ended with exit code {code}: {said[-500:]}"]
    command, expected = COMMAND.search(readme), EXPECTED.search(readme)
    overrides = command[2].split() if command else []
    print(f"\n{case.name}\n  expected: {expected[1] if expected else 'not said'}")
    allowed = allowed_codes(expected[1]) if expected else []
    codes, lines = {}, [] if allowed else [f"{case.name}: README.md does not say whether it is refused or accepted"]
    for name in ("check", "train")[: 2 if command and command[1] == "train" else 1]:
        codes[name], said, seconds = run([str(RLSYS), name, "config.yaml", *overrides], case)
        last = said.splitlines()[-1] if said else "nothing on the error stream"
        print(f"  {name}: exit code {codes[name]}, {seconds:.1f} s, {last}", flush=True)
        if "Traceback" in said or codes[name] not in (0, 2):
            lines.append(f"{case.name}: {name} ended with exit code {codes[name]}: {said[-500:]}")
        elif allowed and codes[name] not in allowed:
            wanted = " or ".join(NAMES[code] for code in allowed)
            lines.append(f"{case.name}: expected to be {wanted}, but {name} ended with exit code {codes[name]}")
    if codes["check"] == 0 and codes.get("train", 0) != 0:
        lines.append(f"{case.name}: check accepts it and train refuses it")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="cases to run; all without a name")
    arguments = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory(prefix="cases-") as temporary:
        copies = Path(temporary, "cases")
        shutil.copytree(arguments.folder, copies, copy_function=shutil.copyfile)
        for case in sorted(path.parent for path in copies.glob("*/config.yaml")):
            case.chmod(0o755)
            if not arguments.names or case.name in arguments.names:
                lines += problems(case)
    print("", *(lines or ["no problem"]), sep="\n")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
