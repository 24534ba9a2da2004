"""The shipped config for GPUs, made small enough for two CPU cores and a tiny model."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from bpe_model import build_bpe_model
from real_runs import REPOSITORY

CONFIGS = REPOSITORY / "configs"
GSM8K = CONFIGS / "qwen2.5_1.5b_gsm8k_joint.yaml"
ANSWERS = "2345"
CHAINS = tuple(f"<thinking>{digit}</thinking>\n<answer>{digit}</answer>" for digit in ANSWERS)
SURENESS = 14.0  # logits of the tokens that may follow one in CHAINS; those of all others have a deviation near 3
# Where it runs, how much of it, and in which number format. The method stays as the file says.
ON_A_CPU = (
    "run.device=cpu",
    "task.subset=null",  # of the hub's data set, whose rows are a local file here
    "actors.count=2",
    "actors.dtype=fp32",
    "actors.max_model_len=768",
    "actors.max_num_seqs=32",
    "actors.kv_cache_gib=0.1",
    "actors.enforce_eager=true",
    "sampling.max_tokens=24",
    "learner.ranks=2",
    "learner.dtype=fp32",
    "learner.micro_batch_tokens=2048",
    "train.max_steps=2",
    "train.groups_per_step=8",
    "search.max_node_tokens=8",
    "search.stop.simulations=16",
    "evaluation.prompts=4",
)


def gsm8k_overrides(folder: Path) -> Sequence[str]:
    """For a run in `folder`/run. Model and data are written to `folder`.

    The data are those of GSM8K's own problems (RLSYS_DATA names their folder) that the tiny model can guess.
    """
    for name in ("train", "test"):
        lines = (Path(os.environ["RLSYS_DATA"]) / f"gsm8k_{name}.jsonl").read_text().splitlines(keepends=True)
        easy = [line for line in lines if re.search(f"#### [{ANSWERS}]$", json.loads(line)["answer"])]
        (folder / f"{name}.jsonl").write_text("".join(easy))
        if name == "train":
            write_model(folder / "model", [json.loads(line)["question"] for line in easy[:300]])
    return (
        f"run.dir={folder / 'run'}",
        f"model.path={folder / 'model'}",
        f"task.path={folder / 'train.jsonl'}",
        f"task.held_out_path={folder / 'test.jsonl'}",
        *ON_A_CPU,
    )


def write_model(folder: Path, texts: Sequence[str]) -> None:
    """Random weights but for the output layer, which makes tokens follow one another as in CHAINS.

    A model that is random throughout closes no node, and a tree without any whole chain counts as a failed rollout.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = build_bpe_model(folder, [*texts, *CHAINS * 50], 900, max_positions=1024)
    model = AutoModelForCausalLM.from_pretrained(folder)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        head = torch.nn.Linear(embedding.shape[1], embedding.shape[0], bias=False)
        head.weight.zero_()
        # The last norm leaves vectors of length sqrt(hidden_size).
        unit = torch.nn.functional.normalize(embedding, dim=1) / math.sqrt(embedding.shape[1])
        for (token, following), count in successors(tokenizer).items():
            head.weight[following] += (SURENESS + math.log(count)) * unit[token]
        for layer in model.model.layers:  # so that the last token decides
            layer.self_attn.o_proj.weight *= 0.02
            layer.mlp.down_proj.weight *= 0.02
    model.lm_head, model.config.tie_word_embeddings = head, False
    model.save_pretrained(folder)


def successors(tokenizer: Any) -> Counter[tuple[int, int]]:
    """How often a token follows another in CHAINS, as the assistant's turns."""
    asked = [{"role": "user", "content": "a"}]
    before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)[-1:]
    rows = [[*before, *tokenizer(chain)["input_ids"], tokenizer.eos_token_id] for chain in CHAINS]
    return Counter(pair for row in rows for pair in pairwise(row))
