"""Who can reach a run: Ray on this machine for this command alone, and no cluster without Ray's tokens.

Whoever reaches a Ray cluster runs code on it. Ray takes its settings from the environment: RAY_AUTH_MODE, and the
token from RAY_AUTH_TOKEN, the file of RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token, in this order.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from rlsys.errors import ConfigError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# Ray keeps the first token that it sees in a process, so all clusters that one command starts have the same.
_OWN_TOKEN = secrets.token_hex(32)


def check_address(address: str) -> None:
    """Check who could reach the Ray of run.address, before anything is started or sent.

    Raises:
        ConfigError: `local`, and the environment asks Ray to listen on every interface or to go without tokens; or a
            cluster, and Ray's tokens are not turned on, there is none, or others can read its file.
    """
    mode = os.environ.get(MODE, "")
    if address == "local":
        wide = os.environ.get(CLUSTER, "0")
        if wide.lower() not in ("0", "false"):
            raise ConfigError(f"run.address local: {CLUSTER}={wide} makes Ray listen on every interface; unset it")
        # Ray turns its tokens on by itself where this is not set at all; an empty value is one.
        if MODE in os.environ and mode.lower() != "token":
            raise ConfigError(
                f"run.address local: {MODE}={mode} takes away the token that keeps other users of this machine out; "
                "unset it"
            )
        return
    if mode.lower() != "token":
        raise ConfigError(
            f"run.address {address}: a Ray cluster runs the code of whoever reaches it, so one is joined with a token "
            f"only: expected the environment variable {MODE}=token, here and where the cluster is started, found "
            f"{mode or 'none'}"
        )
    if not os.environ.get(TOKEN, "").strip():
        path = Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")
        _check_file(path, f"run.address {address}: the file of Ray's token {path}")


def close_local_ray() -> None:
    """Prepare the environment for a Ray of this command's own: no other cluster, a token that is in no file."""
    os.environ.pop("RAY_ADDRESS", None)
    os.environ[TOKEN] = _OWN_TOKEN


def child_environment(local: bool) -> dict[str, str]:
    """Variables of every process that Ray starts for a run: nothing is fetched or reported, no pickle is accepted.

    What a hub id names is a folder here before anything is started.

    Args:
        local: whether all of them run on this machine; they talk over loopback only then.
    """
    found = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray can set a variable of its children, not take it away.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
        "VLLM_SERVER_DEV_MODE": "0",
    }
    if local:
        # Without a name of an interface, gloo and NCCL listen on the one that the host name resolves to.
        found |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}
    return found


def _check_file(path: Path, what: str) -> None:
    """Raises ConfigError where a secret is not in the file, or not safe there."""
    try:
        found = path.stat()
        empty = stat.S_ISREG(found.st_mode) and not path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(
            f"{what}: cannot be read: {error.strerror}; expected one of mode 600 with the token"
        ) from None
    if not stat.S_ISREG(found.st_mode) or empty:
        raise ConfigError(f"{what}: expected a file with the token, found {'an empty one' if empty else 'none'}")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise ConfigError(f"{what}: expected one that its owner alone can read, found mode {mode:o}; chmod 600 {path}")
