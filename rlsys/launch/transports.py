"""Check that the processes of a run can have the configured transport of weights. torch is not imported."""

from __future__ import annotations

import os
import socket
from importlib import metadata

from rlsys.config.schema import Config
from rlsys.errors import ConfigError

INTERFACES = {"cpu": "GLOO_SOCKET_IFNAME", "cuda": "NCCL_SOCKET_IFNAME"}
"""Variables that choose the network interface of a process group, by device."""


def check_transport(config: Config) -> None:
    """Raise if a broadcast could not reach the engines.

    Raises:
        ConfigError: the transport is collective, and the GPUs have a torch without NCCL, or the members of the
            group on a cluster would listen on loopback.
    """
    if config.weight_sync.transport != "collective":
        return
    advice = "or set weight_sync.transport to object_store"
    version = metadata.version("torch")
    if config.run.device == "cuda" and "+cpu" in version:
        raise ConfigError(
            f"weight_sync.transport collective with run.device cuda needs NCCL, and torch {version} is built without "
            f"it; install requirements-gpu.lock, {advice}"
        )
    variable, host = INTERFACES[config.run.device], socket.gethostname()
    address = _address_of(host)
    if _spans_nodes(config.run.address) and variable not in os.environ and address.startswith("127."):
        raise ConfigError(
            f"weight_sync.transport collective on the cluster at {config.run.address}: expected a host name with an "
            f"address in the network, but {host} has {address}, which other nodes cannot reach; set {variable} to a "
            f"network interface here and where the cluster is started, {advice}"
        )


def _spans_nodes(address: str) -> bool:
    """Return whether the processes may be on other machines than this one."""
    host = address.rpartition(":")[0].strip("[]")
    return address != "local" and host not in ("localhost", "::1") and not host.startswith("127.")


def _address_of(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""
