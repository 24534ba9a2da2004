"""Rows of the table of faults for bad input: what the tests of the command line show, counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import test_bad_input_cli as fresh
import test_bad_resume_cli as resumed
import test_compare as fields
from reliability import recorded
from test_bad_input_cli import accepted, nothing_starts
from test_bad_resume_cli import model, refused_resume

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(1800)]
__all__ = ["accepted", "model", "nothing_starts", "refused_resume"]  # fixtures
REFUSED = "one line that names the field or file, exit code 2, nothing is started or written"


@pytest.fixture
def each(tmp_path: Path) -> Callable[[Sequence[Any]], Iterator[tuple[Path, Any]]]:
    """Every case of a kind with an empty folder of its own."""

    def folders(cases: Sequence[Any]) -> Iterator[tuple[Path, Any]]:
        for number, case in enumerate(cases):
            folder = tmp_path / str(number)
            folder.mkdir()
            yield folder, case

    return folders


def row(fault: str, injection: str, times: int, promise: str = REFUSED) -> Any:
    return recorded(fault=fault, promise=promise, injection=injection, runs=times)


def test_wrong_config_on_resume(each) -> None:
    cases = [(kind, field) for kind, names in fields.FIXED.items() for field in names]
    promise = "refused, with the field and both values"
    with row("wrong config on resume", "every field that is fixed, changed", len(cases), promise):
        for folder, case in each(cases):
            fields.test_every_fixed_field_is_refused(*case, folder)


def test_other_data_model_or_tokenizer_on_resume(each, refused_resume, model: Path) -> None:
    with row("other data, model or tokenizer on resume", ", ".join(resumed.CHANGES), len(resumed.CHANGES)):
        for folder, change in each(list(resumed.CHANGES)):
            resumed.test_what_a_resumed_run_reads_must_be_what_it_read(refused_resume, folder, model, change)


def test_bad_rows(each, refused, accepted) -> None:
    promise = "skipped, counted and named up to task.max_bad_rows, the run refused above it"
    with row("corrupt row of a data set", ", ".join(fresh.BAD_ROWS), len(fresh.BAD_ROWS), promise):
        for folder, case in each(list(fresh.BAD_ROWS.values())):
            fresh.test_bad_rows_are_counted_and_above_the_limit_refused(refused, accepted, folder, *case)


def test_data_sets_that_leave_nothing(each, refused) -> None:
    with row("unusable data set", ", ".join(name for name, *_ in fresh.ROWS), len(fresh.ROWS)):
        for folder, (_, *case) in each(fresh.ROWS):
            fresh.test_bad_data_set(refused, folder, *case)


def test_prompts_at_the_limit(each, refused, accepted) -> None:
    promise = "the longest that fits is accepted, one token more is refused by name"
    with row("prompt longer than the model's room", "to the token, in both splits", 2, promise):
        for folder, place in each([3, 10]):
            fresh.test_a_prompt_fits_to_the_token(refused, accepted, folder, place)
