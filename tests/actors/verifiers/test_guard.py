"""The guard of a verifier: the exit code that it leaves with."""

from __future__ import annotations

import subprocess
import sys

# A verifier that has ended, and a SIGTERM of the actor that waits beside its SIGCHLD.
PROGRAM = """
import os, signal
from actors.verifiers import guard

watched = {signal.SIGTERM, signal.SIGCHLD, signal.SIGCONT}
signal.pthread_sigmask(signal.SIG_BLOCK, watched)
child = os.fork()
if child == 0:
    os._exit(78)
os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
os.kill(os.getpid(), signal.SIGTERM)
guard._watch(child, guard._Family(100), watched, os.getppid())
"""


def test_the_exit_code_of_a_verifier_is_not_lost_if_the_actor_asks_for_the_end() -> None:
    assert subprocess.run([sys.executable, "-c", PROGRAM], check=False).returncode == 78
