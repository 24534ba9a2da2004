"""A running vLLM engine stops where a request says, with ids and log-probabilities aligned; prompts come from cache."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bpe_model import build_bpe_model
from stop_child import MAX_TOKENS, PROMPT, REQUESTS

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(200)]
HERE = Path(__file__).parent
ROUNDING = 2e-5  # fp32 log-probabilities summed in another order
BLOCK = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bpe")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=4)) for _ in range(60)]
    return build_bpe_model(folder, [" ".join(rng.choices(words, k=40)) for _ in range(50)], vocab_size=600)


@pytest.fixture(scope="module")
def measured(tokenizer: Any, folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "stop_child.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def first_length(tokenizer: Any, ids: list[int], text: str) -> int:
    """How many of the first tokens it takes until their text holds `text`."""
    decoded = (tokenizer.decode(ids[:n], skip_special_tokens=False) for n in range(1, len(ids) + 1))
    return next(n for n, prefix in enumerate(decoded, start=1) if text in prefix)


def test_a_stop_string_ends_the_completion_with_the_token_that_completes_it(measured, tokenizer) -> None:
    assert len(measured["strings"]) >= REQUESTS // 2
    ends_inside = 0
    for (seed, text), stopped in zip(measured["strings"], measured["stopped"], strict=True):
        free = measured["free"][seed]["ids"]
        length = first_length(tokenizer, free, text)
        assert stopped["ids"] == free[:length]
        assert stopped["finish_reason"] == "stop"
        ends_inside += not tokenizer.decode(stopped["ids"]).endswith(text)
    assert ends_inside > 0  # a last token that goes on after the string is among them


def test_log_probabilities_are_those_of_the_tokens_kept(measured) -> None:
    assert all(len(row["ids"]) == len(row["logprobs"]) for row in measured["stopped"] + measured["at_token"])
    assert measured["gap"] < ROUNDING


def test_a_stop_token_ends_the_completion_and_belongs_to_it(measured) -> None:
    token, hit = measured["token"], 0
    for free, stopped in zip(measured["free"], measured["at_token"], strict=True):
        if token in free["ids"]:
            hit += 1
            assert stopped["ids"] == free["ids"][: free["ids"].index(token) + 1]
            assert stopped["finish_reason"] == "stop"
        else:
            assert stopped["ids"] == free["ids"] and stopped["finish_reason"] == free["finish_reason"]
    assert hit > 0


def test_a_prompt_asked_again_comes_from_the_cache_and_is_counted(measured) -> None:
    cached = len(PROMPT) // BLOCK * BLOCK
    assert measured["first"]["cached"] == 0
    assert {row["cached"] for row in measured["free"]} == {cached}
    usage, rows = measured["usage"], [measured["first"], *measured["free"]]
    assert usage["cached_tokens"] == REQUESTS * cached
    assert usage["prompt_tokens"] == (REQUESTS + 1) * len(PROMPT)
    assert usage["generated_tokens"] == sum(len(row["ids"]) for row in rows)
    assert 0 < usage["busy_s"] <= usage["wall_s"]
    # The first request was alone for its steps; then at most all others ran together.
    assert 1 < usage["in_flight_mean"] < REQUESTS
    assert max(len(row["ids"]) for row in rows) <= MAX_TOKENS


def test_more_prompt_tokens_than_one_step_takes_are_no_failure(measured) -> None:
    assert len(measured["long"]) == 64 and all(len(row["ids"]) == len(row["logprobs"]) for row in measured["long"])
