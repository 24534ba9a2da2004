"""Record what a checkpoint was trained on, and refuse to continue it with anything else.

The manifest of a checkpoint holds the record under `inputs`: one text for each config field or name.

    task.path: 3f5a...                             digest of data, model, teacher or tokenizer
    sft.path: stage search:                        rows that the stage `search` extracts, not yet read
    sft.path: stage search: supervised 8c1e...     table and digest of extracted rows that were read
    reference: 77d0...                             digest of the stage's reference policy
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlsys.config.compare import check_equal, differing_names, extraction_request
from rlsys.config.files import flat_fields
from rlsys.config.schema import Config
from rlsys.config.stages import SEARCHED, ExtractedTable, stage_plans
from rlsys.directory import RunDirectory
from rlsys.errors import ConfigError, DamagedFileError
from rlsys.files import read_json
from rlsys.plugins import PLUGIN
from rlsys.run.manifest import read_manifest
from rlsys.types import RunState

_REFERENCE = "reference"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Digests of everything that the policy of a checkpoint was trained on.

    Attributes:
        inputs: digests of data, model and tokenizer by config field. `SEARCHED` stands for rows that the stage `search`
            extracts.
        extracted: extracted tables that were read, by the config field that they replace.
        reference: digest of the policy that the stage began with, if a loss term refers to it.
    """

    inputs: Mapping[str, str]
    extracted: Mapping[str, ExtractedTable] = field(default_factory=dict)
    reference: str | None = None

    def to_json(self) -> dict[str, str]:
        """Return the record for the manifest, which `read_provenance` reads back."""
        tables = {name: f"{SEARCHED} {table.name} {table.digest}" for name, table in self.extracted.items()}
        return {**self.inputs, **tables, **({_REFERENCE: self.reference} if self.reference else {})}


def read_provenance(checkpoint: Path) -> Provenance:
    """Return the provenance that the manifest of a checkpoint records.

    Raises:
        ConfigError: the checkpoint has no record, because an older version of rlsys made it.
        DamagedFileError: the manifest cannot be read.
    """
    record = read_manifest(checkpoint)["info"].get("inputs")
    if record is None:
        raise ConfigError(
            f"{checkpoint} was made by an older version of rlsys, which did not record the contents of data, "
            "model and tokenizer; continue with that version, or start a new run.dir"
        )
    inputs, extracted = dict(record), {}
    for name, text in record.items():
        if text.startswith(f"{SEARCHED} "):
            table, digest = text.removeprefix(f"{SEARCHED} ").split(" ")
            inputs[name], extracted[name] = SEARCHED, ExtractedTable(name=table, digest=digest)
    return Provenance(inputs=inputs, extracted=extracted, reference=inputs.pop(_REFERENCE, None))


def check_inputs(checkpoint: Path | None, digests: Mapping[str, str]) -> None:
    """Raise if data, model or tokenizer differ from those that a checkpoint was trained with.

    Args:
        checkpoint: None for a run that begins anew, which has nothing to compare.
        digests: the present digests (`Inputs.fingerprint`).
    Raises:
        ConfigError: names the fields whose contents differ.
    """
    if checkpoint is None:
        return
    trained = read_provenance(checkpoint).inputs
    if "preference.path" in digests and "preference.path" not in trained:
        raise ConfigError(
            f"preference.path: {checkpoint} was trained without pairs of a file, which objective.preference or "
            "objective.sft asks for now; set these back, or start a new run.dir"
        )
    # A teacher or plug-in may come later, as any term may. A checkpoint of an older version has no digest of one.
    later = ("teacher.", PLUGIN)
    digests = {name: digest for name, digest in digests.items() if name in trained or not name.startswith(later)}
    names = differing_names({name: trained.get(name) for name in digests}, digests)
    if names:
        pairs = [f"expected sha256 {_short(trained.get(name))}, found {_short(digests[name])}" for name in names]
        raise ConfigError(
            f"{' and '.join(names)}: the contents differ from those that {checkpoint} was trained with "
            f"({'; '.join(pairs)}); put them back, or start a new run.dir"
        )


def check_extracted(checkpoint: Path, tables: Mapping[str, ExtractedTable], folder: Path) -> None:
    """Raise if the extracted rows differ from those this checkpoint was trained on.

    Args:
        tables: the extracted tables as they were read now, by config field.
        folder: the folder of the extracted tables, for the message.
    Raises:
        ConfigError: another table was read, or its rows differ.
    """
    trained = read_provenance(checkpoint).extracted
    for field_name, table in tables.items():
        before = trained.get(field_name, table)  # no record: the stage of the checkpoint had not read the table
        if before == table:
            continue
        if before.name != table.name:
            raise ConfigError(
                f"objective.preference.pairs: {checkpoint} was trained on {_pairs(before)}, found {_pairs(table)}; "
                "set it back, or start a new run.dir"
            )
        raise ConfigError(
            f"{folder / table.name}.parquet: the rows differ from those that {checkpoint} was trained "
            "with; put them back, or start a new run.dir"
        )


def check_reference(checkpoint: Path | None, policy: Path, digest: str) -> None:
    """Raise if the reference policy differs from the one that the stage of a checkpoint began with.

    Args:
        checkpoint: None at the beginning of a stage.
        policy: the folder of the reference policy.
        digest: its present digest.
    Raises:
        DamagedFileError: the digests differ.
    """
    trained = read_provenance(checkpoint).reference if checkpoint else None
    if trained not in (None, digest):  # None: a checkpoint of an older version
        raise DamagedFileError(
            f"{policy}: expected the policy that the stage began with, sha256 {trained}, found {digest}; restore "
            "the folder, or start a new run.dir"
        )


def check_extraction(config: Config, state: RunState, checkpoint: Path | None, prompts: int) -> None:
    """Raise if this config asks for other data than the finished stage `search` has extracted.

    Nothing is compared if the stage is still to come, or if no stage will read its data.

    Args:
        prompts: number of prompts that the config grows trees for.
    Raises:
        ConfigError: names the field that differs.
        DamagedFileError: the record of the stage cannot be read.
    """
    plans = stage_plans(config)
    if checkpoint is None or all(plan.trains for plan in plans[: state.stage]):
        return
    unfinished = plans[state.stage + (state.step >= plans[state.stage].steps) :]
    path = RunDirectory(checkpoint.parent.parent).search_stage.stage_record
    if not any(plan.reads_extracted for plan in unfinished) or not path.exists():
        return
    try:
        before, now = (
            flat_fields({"search": {"prompts": request["prompts"]}, "extract": request["extract"]})
            for request in (read_json(path)["asked"], extraction_request(config, prompts))
        )
    except (KeyError, TypeError):
        raise DamagedFileError(f"{path}: damaged; restore it, or start a new run.dir") from None
    check_equal(before, now, f"what the stage search has extracted ({path})")


def _pairs(table: ExtractedTable) -> str:
    """Return the value of objective.preference.pairs for a table of preference pairs."""
    return "chains" if table.name == "preferences" else "steps"


def _short(digest: str | None) -> str:
    """Return the first characters of a sha256; any other text is returned whole."""
    return digest[:12] if digest and re.fullmatch("[0-9a-f]{64}", digest) else digest or "none"
