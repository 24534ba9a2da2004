"""`rlsys export`: complete folders or none, and a run that stays as it is."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from exported_runs import write_run

from rlsys import cli
from rlsys.commands import export
from rlsys.config.schema import FromScratchConfig, LoraConfig
from rlsys.errors import CheckpointError, ConfigError, DamagedFileError
from rlsys.models.adapters import adapter_spec
from rlsys.models.folder import ModelFolder
from rlsys.models.scratch import build_from_scratch
from rlsys.models.tensors import empty_model
from rlsys.run.policies import find_run_policy

SIZE = FromScratchConfig(hidden_size=32, layers=1, heads=1, intermediate_size=16, max_positions=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_from_scratch(SIZE, ("<answer>", "</answer>"), 0, folder)
    return folder


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", model)


@pytest.fixture
def adapted_run(model: Path, tmp_path: Path) -> Path:
    """A run with model.lora."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "adapter"
    folder.mkdir()
    spec = adapter_spec(empty_model(model), LoraConfig(rank=2), model)
    tensors = {name: torch.ones(shape) for name, shape in spec.tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    spec.save_pretrained(folder)
    for path in ModelFolder(model).tokenizer_files:
        (folder / path.name).write_bytes(path.read_bytes())
    settings = {"path": str(model), "lora": {"rank": 2}}
    return write_run(tmp_path / "adapted", folder, model=settings, inputs={"model.path": ModelFolder(model).digest})


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip


def call(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["rlsys", "export", *arguments])
    try:
        cli.main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def test_a_policy_is_copied_beside_its_card_and_the_run_stays(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    before, output = digests(run), tmp_path / "below" / "out"
    assert call(str(run), "--output", str(output), monkeypatch=monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    parameters = ModelFolder(output).parameters
    assert lines == [
        f"{run}: policy of the finished stage online",
        f"{output}: stage online, weight version 8, whole model, {parameters:,} parameters, fp32",
        f"serve: {export.serve_command(str(output))}",
    ]
    assert digests(run) == before
    exported = digests(output)
    assert exported.pop("README.md")
    assert exported == digests(run / "stages" / "online")
    assert AutoModelForCausalLM.from_pretrained(output).num_parameters() == parameters
    assert f"# {output.name}\n" in (output / "README.md").read_text()
    assert len({stat.S_IMODE(path.stat().st_mode) for path in output.iterdir()}) == 1
    assert os.listdir(tmp_path / "below") == ["out"]


def test_an_adapter_is_merged_or_written_alone(adapted_run: Path, model: Path, tmp_path: Path) -> None:
    policy = find_run_policy(str(adapted_run))
    merged = export.run(policy, tmp_path / "merged", dtype="bf16")
    assert "merged model" in merged and ModelFolder(tmp_path / "merged").parameters == ModelFolder(model).parameters
    alone = export.run(policy, tmp_path / "alone", merge=False)
    assert "adapter, " in alone and f"--max-lora-rank 2 --lora-modules policy={tmp_path / 'alone'}" in alone
    assert not (tmp_path / "alone" / "config.json").exists()
    assert "library_name: peft" in (tmp_path / "alone" / "README.md").read_text()


def test_an_adapter_beside_another_base_model_is_refused(adapted_run: Path, tmp_path: Path) -> None:
    other, config = tmp_path / "other", adapted_run / "stages" / "online" / "adapter_config.json"
    build_from_scratch(SIZE, ("<answer>", "</answer>"), 1, other)  # another seed
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(other)}))
    for merge in (True, False):
        with pytest.raises(DamagedFileError, match="other: expected the base model that .* was trained on, sha256 "):
            export.run(find_run_policy(str(adapted_run)), tmp_path / "out", merge=merge)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [["--adapter"], ["--step", "4"], ["--stage", "sft"], ["--step", "8", "--stage", "online"]]
)
def test_refusals_are_one_line_with_exit_code_2(
    run: Path, tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(str(run), "--output", str(tmp_path / "out"), *arguments, monkeypatch=monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("used", "expected a new or empty folder, found files in it"),
        ("used/file", "expected a new or empty folder, found a file"),
        ("run/stages/mine", "expected a folder outside the run directory"),
        ("link/mine", "expected a folder outside the run directory"),
    ],
)
def test_an_output_that_could_lose_data_is_refused(run: Path, tmp_path: Path, output: str, message: str) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(run)
    before = digests(tmp_path)
    with pytest.raises(ConfigError, match=message):
        export.run(find_run_policy(str(run)), tmp_path / output)
    assert digests(tmp_path) == before


