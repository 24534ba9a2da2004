"""Paths that another run writes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from rlsys import cli
from rlsys.config.files import load_config
from rlsys.earlier_runs import SCRIPTS, is_local, origin
from rlsys.errors import ConfigError
from rlsys.models.folder import given_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "first.yaml").write_text("run: {dir: runs/first, seed: 0}\n")
    (tmp_path / "configs" / "search_it.yaml").write_text("run:\n  dir: runs/search_it\n")
    (tmp_path / "configs" / "binary.yaml").write_bytes(b"\xff")
    return tmp_path


def test_a_hub_id_is_no_path() -> None:
    names = ("runs/x", "./x", "../x", "~/x", "/x", "a/b/c", "a/stages", "Qwen/Qwen2.5-0.5B", "gpt2")
    assert [is_local(name) for name in names] == [True] * 7 + [False] * 2


def test_the_config_of_the_missing_run_is_named(folder: Path) -> None:
    first = "; runs/first does not exist: first run `rlsys train configs/first.yaml`"
    assert origin("runs/first/stages/online") == origin("runs/first/checkpoints/step_000001/policy") == first
    with pytest.raises(ConfigError) as caught:
        given_model("runs/first/stages/online", "model.path")
    assert caught.value.message == f"model.path runs/first/stages/online: no such folder{first}"
    searched = "`rlsys search configs/search_it.yaml` and `rlsys extract runs/search_it`"
    assert origin("runs/search_it/data/rows.parquet") == f"; runs/search_it does not exist: first run {searched}"
    remedy = "run the command in the folder where the run was started"
    assert origin("runs/other/stages/online") == f"; it is relative to the current folder {folder}: {remedy}"
    assert origin("elsewhere") == origin("/elsewhere") == ""


def test_a_path_that_a_script_makes_names_the_script() -> None:
    assert origin("runs/models/smollm2-135m-instruct") == "; `python benchmarks/real_model.py` makes it"
    assert origin("runs/data/arithmetic/train.jsonl") == "; `python benchmarks/arithmetic.py` makes it"
    assert all((ROOT / script).is_file() for script in SCRIPTS.values())


def test_a_misspelt_path_has_a_suggestion(folder: Path) -> None:
    (folder / "runs" / "quickstart" / "stages").mkdir(parents=True)
    assert origin("runs/quickstrat/stages/online") == "; did you mean runs/quickstart?"
    assert origin("/dev/null") == ""
    assert origin("./runs/quickstart/stage") == "; did you mean runs/quickstart/stages?"


def test_a_run_that_has_not_got_there_is_named(folder: Path) -> None:
    stages = folder / "runs" / "first" / "stages"
    (stages / "warm_start").mkdir(parents=True)
    (folder / "runs" / "first" / "config.yaml").touch()
    assert origin("runs/first/stages/online") == (
        "; the run runs/first has warm_start in stages: its command continues it"
    )
    data = "; the run runs/first has nothing in data: `rlsys extract runs/first` writes data"
    assert origin("runs/first/data/rows.jsonl") == data


def test_every_shipped_config_that_begins_with_another_run_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    readme, later = (ROOT / "README.md").read_text(), []
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        model = str(load_config(path).model.path)
        if "/stages/" in model:
            later.append(path.name)
            assert "first run `rlsys train configs/" in origin(model), path.name
    assert len(later) > 5
    rows = [row for row in readme.splitlines() if row.startswith("| ") and "configs/" in row]
    for name in later:
        row = next((row for row in rows if re.search(rf"[`/]{re.escape(name)}`", row)), None)
        assert row is not None, f"no row of the README's table has {name}"
        assert row.split("|")[3].strip(), f"the column `run first` is empty for {name}"


@pytest.mark.parametrize("command", ["show", "status", "view", "extract", "export --output {tmp}/x"])
def test_a_run_folder_that_does_not_exist_is_named_with_a_similar_one(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "additions").mkdir()
    name, *options = command.format(tmp=tmp_path).split()
    monkeypatch.setattr(sys, "argv", ["rlsys", name, str(tmp_path / "aditions"), *options])
    with pytest.raises(SystemExit, match="^2$"):
        cli.main()
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/aditions: ")
    assert error.endswith(f"no such folder; did you mean {tmp_path}/additions?\n")
