"""Model folders that would fail later are refused in one line, and whole folders of many kinds pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlsys.config.schema import FromScratchConfig
from rlsys.errors import ConfigError
from rlsys.models.checks import Use, check_model
from rlsys.models.folder import ModelFolder
from rlsys.models.scratch import build_from_scratch

SIZES = FromScratchConfig(hidden_size=32, layers=2, heads=1, intermediate_size=16, max_positions=256)
TRAINED = Use(longest=128, longest_field="actors.max_model_len", trained=True)
SERVED = Use(longest=128, longest_field="search.model.max_model_len")
Defect = Callable[[Path], None]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    build_from_scratch(SIZES, ("sum",), 0, folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def other_kind(folder: Path, kind: str, **values: Any) -> None:
    """Replace config and weights of a folder by those of another kind of model; its tokenizer stays."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **values)).save_pretrained(folder)


def edit(folder: Path, name: str, **values: Any) -> None:
    """Change keys of a JSON file."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def set_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def split(folder: Path, *, index: bool = True) -> None:
    """Turn the weight file into two shards, with or without their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for shard in set(places.values()):
        save_file({name: tensors[name] for name in places if places[name] == shard}, folder / shard)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def lose_a_shard(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def take_another_index(folder: Path) -> None:
    split(folder)
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    places["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00002.safetensors"
    edit(folder, "model.safetensors.index.json", weight_map=places)


def add_tokens(folder: Path, *tokens: str) -> None:
    tokenizer = ModelFolder(folder).tokenizer
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    tokenizer.save_pretrained(folder)


def use_new_tokens(folder: Path) -> None:
    add_tokens(folder, "<|turn|>")
    set_template(folder, "<|turn|>{{ messages[0]['content'] }}")


def name_a_new_end_token(folder: Path) -> None:
    tokenizer = ModelFolder(folder).tokenizer
    tokenizer.add_special_tokens({"eos_token": "<|done|>"})
    tokenizer.save_pretrained(folder)


def pad_vocabulary(folder: Path) -> None:
    """Give the model 100 rows more than its tokenizer has tokens, as many pretrained models have."""

    def pad(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.embed_tokens.weight"
        tensors[name] = torch.cat([tensors[name], torch.zeros(100, 32)])

    change_weights(folder, pad)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    edit(folder, "config.json", vocab_size=size + 100)


def name_an_unknown_end_token(folder: Path) -> None:
    pad_vocabulary(folder)
    edit(folder, "tokenizer_config.json", **{"eos_token": "<nosuch>"})


def name_no_end_token(folder: Path) -> None:
    """Leave the end token to the tokenizer's class, which has one that this tokenizer lacks."""
    pad_vocabulary(folder)
    path = folder / "tokenizer_config.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key != "eos_token"}
    path.write_text(json.dumps({**values, "tokenizer_class": "Qwen2Tokenizer"}))


def name_a_new_end_token_with_room(folder: Path) -> None:
    pad_vocabulary(folder)
    name_a_new_end_token(folder)


def end_every_text(folder: Path) -> None:
    """Make the tokenizer append its end token, as one with add_eos_token does, and drop the template."""
    (folder / "chat_template.jinja").unlink()
    path = folder / "tokenizer.json"
    ended = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
    }
    edit(folder, path.name, post_processor=ended)
    edit(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    other_kind(folder, "llama")


def name_templates(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    edit(
        folder, "tokenizer_config.json", chat_template=[{"name": "rag", "template": "a"}, {"name": "b", "template": ""}]
    )


def end_ids(*tokens: Any) -> Defect:
    return lambda folder: edit(folder, "generation_config.json", eos_token_id=list(tokens))


def template(text: str) -> Defect:
    return lambda folder: set_template(folder, text)


def configured(**values: Any) -> Defect:
    return lambda folder: edit(folder, "config.json", **values)


def layers(count: int) -> Defect:
    return configured(num_hidden_layers=count, layer_types=None)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Defect:
    return lambda folder: change_weights(folder, change)


PARTS = "{% for part in messages[0]['content'] %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
HEAD = "lm_head.weight"
BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"
UP = "model.layers.1.mlp.up_proj.weight"
DEFECTS: dict[str, tuple[Defect, str]] = {
    "shard missing": (lose_a_shard, "index.json names model-00002-of-00002.safetensors, which is missing"),
    "index missing": (lambda folder: split(folder, index=False), "expected model.safetensors, or .*index.json"),
    "index of another model": (take_another_index, "holds the tensor model.layers.9.*, but it does not"),
    "index damaged": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
        "index.json is damaged: expected a JSON object with a weight_map",
    ),
    "other weights beside": (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors"),
        "found also adapter_model.safetensors",
    ),
    "more layers than weights": (layers(3), r"tensor model.layers.2.\S+ is missing, and \d+ more"),
    "fewer layers than weights": (layers(1), r"no place for tensor model.layers.1\."),
    "layers that contradict their kinds": (configured(num_hidden_layers=3), "num_hidden_layers"),
    "another width": (configured(intermediate_size=24), r"has shape \[32, 16\], config.json makes it \[32, 24\]"),
    "another vocabulary": (configured(vocab_size=400), r"embed_tokens.weight has shape .*makes it \[400, 32\]"),
    "no output layer": (configured(tie_word_embeddings=False), "tensor lm_head.weight is missing"),
    "a tensor lost": (weights(lambda tensors: tensors.pop(UP)), f"tensor {UP} is missing"),
    "no layers": (layers(0), r"no place for tensor model.layers.0\."),
    "layers without end": (layers(10**5), "num_hidden_layers is 100000, and the weights have only"),
    "a head of another program": (
        weights(lambda tensors: tensors.update({"v_head.summary.weight": torch.zeros(1, 32)})),
        "no place for tensor v_head.summary.weight",
    ),
    "an output layer that differs from a tied one": (
        weights(lambda tensors: tensors.update({HEAD: tensors["model.embed_tokens.weight"] + 1})),
        f"config.json ties {HEAD} to model.embed_tokens.weight, but their values differ; set tie_word_embeddings to",
    ),
    "weights of whole numbers": (
        weights(lambda tensors: tensors.update({UP: tensors[UP].to(torch.int32)})),
        f"expected weights in fp32, bf16 or fp16, found tensor {UP} of I32",
    ),
    "padding beyond the model": (configured(pad_token_id=9999), "a pad_token_id below .*, found 9999; set it to"),
    "architectures as text": (configured(architectures="Qwen2ForCausalLM"), r"\['Qwen2ForCausalLM'\].* found 'Qwen2"),
    "compressed": (configured(compression_config={"quant_method": "x"}), r"quantised ones: compression_config.*\(x\)"),
    "impossible sizes": (configured(num_attention_heads=0), "config.json"),
    "no key-value heads": (
        configured(num_key_value_heads=0),
        "does not describe a Qwen2ForCausalLM: num_key_value_heads is 0, expected 1 or more \\(ZeroDiv",
    ),
    "a size below 0": (configured(intermediate_size=-1), "intermediate_size is -1, expected 1 or more"),
    "unknown activation": (
        configured(hidden_act="nosuch"),
        "does not describe a Qwen2ForCausalLM: hidden_act is 'nosuch', expected one of .*gelu, .*silu",
    ),
    "unknown kind of positions": (
        configured(rope_parameters={"rope_type": "nosuch", "rope_theta": 1e4}),
        "rope_parameters.rope_type is 'nosuch', expected one of default, .*yarn",
    ),
    "unknown kind of positions, older key": (
        configured(rope_parameters=None, rope_scaling={"type": "nosuch", "factor": 2.0}),
        "rope_scaling.type is 'nosuch', expected one of default, .*yarn",
    ),
    "unknown kind": (configured(model_type="qwen9"), "model_type 'qwen9'"),
    "not causal": (configured(model_type="clip"), "model.path .*config.json|no causal language model"),
    "another architecture": (configured(architectures=["Qwen2ForReward"]), r"\['Qwen2ForCausalLM'\].*Qwen2ForReward"),
    "quantised": (configured(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised ones.*gptq"),
    "quantised without saying so": (
        weights(lambda tensors: tensors.update({UP.replace("weight", "qweight"): torch.zeros(2, 2)})),
        "quantised ones: tensor .*qweight",
    ),
    "experts": (lambda folder: other_kind(folder, "mixtral", **EXPERTS), r"mixture-of-experts.*num_local_experts 4"),
    "end token as text": (end_ids("<eos>"), "expected a token id or a list of ids as eos_token_id, found '<eos>'"),
    "end token as a truth value": (end_ids(True), "eos_token_id, found True"),
    "end token beyond the model": (end_ids(1, 99999), "found 99999 in generation_config.json"),
    "end token below 0": (end_ids(-1), "found -1 in generation_config.json"),
    "end token of config.json as text": (configured(eos_token_id=["<eos>"]), "config.json: expected a token id"),
    "end token of config.json beyond the model": (configured(eos_token_id=5000), "found 5000 in config.json"),
    "end token of the tokenizer beyond the model": (name_a_new_end_token, r"found \d+ in the tokenizer"),
    "end token that the tokenizer lacks": (
        lambda folder: edit(folder, "tokenizer_config.json", **{"eos_token": "<nosuch>"}),
        r"eos_token a token that the tokenizer has, found '<nosuch>' \(tokenizer_config.json\), which is in no file",
    ),
    "end token that the tokenizer lacks, in a padded vocabulary": (name_an_unknown_end_token, "found '<nosuch>'"),
    "end token of the tokenizer's class, in a padded vocabulary": (
        name_no_end_token,
        r"found '<\|endoftext\|>' \(the default of its class, because tokenizer_config.json has no eos_token\)",
    ),
    "generation config not JSON": (
        lambda folder: (folder / "generation_config.json").write_text("{,"),
        "generation_config.json: expected JSON",
    ),
    "generation config a list": (
        lambda folder: (folder / "generation_config.json").write_text("[]"),
        "generation_config.json: expected a JSON object, found list",
    ),
    "token beyond the model": (use_new_tokens, r"token id \d+ \('<\|turn\|>'\) is beyond the vocabulary"),
    "template raises": (template("{{ raise_exception('needs a system message') }}"), "needs a system message"),
    "template of wrong syntax": (template("{% for message in messages %}"), "TemplateSyntaxError"),
    "template with a missing variable": (template("{{ persona.name }}{{ messages }}"), "UndefinedError"),
    "template with an error of Python": (template("{{ 1 / 0 }}"), "ZeroDivisionError"),
    "template of content parts": (template("<user>" + PARTS + "<assistant>"), "expected the question in its prompt"),
    "template that cuts the question": (template("{{ messages[0]['content'][:9] }}"), "expected the question"),
    "named templates": (name_templates, "expected a chat template that renders one user message"),
    "tokenizer that ends texts": (end_every_text, "the tokenizer ends it with the end token '<eos>'"),
}


@pytest.mark.parametrize("case", DEFECTS)
def test_a_folder_that_would_fail_later_is_refused_in_one_line(case: str, folder: Path) -> None:
    spoil, message = DEFECTS[case]
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        check_model(ModelFolder(folder), TRAINED)
    assert caught.value.message.startswith(f"model.path {folder}")
    assert "\n" not in caught.value.message


def test_more_tokens_than_positions_are_refused(folder: Path) -> None:
    check_model(ModelFolder(folder), Use(longest=256, longest_field="actors.max_model_len", trained=True))
    with pytest.raises(ConfigError, match=r"^actors.max_model_len 257 exceeds the 256 positions .*position_embeddings"):
        check_model(ModelFolder(folder), Use(longest=257, longest_field="actors.max_model_len", trained=True))


@pytest.mark.parametrize(("kind", "longest"), [("linear", 512), ("dynamic", 512), ("yarn", 256)])
def test_scaled_positions_count_as_the_engine_counts_them(kind: str, longest: int, folder: Path) -> None:
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 100.0, "original_max_position_embeddings": 128}
    edit(folder, "config.json", rope_parameters=rope)
    check_model(ModelFolder(folder), Use(longest=longest, longest_field="actors.max_model_len"))
    with pytest.raises(ConfigError, match="positions of the model"):
        check_model(ModelFolder(folder), Use(longest=longest + 1, longest_field="actors.max_model_len"))


KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 16},
    "llama": {"tie_word_embeddings": True},
    "mistral": {},
    "gemma2": {"head_dim": 16},
    "gemma3_text": {"head_dim": 16},
    "phi3": {},
    "olmo2": {},
    "gpt2": {"n_positions": 256, "n_inner": 32},
    "granite": {},
    "cohere": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_whole_folders_of_many_kinds_pass(kind: str, folder: Path) -> None:
    other_kind(folder, kind, **KINDS[kind])
    check_model(ModelFolder(folder), TRAINED)


HARMLESS: dict[str, Defect] = {
    "as built": lambda folder: None,
    "two shards": split,
    "sampling defaults that no engine reads": lambda folder: edit(
        folder, "generation_config.json", temperature="hot", do_sample=True
    ),
    "an unknown class of tokenizer beside tokenizer.json": lambda folder: edit(
        folder, "tokenizer_config.json", tokenizer_class="FooTokenizer"
    ),
    "no generation config": lambda folder: (folder / "generation_config.json").unlink(),
    "no chat template": lambda folder: (folder / "chat_template.jinja").unlink(),
    "tokens beyond the model that no prompt has": lambda folder: add_tokens(folder, "<|image|>"),
    "an added end token in a padded vocabulary": name_a_new_end_token_with_room,
    "a template that trims the question": template("{{ messages[0]['content'] | trim }}"),
    "a template with unused variables": template("{% if thinking %}x{% endif %}{{ messages[0].content }}"),
    "an output layer beside a tied one": weights(
        lambda tensors: tensors.update({HEAD: tensors["model.embed_tokens.weight"].clone()})
    ),
    "old buffers": weights(lambda tensors: tensors.update({BUFFER: torch.zeros(16)})),
    "weights in fp64": weights(
        lambda tensors: tensors.update({name: value.double() for name, value in tensors.items()})
    ),
    "a default among named templates": lambda folder: edit(
        folder,
        "tokenizer_config.json",
        chat_template=[{"name": "default", "template": "{{ messages[0].content }}"}, {"name": "rag", "template": ""}],
    ),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_unusual_folders_that_work_pass(case: str, folder: Path) -> None:
    HARMLESS[case](folder)
    check_model(ModelFolder(folder), TRAINED)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_token_beside_the_tokenizers_own_that_it_lacks_is_noted(name: str, folder: Path) -> None:
    pad_vocabulary(folder)
    assert check_model(ModelFolder(folder), TRAINED) == ()
    own, last = ModelFolder(folder).tokenizer.eos_token_id, json.loads((folder / "config.json").read_text())
    edit(folder, name, eos_token_id=[own, last["vocab_size"] - 1])
    (note,) = check_model(ModelFolder(folder), TRAINED)
    assert f"{name} names the end token {last['vocab_size'] - 1}, which the tokenizer lacks" in note


def test_an_empty_template_is_noted(folder: Path) -> None:
    set_template(folder, "")
    (note,) = check_model(ModelFolder(folder), TRAINED)
    assert note.startswith(f"model.path {folder}: the chat template is empty")


@pytest.mark.parametrize("case", ["experts", "quantised", "another architecture", "unknown kind"])
def test_a_model_that_is_not_trained_may_be_one_that_only_the_engine_knows(case: str, folder: Path) -> None:
    DEFECTS[case][0](folder)
    check_model(ModelFolder(folder), SERVED)


def test_a_model_that_is_not_trained_needs_its_question_too(folder: Path) -> None:
    set_template(folder, PARTS)
    with pytest.raises(ConfigError, match=rf"^search.model.path {folder}: expected the question in its prompt"):
        check_model(ModelFolder(folder, "search.model.path"), SERVED)