def test_an_empty_folder_is_filled_and_leftovers_of_a_killed_export_are_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "half").write_text("of an export that was killed")
    export.run(find_run_policy(str(run)), tmp_path / "out")
    assert not (tmp_path / ".out.unfinished").exists() and not (tmp_path / "out" / "half").exists()


@pytest.mark.parametrize("step", ["write_whole", "model_card", "fsync"])
def test_an_export_that_fails_leaves_nothing(
    run: Path, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, step, fail)
    with pytest.raises(CheckpointError, match=r"out could not be written: .* No space left .*; free disk space"):
        export.run(find_run_policy(str(run)), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_a_policy_that_the_run_removes_meanwhile_is_not_exported(
    run: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, write = find_run_policy(str(run), step=7), export.write_whole

    def remove(folder: Path, target: Path, dtype: Any) -> None:
        if moment == "after":
            write(folder, target, dtype)
        if moment == "half":
            (folder / "chat_template.jinja").unlink()
        else:
            folder.parent.rename(folder.parent.with_name(".trash-step_000007"))
        if moment != "after":
            write(folder, target, dtype)

    monkeypatch.setattr(export, "write_whole", remove)
    with pytest.raises(ConfigError, match="the run has removed it meanwhile, .*; repeat the command"):
        export.run(policy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_that_serves_a_folder_exists_in_both_packages_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "version", lambda _name: "1")
    assert export.serve_command("x", "--enable-lora") == "vllm serve x --host 127.0.0.1 --enable-lora"

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(export, "version", absent)
    expected = "python -m vllm.entrypoints.openai.api_server --model x --host 127.0.0.1 --gpu-memory-utilization 0.3"
    assert export.serve_command("x") == expected


def test_an_earlier_export_is_replaced_only_if_the_user_says_so(run: Path, tmp_path: Path) -> None:
    policy, output = find_run_policy(str(run), None, None), tmp_path / "out"
    export.run(policy, output)
    (output / "config.json").write_text("changed")
    with pytest.raises(
        ConfigError, match="found files in it; choose another name, or replace the earlier export with "
    ):
        export.run(policy, output)
    assert (output / "config.json").read_text() == "changed"
    assert export.run(policy, output, overwrite=True).startswith("the earlier export is replaced, its README.md too\n")
    assert (output / "config.json").read_text() != "changed"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".out")) == []


def test_what_others_put_into_an_earlier_export_is_never_removed(run: Path, tmp_path: Path) -> None:
    policy, output = find_run_policy(str(run), None, None), tmp_path / "out"
    export.run(policy, output)
    (output / ".git").mkdir()
    for name in ("model.gguf", "notes.md", "a", "b", "c", "tokenizer.json.bak"):
        (output / name).write_text("mine")
    before = digests(output)
    with pytest.raises(ConfigError, match=r"found \.git, a, b, c, model\.gguf and 2 more; move them away, or choose"):
        export.run(policy, output, overwrite=True)
    assert digests(output) == before


def test_an_earlier_export_of_another_form_is_replaced(run: Path, adapted_run: Path, tmp_path: Path) -> None:
    output, forms = tmp_path / "out", [("whole", True), ("adapter", False), ("merged", True)]
    for form, merge in forms:
        policy = find_run_policy(str(run if form == "whole" else adapted_run), None, None)
        export.run(policy, output, merge=merge, overwrite=True)
    assert not (output / "adapter_config.json").exists()
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "vocab.json", "tokenizer.model"):
        (output / name).write_text("of a larger model")
    export.run(policy, output, overwrite=True)
    assert not (output / "vocab.json").exists()


def test_a_folder_of_something_else_is_never_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("# mine")
    with pytest.raises(ConfigError, match="found files in it; choose another name$"):
        export.run(find_run_policy(str(run), None, None), tmp_path / "mine", overwrite=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]


def test_an_export_that_fails_keeps_the_earlier_one(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, output, rename = find_run_policy(str(run), None, None), tmp_path / "out", os.rename
    export.run(policy, output)
    before = digests(output)

    def fails(source: Path, target: Path) -> None:
        if source.name.endswith(".unfinished"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(export.os, "rename", fails)
    with pytest.raises(CheckpointError, match="could not be written"):
        export.run(policy, output, overwrite=True)
    assert digests(output) == before


def test_a_damaged_policy_is_named_by_its_own_path(run: Path, tmp_path: Path) -> None:
    policy = find_run_policy(str(run), None, None)
    os.truncate(policy.folder / "model.safetensors", 100)
    with pytest.raises(DamagedFileError) as caught:
        export.run(policy, tmp_path / "out")
    assert str(policy.folder / "model.safetensors") in caught.value.message
    assert caught.value.message.endswith("; restore the file, or choose another policy with --stage or --step")
    assert not (tmp_path / "out").exists()
