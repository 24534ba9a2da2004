"""A transport that the processes of a run cannot have is refused before anything starts."""

from __future__ import annotations

import socket
from importlib import metadata
from typing import Any

import pytest

from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.errors import ConfigError
from rlsys.launch.transports import check_transport


def config(transport: str, **run: Any) -> Config:
    values = {
        "run": {"dir": "unused", **run},
        "model": {"from_scratch": {}},
        "task": {"type": "letter_count"},
        "weight_sync": {"transport": transport},
    }
    return parse_config(values, "test")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "127.0.1.1")
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0+cpu")


def test_broadcasts_on_gpus_need_a_torch_with_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"needs NCCL, and torch 2\.13\.0\+cpu is built without it; .*object_store"):
        check_transport(config("collective", device="cuda"))
    check_transport(config("object_store", device="cuda"))
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0")
    check_transport(config("collective", device="cuda"))


def test_broadcasts_on_a_cluster_need_an_address_that_other_nodes_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = {"address": "10.0.0.1:6379"}
    with pytest.raises(ConfigError, match=r"has 127\.0\.1\.1, which other nodes cannot reach; set GLOO_SOCKET_IFNAME"):
        check_transport(config("collective", **cluster))
    check_transport(config("object_store", **cluster))
    for address in ("local", "127.0.0.1:6379", "localhost:6379"):
        check_transport(config("collective", address=address))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    check_transport(config("collective", **cluster))
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(socket, "gethostbyname", lambda host: "10.0.0.7")
    check_transport(config("collective", **cluster))


def test_an_unknown_transport_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"weight_sync\.transport.*object_store.*collective") as caught:
        config("nccl")
    assert "\n" not in caught.value.message
