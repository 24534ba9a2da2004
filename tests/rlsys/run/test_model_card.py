"""The model card of an exported policy."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from exported_runs import write_run

from rlsys.run.model_card import SERVE, CardFacts, model_card
from rlsys.run.policies import find_run_policy

FACTS = CardFacts(
    name="my-model", form="whole model", adapter_rank=0, dtype="bf16", parameters=1234567, digest="abc",
    base_id=None, base_name="base (a local folder)", has_template=True,
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    return write_run(tmp_path / "run", tmp_path / "policy")


def card(run: Path, facts: CardFacts = FACTS, **choice: Any) -> str:
    policy = find_run_policy(str(run), **choice)
    return model_card(policy, facts, policy.folder)


def head(text: str) -> dict[str, Any]:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_has_the_facts_of_the_run(run: Path) -> None:
    text = card(run)
    assert "| greedy reward | 0.725 |" in text
    config = hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest()
    for row in (
        "| base model | base (a local folder) |",
        "| stages | warm_start (3 steps), online (5 of 5 steps) |",
        "| weight version | 8 training steps in all |",
        "| weights | whole model, 1,234,567 parameters, bf16 |",
        "| sha256 of config and weights | `abc` |",
        f"| sha256 of the run's config.yaml | `{config}` |",
        "| greedy accuracy | 0.750 | share of the held-out problems that greedy decoding solves |",
        "| completion length | 12.2 tokens | mean length of the held-out completions |",
    ):
        assert f"\n{row}\n" in text
    assert "on at most 256 problems that training does not use, with 2 samples for each (k)" in text
    assert (
        "\npython -m vllm.entrypoints.openai.api_server --model my-model --host 127.0.0.1\n" in text
        and 'AutoModelForCausalLM.from_pretrained("my-model"' in text
    )
    assert "apply_chat_template" in text and str(run) not in text
    assert head(text) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["rlsys", "reasoning"],
    }  # fmt: skip


def test_figures_of_another_policy_are_left_out(run: Path) -> None:
    text = card(run, step=7)
    assert "The run did not measure this policy." in text and "0.750" not in text
    assert "online (4 of 5 steps)" in text
    assert "0.750" in card(run, stage="warm_start")  # measured where the next stage begins
    (run / "metrics.jsonl").unlink()
    assert "| weight version | unknown training steps in all |" in card(run)


def test_an_adapter_is_of_the_library_peft_and_names_its_base(run: Path) -> None:
    text = card(run, replace(FACTS, form="adapter", adapter_rank=4, base_id="org/base"))
    assert head(text)["library_name"] == "peft" and head(text)["base_model"] == "org/base"
    assert head(text)["base_model_relation"] == "adapter"
    assert f"{SERVE} org/base --host 127.0.0.1 --enable-lora --max-lora-rank 4 --lora-modules policy=my-model" in text
    assert 'AutoPeftModelForCausalLM.from_pretrained("my-model"' in text
    local = card(run, replace(FACTS, form="adapter", adapter_rank=4))
    assert "base_model" not in head(local) and "BASE is the folder of the base model" in local
    merged = card(run, replace(FACTS, form="merged model", base_id="org/base"))
    assert head(merged)["base_model_relation"] == "finetune"


def test_a_card_says_how_prompts_and_samples_were_made(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text("{}")
    defaults = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 1.0}
    (tmp_path / "policy" / "generation_config.json").write_text(json.dumps(defaults))
    run = write_run(
        tmp_path / "run", tmp_path / "policy", stages=["online"], finished=["online"],
        task={"type": "dataset", "path": "train.jsonl", "prompt_template": "Q: {question}\nA:"},
    )  # fmt: skip
    text = card(run, replace(FACTS, has_template=False))
    assert "```text\nQ: {question}\nA:\n```" in text
    assert "(temperature 0.6, top_k 20)" in text
    assert 'tokenizer("QUESTION"' in text and "apply_chat_template" not in text
