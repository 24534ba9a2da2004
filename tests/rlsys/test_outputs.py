"""Outputs that exist already."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from evaluations import result

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


RESULT = json.loads(json.dumps(result()))
FOREIGN: tuple[object, ...] = (
    *({"model": "x"}, {"model": "a", "task": "b", "mine": 1}, {"model": {}, "task": "sums"}, {**RESULT, "task": 1}),
    *([1], 3, {}, {"results": 3}, {"results": {}}, {"results": [], "notes": "precious"}, {"results": [RESULT, 1]}),
)


@pytest.mark.parametrize(
    ("content", "own"),
    [
        (json.dumps(RESULT).encode(), True),
        (json.dumps({"results": [RESULT, RESULT], "comparisons": []}).encode(), True),
        *((json.dumps(each).encode(), False) for each in FOREIGN),
        *((other, False) for other in (b"\xff", b"", b"[" * 100_000)),
    ],
)
def test_evaluate_knows_its_own_files(content: bytes, own: bool) -> None:
    assert is_document(content) is own


def test_tables_replace_only_those_of_the_same_command(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    extract_command.check_output(tmp_path / "new", run_dir, overwrite=False)
    (tmp_path / "README.md").write_text("# mine")
    with pytest.raises(ConfigError, match=r"it has a file README\.md that `rlsys extract` did not write"):
        extract_command.check_output(tmp_path, run_dir, overwrite=False)
    extract_command.check_output(tmp_path, run_dir, overwrite=True)
    with pytest.raises(ConfigError, match="expected a folder, found a file"):
        extract_command.check_output(tmp_path / "README.md", run_dir, overwrite=True)
    (run_dir / "data").mkdir(parents=True)
    (run_dir / "data" / "README.md").touch()
    extract_command.check_output(run_dir / "data", run_dir, overwrite=False)


OWN_REPORT = {"trees": 3, "failed": 0, "rows": {"supervised": 2}, "duplicates": {}, "trees_without_pair": {}}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{}", "expected its key trees"),
        (b"", "not JSON: Expecting value"),
        (json.dumps(OWN_REPORT).encode()[:60], "not JSON: "),
        (b"\xff", "not JSON: "),
        (b'{"my": "own report"}', "expected its key trees"),
        (b'{"trees": 3, "failed": 0, "rows": 2}', "expected its key rows"),
        (b"[1]", "expected a JSON object, found list"),
    ],
)
def test_a_report_of_something_else_does_not_give_tables_away(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / "README.md").touch()
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"report\.json is not a report of `rlsys extract` \({fault}"):
        extract_command.check_output(tmp_path, tmp_path / "run", overwrite=False)
    (tmp_path / "report.json").write_text(json.dumps(OWN_REPORT))
    extract_command.check_output(tmp_path, tmp_path / "run", overwrite=False)
