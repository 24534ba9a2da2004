"""Restrict access to a run: a local Ray serves one command, and a cluster needs a token.

A client of a Ray cluster can run any code on it. Ray reads its settings from the environment: RAY_AUTH_MODE, and the
token from RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token, in this order.
"""

from __future__ import annotations

import os
import secrets
import socket
import stat
import subprocess
import sys
from pathlib import Path

from rlsys.errors import ConfigError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# Ray keeps the first token that it reads in a process, so all clusters of one command share this token.
_OWN_TOKEN = secrets.token_hex(32)
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 5.0, 10.0
# Ray ends a process that cannot reach a cluster, after minutes. So another process asks.
_QUESTION = """
import sys
from ray._raylet import GcsClient
print("asking", flush=True)
GcsClient(address=sys.argv[1]).internal_kv_keys(b'', timeout=5)
"""


def check_address(address: str) -> None:
    """Raise if other users could reach the Ray of run.address. Nothing is started or sent before.

    Args:
        address: run.address, `local` or the address of a cluster.
    Raises:
        ConfigError: for `local`, the environment makes Ray listen on every interface or turns its tokens off. For a
            cluster, Ray's tokens are not turned on, the token is missing, other users can read its file, or the
            environment keeps Ray on loopback and the address is not there.
    """
    mode = os.environ.get(MODE, "")
    if address == "local":
        wide = os.environ.get(CLUSTER, "0")
        if wide.lower() not in ("0", "false"):
            raise ConfigError(f"run.address local: {CLUSTER}={wide} makes Ray listen on every interface; unset it")
        # Ray turns its tokens on by itself only if the variable is not set. An empty value counts as set.
        if MODE in os.environ and mode.lower() != "token":
            raise ConfigError(
                f"run.address local: {MODE}={mode} takes away the token that keeps other users of this machine out; "
                "unset it"
            )
        return
    if mode.lower() != "token":
        raise ConfigError(
            f"run.address {address}: a Ray cluster runs the code of every client, so joining one needs a token: "
            f"expected the environment variable {MODE}=token, here and where the cluster is started, found "
            f"{mode or 'none'}"
        )
    if not _on_loopback(_found(address)) and os.environ.get(CLUSTER, "0").lower() in ("0", "false"):
        raise ConfigError(
            f"run.address {address}: expected the environment variable {CLUSTER}=1, with which Ray uses this machine's "
            "address in the network instead of 127.0.0.1"
        )
    if not os.environ.get(TOKEN, "").strip():
        path = Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")
        _check_file(path, f"run.address {address}: the file of Ray's token {path}")


def _on_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")


def _found(address: str) -> str:
    """Return run.address, or the address that Ray finds for `auto`: of RAY_ADDRESS, or of a cluster of this machine."""
    if address != "auto":
        return address
    from ray._private.services import find_gcs_addresses, get_ray_address_from_environment

    known = get_ray_address_from_environment("auto", None) or "auto"
    if known != "auto":
        return str(known)
    running = sorted(find_gcs_addresses())
    if len(running) != 1:
        raise ConfigError(
            f"run.address auto: expected one Ray cluster on this machine, found {', '.join(running) or 'none'}; "
            "write its HOST:PORT"
        )
    return str(running[0])


def check_answer(address: str) -> None:
    """Raise if no Ray cluster answers at run.address. `local` is not asked.

    Raises:
        ConfigError: the address is not HOST:PORT; nothing or something else listens there; the token is refused.
    """
    if address == "local":
        return
    address, written = _found(address), address
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ConfigError(
            f"run.address {address}: expected local, auto or HOST:PORT of `ray start --head`, as in 10.0.0.1:6379"
        )
    where = f"run.address {address}" if written == address else f"run.address {written} is {address}"
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        reason = str(error.strerror or error) if isinstance(error, OSError) else "no such port"
        raise ConfigError(f"{where}: nothing answers there: {reason}") from None
    code, answer = _ask(address)
    if code is None:
        raise ConfigError(f"{where}: what listens there does not answer as the head of Ray does")
    if "Auth" in answer and code:
        raise ConfigError(f"{where}: the cluster refuses Ray's token: use the one it was started with")
    if code:
        reason = (answer.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"{where}: no Ray cluster can be joined there: {reason}")


def _ask(address: str) -> tuple[int | None, str]:
    """Ask a cluster for something in another process; return its exit status and errors, or None without an answer."""
    command = [sys.executable, "-c", _QUESTION, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None  # noqa: S101 - a pipe
        asking.stdout.readline()  # Ray is imported, which takes its time on a busy machine
        try:
            errors = asking.communicate(timeout=ANSWER_TIMEOUT_S)[1]
        except subprocess.TimeoutExpired:
            asking.kill()
            return None, ""
    return asking.returncode, errors


def close_local_ray() -> None:
    """Prepare the environment for a local Ray: forget any other cluster, and set a token that is in no file."""
    os.environ.pop("RAY_ADDRESS", None)
    os.environ[TOKEN] = _OWN_TOKEN


def child_environment(local: bool) -> dict[str, str]:
    """Return the variables of every process that Ray starts for a run.

    They turn off downloads, usage reports and pickles. Models of the hub have been downloaded before.

    Args:
        local: whether all processes run on this machine and should use loopback only.
    """
    variables = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray can set a variable of its children but cannot remove it.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
        "VLLM_SERVER_DEV_MODE": "0",
    }
    if local:
        # Without an interface name, gloo and NCCL listen on the interface that the host name resolves to.
        variables |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}
    return variables


def _check_file(path: Path, name: str) -> None:
    """Raise ConfigError if the file holds no token, or if other users can read it."""
    try:
        status = path.stat()
        empty = stat.S_ISREG(status.st_mode) and not path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"{name}: cannot be read: {error.strerror}; expected a file of mode 600 with the token"
        ) from None
    if not stat.S_ISREG(status.st_mode) or empty:
        raise ConfigError(f"{name}: expected a file with the token, found {'an empty file' if empty else 'none'}")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(
            f"{name}: expected a file that only its owner can read, found mode {mode:o}; chmod 600 {path}"
        )
