"""Outputs that exist already."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlsys.commands import extract as extract_command
from rlsys.errors import ConfigError
from rlsys.evaluation.document import is_document
from rlsys.outputs import check_file


def test_a_file_of_something_else_is_kept_unless_the_user_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x"
    check_file(path, "--output", overwrite=False)
    path.write_text("mine")
    with pytest.raises(ConfigError) as caught:
        check_file(path, "--output", overwrite=False)
    assert caught.value.message == (
        f"--output {path}: the file exists; choose another name, or replace it with --overwrite"
    )
    check_file(path, "--output", overwrite=True)
    check_file(path, "--output", overwrite=False, own=lambda content: content == b"mine")


def test_what_is_no_file_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path, "a folder"), (tmp_path / "pipe", "a device or pipe")):
        with pytest.raises(ConfigError, match=f"expected the name of a file, found {kind}"):
            check_file(path, "--output", overwrite=False)


@pytest.mark.parametrize(
    ("content", "own"),
    [
        (b'{"model": {"name": "x"}, "task": "sums"}', True),
        (b'{"results": [{"model": {}, "task": "sums"}], "comparisons": []}', True),
        *((other, False) for other in (b'{"model": "x"}', b"[1]", b"3", b'{"results": 3}', b"\xff", b"")),
    ],
)
def test_evaluate_knows_its_own_files(content: bytes, own: bool) -> None:
    assert is_document(content) is own


def test_tables_replace_only_those_of_the_same_command(tmp_path: Path) -> None:
    extract_command.check_output(tmp_path / "new", tmp_path, overwrite=False)
    (tmp_path / "README.md").write_text("# mine")
    with pytest.raises(ConfigError, match=r"it has a file README\.md that `rlsys extract` did not write"):
        extract_command.check_output(tmp_path, tmp_path / "run", overwrite=False)
    extract_command.check_output(tmp_path, tmp_path / "run", overwrite=True)
    (tmp_path / "report.json").write_text("{}")
    extract_command.check_output(tmp_path, tmp_path / "run", overwrite=False)
    with pytest.raises(ConfigError, match="expected a folder, found a file"):
        extract_command.check_output(tmp_path / "README.md", tmp_path / "run", overwrite=True)
