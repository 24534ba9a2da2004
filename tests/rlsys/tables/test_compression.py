"""Bound on what a data file may expand to."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from rlsys.errors import DataError
from rlsys.tables import compression
from rlsys.tables.read import RowFile
from rlsys.tables.schemas import SUPERVISED
from rlsys.tables.sources import read_source

MIB = 2**20
PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}
LINE = json.dumps({"question": "x" * 10_000, "answer": "1"}).encode() + b"\n"


@pytest.fixture
def low_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file expand to 1 MiB instead of 64, so that bombs are small."""
    monkeypatch.setattr(compression, "ALWAYS_ALLOWED_MIB", 1)


def rows(path: Path) -> tuple[Any, ...]:
    return read_source(str(path), "train", "task.path").rows


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        rows(path)
    message = caught.value.message
    assert message.startswith(f"task.path {path}: expected at most 1 MiB from a file of {path.stat().st_size:,} bytes")
    assert "found more; if you trust the file, write it as .jsonl without compression" in message
    assert "\n" not in message
    return message


@pytest.mark.usefixtures("low_bound")
@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("kind", ["lines", "one line", "members"])
def test_a_compressed_bomb_is_refused_before_it_has_expanded(tmp_path: Path, ending: str, kind: str) -> None:
    pack, path = PACKED[ending], tmp_path / f"a.jsonl{ending}"
    content = LINE * 400 if kind == "lines" else b" " * 4 * MIB if kind == "one line" else LINE * 40
    path.write_bytes(pack(content) * (10 if kind == "members" else 1))
    assert path.stat().st_size < 10_000
    refused(path)


@pytest.mark.usefixtures("low_bound")
@pytest.mark.parametrize("content", [b"{}\n" * 20_000, b"q,a\n" * 20_000])
def test_many_tiny_rows_are_refused_because_each_costs_memory(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / ("a.csv.gz" if content.startswith(b"q") else "a.jsonl.gz")
    path.write_bytes(gzip.compress(content))
    assert len(content) < MIB / 10
    refused(path)


@pytest.mark.usefixtures("low_bound")
@pytest.mark.parametrize("ending", PACKED)
def test_no_more_is_expanded_than_the_bound_and_a_buffer(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sizes = tmp_path / f"a.jsonl{ending}", []
    path.write_bytes(PACKED[ending](LINE * 800))  # 8 MB
    add = compression.Expansion.add
    monkeypatch.setattr(compression.Expansion, "add", lambda self, size: (sizes.append(size), add(self, size)))
    refused(path)
    assert sum(sizes) < 1.5 * MIB


@pytest.mark.parametrize("ending", PACKED)
def test_small_files_with_a_large_ratio_and_large_files_below_the_ratio_are_read(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(PACKED[ending](LINE * 1000))  # 10 MB, more than 100 times the file
    assert path.stat().st_size * compression.MAX_RATIO < 10 * MIB
    assert len(rows(path)) == 1000
    monkeypatch.setattr(compression, "ALWAYS_ALLOWED_MIB", 0)
    draws = random.Random(0)
    lines = (
        b'{"question": "%d + %d", "answer": "1"}\n' % (draws.getrandbits(30), draws.getrandbits(30))
        for _ in range(5000)
    )
    path.write_bytes(PACKED[ending](b"".join(lines)))
    assert len(rows(path)) == 5000


@pytest.mark.usefixtures("low_bound")
@pytest.mark.parametrize("inner", ["a.parquet", "a.arrow"])
def test_a_table_in_a_compressed_file_has_the_same_bound(tmp_path: Path, inner: str) -> None:
    path = tmp_path / f"{inner}.gz"
    path.write_bytes(gzip.compress(b"\0" * 4 * MIB))
    refused(path)


def table(name: str) -> pa.Table:
    if name == "repeated texts":  # 600 bytes in the file
        return pa.table({"question": ["x" * 10_000] * 400, "answer": ["1"] * 400})
    if name == "dictionary":
        return pa.table({"question": pa.array(["x" * 10_000] * 400).dictionary_encode(), "answer": ["1"] * 400})
    if name == "nested":
        return pa.table({"question": [{"a": [{"b": "x" * 10_000}]}] * 400})
    return pa.table({"question": pa.nulls(200_000)})  # rows without content cost memory, too


@pytest.mark.usefixtures("low_bound")
@pytest.mark.parametrize("name", ["repeated texts", "dictionary", "nested", "nulls"])
@pytest.mark.parametrize("ending", [".parquet", ".feather", ".arrow"])
def test_a_table_that_expands_by_its_encoding_is_refused(tmp_path: Path, name: str, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(table(name), path, compression="zstd")
    elif ending == ".feather":
        pyarrow.feather.write_feather(table(name), path, compression="zstd")
    else:
        with pa.ipc.new_stream(path, table(name).schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as out:
            out.write_table(table(name))
    assert path.stat().st_size < 12_000
    refused(path)


@pytest.mark.usefixtures("low_bound")
def test_a_table_of_token_ids_has_the_same_bound(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    ids = pa.array([[7] * 1000] * 1000, pa.list_(pa.int32()))
    pyarrow.parquet.write_table(pa.table({"token_ids": ids, "loss_mask": [[True] * 1000] * 1000}), path)
    file = RowFile(str(path), "sft.path")
    with pytest.raises(DataError, match="sft.path .*: expected at most 1 MiB from a file of .* found more"):
        list(file.batches(SUPERVISED.subset("token_ids", "loss_mask")))


@pytest.mark.usefixtures("low_bound")
def test_declared_sizes_are_refused_before_anything_is_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    texts = pa.table({"question": ["x" * 2 * MIB, "y" * 2 * MIB]})
    pyarrow.parquet.write_table(texts, path, compression="zstd", use_dictionary=False, write_statistics=False)
    monkeypatch.setattr(compression.Expansion, "add", lambda self, size: pytest.fail("expanded"))
    refused(path)


def test_an_ordinary_table_of_many_short_rows_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    numbers = [str(number % 100) for number in range(300_000)]
    pyarrow.parquet.write_table(pa.table({"question": numbers, "answer": numbers}), path, compression="zstd")
    assert len(rows(path)) == 300_000


@pytest.mark.heavy
@pytest.mark.usefixtures("low_bound")
@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.zip", "train.parquet"])
def test_a_bomb_in_a_folder_is_refused_before_the_library_expands_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    if name == "train.parquet":
        texts = pa.table({"question": ["x" * 2 * MIB], "answer": ["1"]})
        pyarrow.parquet.write_table(texts, folder / name, compression="zstd", use_dictionary=False)
    elif name == "train.zip":
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("train.jsonl", LINE * 400)
    else:
        (folder / name).write_bytes(gzip.compress(LINE * 400))
    with pytest.raises(DataError, match=rf"task.path {folder}, file {name}: expected at most 1 MiB from a file of"):
        rows(folder)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_the_docs_say_the_bound() -> None:
    text = (Path(__file__).parents[3] / "docs" / "security.md").read_text(encoding="utf-8")
    bound = f"may expand to {compression.MAX_RATIO} times its size, and always to {compression.ALWAYS_ALLOWED_MIB} MiB"
    assert bound in text
