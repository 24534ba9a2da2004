"""`rlsys view`: addresses, ports and folders that cannot be used, and the copy in one file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from viewed_run import write_run

from rlsys import cli
from rlsys.commands.view import is_loopback, listen, run
from rlsys.errors import ConfigError


def test_a_port_in_use_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port: {port} is in use; give another one, or 0"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "256.1.1.1", "", "a" * 300])
def test_an_address_that_is_none_is_named(host: str) -> None:
    with pytest.raises(ConfigError, match="--host: expected an address"):
        listen(host, 0).close()


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--host, --port: 192\.0\.2\.1 port 0 cannot be used"):
        listen("192.0.2.1", 0)


def test_loopback() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org")] == [False] * 4  # noqa: S104


def test_a_copy_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([write_run(tmp_path / "run")], "127.0.0.1", 0, tmp_path / "copy.html")
    assert (tmp_path / "copy.html").read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out.startswith(f"written: {tmp_path / 'copy.html'}")
    run([tmp_path / "run"], "127.0.0.1", 0, tmp_path / "copy.html")  # its own
    (tmp_path / "mine.html").write_text("<!doctype html>")
    with pytest.raises(ConfigError, match=r"--export .*mine\.html: the file exists"):
        run([tmp_path / "run"], "127.0.0.1", 0, tmp_path / "mine.html")
    run([tmp_path / "run"], "127.0.0.1", 0, tmp_path / "mine.html", overwrite=True)
    with pytest.raises(ConfigError, match=rf"no folder {tmp_path / 'no'}; make it"):
        run([tmp_path / "run"], "127.0.0.1", 0, tmp_path / "no" / "folder.html")


def test_the_copy_of_a_search_without_training_has_its_trees_alone(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    run([tmp_path / "run"], "127.0.0.1", 0, tmp_path / "whole.html")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    shutil.rmtree(tmp_path / "run" / "rollouts")
    run([tmp_path / "run"], "127.0.0.1", 0, tmp_path / "trees.html")
    whole, trees = ((tmp_path / f"{name}.html").read_text() for name in ("whole", "trees"))
    for part in ("curves", "times", "rollouts", "trees"):
        assert f'href="#{part}"' in whole and f'id="{part}"' in whole
        assert (f'href="#{part}"' in trees) == (f'id="{part}"' in trees) == (part == "trees")


@pytest.mark.parametrize("arguments", [["{}/nothing"], ["{}/run", "0.0.0.0"]])  # noqa: S104
def test_a_folder_that_is_no_run_is_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["rlsys", "view", *(argument.format(tmp_path) for argument in arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert ": no such folder" in error
