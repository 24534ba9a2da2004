"""Errors of living processes: which exceptions would come again."""

from __future__ import annotations

import pickle

import pytest

from rlsys.errors import EngineError, LearnerRaisedError, RaisedError, failed


@pytest.mark.parametrize(
    "error",
    [
        IndexError("index out of range in self"),
        KeyError(7),
        ValueError("shape [3]"),
        AttributeError("'NoneType' has no attribute 'mlp'"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ],
    ids=repr,
)
def test_an_exception_of_a_computation_would_come_again(error: Exception) -> None:
    result = failed("learner rank 1", error)
    assert type(result) is RaisedError
    assert result.message == f"learner rank 1 failed: {type(error).__name__}: {error}"
    assert result.exception == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    "error",
    [
        IndexError("index out of range in memory of peers"),
        TypeError("got an unexpected keyword argument 'socket'"),
        RuntimeError("CUDA error: device-side assert triggered"),
    ],
    ids=repr,
)
def test_words_of_a_device_do_not_excuse_a_fault_of_the_input(error: Exception) -> None:
    assert type(failed("learner rank 0", error)) is RaisedError


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(28, "No space left on device"),
        ConnectionResetError("reset"),
        TimeoutError("late"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: an illegal instruction was encountered"),
        RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"),
    ],
    ids=repr,
)
def test_memory_files_devices_and_connections_may_recover(error: Exception) -> None:
    assert type(failed("actor 0", error)) is EngineError


def test_the_message_is_one_line_of_limited_length() -> None:
    message = failed("actor 0", ValueError("a\n  b" + "c" * 5000)).message
    assert message.startswith("actor 0 failed: ValueError: a bccc") and len(message) < 1100


def test_the_exception_crosses_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(LearnerRaisedError("learner rank 0 failed: KeyError: 7", "KeyError: 7")))
    assert (type(error), error.exception) == (LearnerRaisedError, "KeyError: 7")
