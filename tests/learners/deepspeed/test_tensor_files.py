"""Named tensors on disk, in the layout that transformers opens."""

from __future__ import annotations

import contextlib
import errno
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from learners.deepspeed.tensor_files import read_tensors, write_tensors
from rlsys import fault_injection as faults
from rlsys.errors import CheckpointError


def numbered(count: int) -> list[tuple[str, torch.Tensor]]:
    return [(f"t{number:02d}", torch.full((8,), float(number))) for number in range(count)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("shard_bytes", "files"), [(10**6, 1), (64, 3), (1, 5), (160, 1), (161, 1), (159, 1)])
def test_tensors_are_read_in_the_order_of_writing(shard_bytes: int, files: int, tmp_path: Path) -> None:
    # 5 tensors of 32 bytes; a shard closes at the first tensor that fills it: 64 bytes hold 2.
    write_tensors(iter(numbered(5)), tmp_path, "exp_avg", True, shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    tensors = list(read_tensors(tmp_path, "exp_avg"))
    assert [name for name, _ in tensors] == [name for name, _ in numbered(5)]
    assert all(torch.equal(got, sent) for (_, got), (_, sent) in zip(tensors, numbered(5), strict=True))


def test_one_file_has_no_index_and_several_have_one(tmp_path: Path) -> None:
    write_tensors(numbered(2), tmp_path / "one", "model", True)
    assert names(tmp_path / "one") == ["model.safetensors"]
    write_tensors(numbered(3), tmp_path / "two", "model", True, shard_bytes=64)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert names(tmp_path / "two") == [first, second, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "two" / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 96}, "weight_map": {"t00": first, "t01": first, "t02": second}}


def test_a_rank_that_does_not_write_still_gathers(tmp_path: Path) -> None:
    tensors = iter(numbered(3))
    write_tensors(tensors, tmp_path / "policy", "model", False)
    assert list(tensors) == []  # the iterator is exhausted: gathering is collective
    assert not (tmp_path / "policy").exists()


def test_a_stem_that_begins_like_another_is_another(tmp_path: Path) -> None:
    write_tensors(numbered(3), tmp_path, "exp_avg", True, shard_bytes=1)
    write_tensors([("x", torch.ones(1))], tmp_path, "exp_avg_sq", True)
    assert [name for name, _ in read_tensors(tmp_path, "exp_avg")] == ["t00", "t01", "t02"]
    assert [name for name, _ in read_tensors(tmp_path, "exp_avg_sq")] == ["x"]


def test_dtypes_views_and_ties_survive(tmp_path: Path) -> None:
    shared = torch.arange(6, dtype=torch.bfloat16)
    tensors = [("whole", shared), ("view", shared[2:4]), ("transposed", torch.arange(6.0).reshape(2, 3).T)]
    write_tensors(tensors, tmp_path, "model", True)
    restored = dict(read_tensors(tmp_path, "model"))
    assert restored["whole"].dtype == torch.bfloat16
    assert all(torch.equal(restored[name], tensor) for name, tensor in tensors)


@pytest.mark.parametrize("shard_bytes", [10**9, 2000])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_opens_as_a_model(tied: bool, shard_bytes: int, tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    model = Qwen2ForCausalLM(config)
    write_tensors(model.named_parameters(), tmp_path, "model", True, shard_bytes)
    config.save_pretrained(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_bytes == 2000)
    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name


def test_missing_and_damaged_files_are_checkpoint_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no exp_avg\.safetensors"):
        list(read_tensors(tmp_path, "exp_avg"))
    (tmp_path / "exp_avg.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(CheckpointError, match=r"exp_avg\.safetensors: not a safetensors file"):
        list(read_tensors(tmp_path, "exp_avg"))
    save_file({"t": torch.zeros(100)}, tmp_path / "exp_avg.safetensors")
    whole = (tmp_path / "exp_avg.safetensors").read_bytes()
    (tmp_path / "exp_avg.safetensors").write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        list(read_tensors(tmp_path, "exp_avg"))


@contextlib.contextmanager
def small_disk() -> Iterator[None]:
    """Limit files to 8 KiB. Keep it short, because the limit also applies to the output file of pytest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10**5, 10**6])
def test_a_file_that_does_not_fit_is_an_error_after_all_tensors_were_gathered(size: int, tmp_path: Path) -> None:
    # The shard that fails is the first of two; other ranks gather for the second one too.
    tensors = iter([("small", torch.ones(8)), ("large", torch.ones(size)), ("last", torch.ones(8))])
    expected = r"policy: model cannot be written: .*File too large.*run\.dir full"
    with pytest.raises(CheckpointError, match=expected), small_disk():
        write_tensors(tensors, tmp_path / "policy", "model", True, shard_bytes=10**5)
    assert list(tensors) == []


def test_a_folder_that_cannot_be_made_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "policy").write_text("a file")
    tensors = iter(numbered(3))
    with pytest.raises(CheckpointError, match="policy: model cannot be written: "):
        write_tensors(tensors, tmp_path / "policy", "model", True)
    assert list(tensors) == []


@pytest.mark.parametrize("writes", [True, False])
def test_a_full_disk_can_be_injected_on_any_rank(writes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_faults", faults.parse("checkpoint.learner@file=critic:full"))
    tensors = iter(numbered(3))
    with pytest.raises(CheckpointError) as raised:
        write_tensors(tensors, tmp_path / "critic", "model", writes)
    assert isinstance(raised.value.__cause__, OSError) and raised.value.__cause__.errno == errno.ENOSPC
    assert list(tensors) == []
    write_tensors(numbered(3), tmp_path / "policy", "model", True)
