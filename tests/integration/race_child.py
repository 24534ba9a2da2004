"""Runs commands of rlsys in forks that begin at once, because the slow imports are done before.

A line on standard input has the arguments of a command and the file of its errors, as JSON. Two lines answer: the
process id, and when it has ended its exit code, or minus the signal.
"""

from __future__ import annotations

import json
import os
import sys

from rlsys import cli
from rlsys.launch import session as launch  # noqa: F401 - launch: so that the command need not import it


def run(arguments: list[str], errors: str) -> None:
    """Run the command with its standard error in the file `errors`, and exit."""
    code = 99
    try:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT, 0o600), 2)
        sys.argv = ["rlsys", *arguments]
        cli.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 98
    finally:
        os._exit(code)


def main() -> None:
    for line in sys.stdin:
        *arguments, errors = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(arguments, errors)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
