"""What a step learns from beside its groups depends on seed, stage and step alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.json
import pyarrow.parquet as pq
import pytest
from fakes import NumberTask

from rlsys.config.files import parse_config
from rlsys.config.schema import Config
from rlsys.config.stages import ExtractedTable, stage_plan, stage_plans
from rlsys.data.batches import TrainingData
from rlsys.data.demonstrations import DemonstrationStream
from rlsys.data.rows import Reader
from rlsys.errors import ConfigError, DataError
from rlsys.types import TrainingBatch

ROWS, PAIRS = 7, 5
FILED = {"preference": {"weight": 1.0, "source": "file"}}


def config(stages: list[str], **sections: Any) -> Config:
    values = {"run": {"dir": "unused"}, "model": {"path": "unused"}, "task": {"type": "letter_count"}}
    return parse_config({**values, "stages": stages, **sections}, "test")


def write(folder: Path) -> tuple[str, str]:
    """Row n trains the token 10 + n; pair n has it as its chosen side, and its rejected side is 50."""
    rows = [{"token_ids": [1, 10 + n], "loss_mask": [False, True]} for n in range(ROWS)]
    sides = [{"chosen_ids": [1, 10 + n], "rejected_ids": [1, 50], "prompt_length": 1, "common_prefix": 1}
             for n in range(PAIRS)]  # fmt: skip
    paths = folder / "rows.jsonl", folder / "pairs.jsonl"
    for path, lines in zip(paths, (rows, sides), strict=True):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(paths[0]), str(paths[1])


def data(settings: Config, searched: Path = Path("nowhere")) -> TrainingData:
    rows = DemonstrationStream(
        NumberTask(4), lambda question, chain: ([1, 2, 3], [False, True, True]), seed=0, rows_per_step=3, max_tokens=8
    )
    return TrainingData(
        settings,
        Reader(None, 99, 64),
        {plan.name: rows for plan in stage_plans(settings) if plan.source("demonstrations")},
        searched,
    )


def offline(folder: Path, seed: int = 0, **sections: Any) -> TrainingData:
    rows, pairs = write(folder)
    return data(
        config(
            ["sft", "preference"],
            run={"dir": "unused", "seed": seed},
            sft={"path": rows, "rows_per_step": 3},
            preference={"path": pairs, "pairs_per_step": 2},
            objective={"preference": {"weight": 1.0}},
            **sections,
        )
    )


def trained(batch: TrainingBatch) -> list[int]:
    rows = [row.token_ids[-1] for row in batch.demonstrations]
    return [int(token) - 10 for token in (*rows, *(pair.chosen_ids[-1] for pair in batch.pairs))]


@pytest.mark.parametrize(("stage", "size", "count"), [("sft", ROWS, 3), ("preference", PAIRS, 2)])
def test_files_are_shuffled_epoch_by_epoch(tmp_path: Path, stage: Any, size: int, count: int) -> None:
    found = offline(tmp_path)
    steps = [trained(found.batch(stage, step)) for step in range(3 * size)]
    assert {len(step) for step in steps} == {count}
    asked = [number for step in steps for number in step]
    epochs = [asked[start : start + size] for start in range(0, len(asked), size)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = offline(tmp_path)
    assert [trained(again.batch(stage, step)) for step in (9, 0, 4)] == [steps[9], steps[0], steps[4]]
    other = offline(tmp_path, seed=1)
    assert [trained(other.batch(stage, step)) for step in range(3 * size)] != steps
    assert set(Counter(asked).values()) == {3 * count}


def test_every_stage_has_its_own(tmp_path: Path) -> None:
    rows, pairs = write(tmp_path)
    settings = config(
        ["warm_start", "sft", "online"],
        sft={"path": rows},
        preference={"path": pairs, "pairs_per_step": 2},
        objective={**FILED, "sft": {"weight": 0.5, "source": "demonstrations"}},
    )
    found = data(settings)
    sizes = {
        stage: (len(batch.demonstrations), len(batch.pairs), len(batch.groups))
        for stage in settings.stages
        for batch in [found.batch(stage, 0)]
    }
    assert sizes == {"warm_start": (3, 0, 0), "sft": (64, 0, 0), "online": (3, 2, 0)}
    plain = data(config(["online"]))
    assert plain.batch("online", 0) == TrainingBatch()


def test_pairs_carry_the_scores_of_the_reference_policy(tmp_path: Path) -> None:
    found = offline(tmp_path)
    assert {pair.chosen_reference for pair in found.batch("preference", 0).pairs} == {None}
    found.references = np.array([[-n, -n - 0.5] for n in range(PAIRS)])
    for pair in found.batch("preference", 1).pairs:
        number = float(pair.chosen_ids[-1] - 10)
        assert (pair.chosen_reference, pair.rejected_reference) == (-number, -number - 0.5)


def test_notes_and_fingerprint_are_of_the_files(tmp_path: Path) -> None:
    found = offline(tmp_path)
    assert found.notes == ()
    found.check()
    assert found.notes == ("sft: 7 rows", "preference: 5 pairs")
    before = found.fingerprint()
    assert set(before) == {"sft.path", "preference.path"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(path.read_text().replace("[1, 50]", "[1, 51]", 1))
    settings = found._config
    assert {name for name, digest in data(settings).fingerprint().items() if digest != before[name]} == {
        "preference.path"
    }
    assert data(config(["online"])).fingerprint() == {}


def test_without_a_path_the_stage_search_has_written_the_files(tmp_path: Path) -> None:
    rows, pairs = write(tmp_path)
    objective = {"preference": {"weight": 1.0}}
    settings = config(["search", "sft", "preference"], objective=objective)
    found = data(settings, tmp_path)
    found.check()  # nothing is read yet
    assert found.notes == () and set(found.fingerprint().values()) == {"stage search:"}
    with pytest.raises(DataError, match=r"^stage search: .*supervised\.parquet: no such file"):
        found.load("sft")
    for path, name in ((rows, "supervised"), (pairs, "preferences")):
        pq.write_table(pyarrow.json.read_json(path), tmp_path / f"{name}.parquet")
    assert (found.load("sft"), found.load("sft")) == (("sft: 7 rows",), ())
    assert found.load("preference") == ("preference: 5 pairs",)
    steps = config(["search", "preference"], objective={"preference": {"weight": 1.0, "pairs": "steps"}})
    with pytest.raises(DataError, match=r"step_preferences\.parquet: no such file"):
        data(steps, tmp_path).load("preference")


def searched(folder: Path, pairs: str = "chains") -> TrainingData:
    """Rows and pairs that the stage search has extracted; those of both kinds of pairs are the same."""
    rows, sides = write(folder)
    for path, name in ((rows, "supervised"), (sides, "preferences"), (sides, "step_preferences")):
        pq.write_table(pyarrow.json.read_json(path), folder / f"{name}.parquet")
    objective = {"preference": {"weight": 1.0, "pairs": pairs}}
    return data(config(["search", "sft", "preference"], objective=objective), folder)


def test_what_the_stage_search_has_extracted_has_a_digest_once_it_is_read(tmp_path: Path) -> None:
    found = searched(tmp_path)
    assert found.extracted() == {}
    found.load("sft")
    assert found.extracted() == {"sft.path": ExtractedTable(name="supervised", digest=found.rows().digest())}
    found.load("preference")
    trained = found.extracted()
    assert trained["preference.path"] == ExtractedTable(name="preferences", digest=found.pairs().digest())
    again = searched(tmp_path)
    again.load("preference")
    assert again.extracted()["preference.path"] == trained["preference.path"]
    assert offline(tmp_path).extracted() == {}


def test_other_extracted_rows_have_another_digest(tmp_path: Path) -> None:
    first = searched(tmp_path)
    first.load("sft"), first.load("preference")
    for stage, file, name, old, new in (
        ("sft", "rows.jsonl", "supervised", "[1, 13]", "[1, 14]"),
        ("preference", "pairs.jsonl", "preferences", "[1, 50]", "[1, 51]"),
    ):
        path = tmp_path / file
        path.write_text(path.read_text().replace(old, new, 1))
        pq.write_table(pyarrow.json.read_json(path), tmp_path / f"{name}.parquet")
        changed = data(first._config, tmp_path)
        changed.load(stage)
        assert changed.extracted()[f"{stage}.path"].digest != first.extracted()[f"{stage}.path"].digest


def test_the_table_of_pairs_follows_the_config(tmp_path: Path) -> None:
    for pairs, table in (("chains", "preferences"), ("steps", "step_preferences")):
        source = searched(tmp_path, pairs)
        source.load("preference")
        assert source.extracted()["preference.path"].name == table


@pytest.mark.parametrize(
    ("stages", "extract", "message"),
    [
        (["search", "sft"], {"supervised": "none"}, r"stage sft has no data: extract\.supervised is none"),
        (["search", "preference"], {"chosen": "none"}, r"no preference pairs: extract\.chosen leaves them out"),
    ],
)
def test_what_the_stage_search_will_not_write_is_found_at_the_start(
    stages: list[str], extract: dict[str, Any], message: str
) -> None:
    settings = config(stages, extract=extract, objective={"preference": {"weight": 1.0}})
    with pytest.raises(ConfigError, match=message):
        data(settings).check()


def test_a_search_of_held_out_problems_is_no_training_data() -> None:
    with pytest.raises(ConfigError, match=r"search\.split is held_out: the stages after"):
        data(config(["search", "sft"], search={"split": "held_out"})).check()


def test_what_needs_pairs_and_references(tmp_path: Path) -> None:
    path = {"path": str(tmp_path)}
    chosen = {"sft": {"weight": 1.0}, "preference": {"source": "file"}}
    cases = [
        (config(["online"]), False, False),
        (config(["online"], preference=path, objective=FILED), True, True),
        (config(["online"], preference=path, objective=chosen), True, False),  # the chosen sides alone
        (config(["online"], objective={"preference": {"weight": 1.0}}, search={"fraction": 0.5}), False, False),
    ]
    for settings, used, references in cases:
        plan = stage_plan(settings, "online")
        assert (plan.source("pairs") is not None, plan.scores_pairs) == (used, references)
    alone = config(["preference"], preference=path, objective={"sft": {"weight": 1.0}})
    plan = stage_plan(alone, "preference")
    assert plan.source("pairs") and not plan.scores_pairs
