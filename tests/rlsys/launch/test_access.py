"""A cluster is joined only with a token, and every process of Ray gets safe settings."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from rlsys.errors import ConfigError
from rlsys.launch import access

ADDRESS = "10.0.0.1:6379"


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (access.MODE, access.TOKEN, access.TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(access.CLUSTER, "1")
    monkeypatch.setenv("HOME", str(tmp_path))


def refusal(address: str = ADDRESS) -> str:
    with pytest.raises(ConfigError) as caught:
        access.check_address(address)
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("mode", ["", "disabled", "k8s"])
@pytest.mark.parametrize("address", [ADDRESS, "auto", "127.0.0.1:6379", "ray://10.0.0.1:10001"])
def test_without_tokens_no_cluster_is_joined(monkeypatch: pytest.MonkeyPatch, address: str, mode: str) -> None:
    monkeypatch.setenv(access.TOKEN, "a token alone turns nothing on")
    monkeypatch.setenv(access.MODE, mode)
    message = refusal(address)
    assert message.startswith(f"run.address {address}: ")
    assert (
        f"expected the environment variable RAY_AUTH_MODE=token, here and where the cluster is started, found {mode}"
        in message
    )
    assert "a token alone" not in message


def test_a_token_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(access.MODE, "Token")  # Ray ignores the case
    monkeypatch.setenv(access.TOKEN, "secret")
    access.check_address(ADDRESS)
    monkeypatch.setenv(access.TOKEN, "  ")
    assert ".ray/auth_token: cannot be read: No such file or directory" in refusal()


@pytest.mark.parametrize("by_default", [False, True])
def test_only_the_owner_reads_a_token_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by_default: bool) -> None:
    path = tmp_path / ".ray" / "auth_token" if by_default else tmp_path / "token"
    monkeypatch.setenv(access.MODE, "token")
    if not by_default:
        monkeypatch.setenv(access.TOKEN_PATH, str(path))
    assert f"{path}: cannot be read: No such file or directory; expected a file of mode 600" in refusal()
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n")
    path.chmod(0o600)
    assert "expected a file with the token, found an empty file" in refusal()
    path.write_text("secret\n")
    for mode in (0o640, 0o604, 0o644, 0o660):
        path.chmod(mode)
        message = refusal()
        assert f"expected a file that only its owner can read, found mode {mode:o}; chmod 600 {path}" in message
        assert "secret" not in message
    for mode in (0o600, 0o400):
        path.chmod(mode)
        access.check_address(ADDRESS)
    path.unlink()
    path.mkdir(mode=0o700)
    assert "expected a file with the token, found none" in refusal()


def test_a_local_run_needs_no_token_and_takes_no_other_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(access.CLUSTER)
    access.check_address("local")
    for harmless in ("0", "false"):
        monkeypatch.setenv(access.CLUSTER, harmless)
        access.check_address("local")
    monkeypatch.setenv(access.CLUSTER, "1")
    assert refusal("local") == (
        "run.address local: RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1 makes Ray listen on every interface; unset it"
    )


@pytest.mark.parametrize("mode", ["disabled", "k8s", ""])
def test_a_local_run_never_goes_without_tokens(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.delenv(access.CLUSTER)
    for harmless in ("token", "Token"):  # Ray sets the first after a local run
        monkeypatch.setenv(access.MODE, harmless)
        access.check_address("local")
    monkeypatch.setenv(access.MODE, mode)
    assert refusal("local") == (
        f"run.address local: RAY_AUTH_MODE={mode} takes away the token that keeps other users of this machine out; "
        "unset it"
    )


def test_a_local_ray_has_a_token_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ADDRESS)
    monkeypatch.setenv(access.TOKEN, "of a cluster elsewhere")
    access.close_local_ray()
    assert "RAY_ADDRESS" not in os.environ
    assert len(bytes.fromhex(os.environ[access.TOKEN])) == 32
    first = os.environ[access.TOKEN]
    access.close_local_ray()
    assert os.environ[access.TOKEN] == first  # Ray keeps the first token that it reads


def test_environment_of_the_processes_of_a_run() -> None:
    local, joined = access.child_environment(local=True), access.child_environment(local=False)
    assert {local[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")} == {"lo"}
    assert local["VLLM_HOST_IP"] == "127.0.0.1"
    assert not {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "VLLM_HOST_IP"} & set(joined)
    for variables in (local, joined):
        assert {variables[name] for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK")} == {"1"}
        assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
        assert variables["VLLM_ALLOW_INSECURE_SERIALIZATION"] == variables["VLLM_SERVER_DEV_MODE"] == "0"


def test_a_cluster_beyond_loopback_needs_the_address_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(access.MODE, "token")
    monkeypatch.setenv(access.TOKEN, "secret")
    monkeypatch.setenv(access.CLUSTER, "0")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    for loopback in ("127.0.0.1:6379", "localhost:6379", "[::1]:6379", "auto"):
        access.check_address(loopback)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"^run.address auto: expected the environment variable"):
        access.check_address("auto")
    with pytest.raises(ConfigError, match="expected the environment variable RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1"):
        access.check_address("10.0.0.1:6379")
    monkeypatch.setenv(access.CLUSTER, "1")
    access.check_address("10.0.0.1:6379")


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "127.0.0.1", "6379", "http://127.0.0.1:6379", "a:b"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"expected local, auto or HOST:PORT of `ray start --head`"):
        access.check_answer(address)


def test_an_address_where_nothing_answers_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ConfigError) as caught:
        access.check_answer(address)
    assert caught.value.message == f"run.address {address}: nothing answers there: Connection refused"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError) as caught:
        access.check_answer("auto")
    assert caught.value.message == f"run.address auto is {address}: nothing answers there: Connection refused"
    for wrong in ("no-such-host.invalid:6379", "127.0.0.1:99999"):
        with pytest.raises(ConfigError, match="nothing answers there"):
            access.check_answer(wrong)


def test_what_is_no_head_of_ray_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts connections and says nothing. Ray itself would try again for minutes."""
    monkeypatch.setattr(access, "ANSWER_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match="does not answer as the head of Ray does"):
            access.check_answer(address)
