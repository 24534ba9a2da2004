"""Matrix products on CPUs that MKL knows badly.

torch computes fp32 products on x86 by MKL, whose kernels for processors of other makers than Intel use half of the
width of AVX-512. oneDNN, which torch uses for bf16, uses all of it: 1.8 to 2.3 times the speed on an AMD EPYC for the
shapes of a 135M model, with the same rounding error.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CPU_INFO = Path("/proc/cpuinfo")


@functools.cache  # which keeps the kernels in use
def fast_products() -> torch.library.Library | None:
    """Let this process compute products of fp32 matrices by oneDNN where that is faster; None if it is not."""
    if not suits_onednn(CPU_INFO):
        return None
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that these kernels take the place of others
        for name, function in (("mm", _mm), ("addmm", _addmm)):
            kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
            library.impl(name, functools.partial(function, kernel), "CPU", with_keyset=True)
    return library


def suits_onednn(cpu_info: Path) -> bool:
    """Return whether the processor has AVX-512 and is not made by Intel."""
    try:
        text = cpu_info.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "GenuineIntel" not in text and "avx512f" in text and torch.backends.mkldnn.is_available()


def _mm(kernel: Any, keys: Any, first: Tensor, second: Tensor) -> Tensor:
    if _fits(first) and _fits(second):
        return _product(first, second, None)
    result: Tensor = kernel.call_boxed(keys, first, second)
    return result


def _addmm(
    kernel: Any, keys: Any, bias: Tensor, first: Tensor, second: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    if beta == 1 and alpha == 1 and bias.dim() == 1 and bias.is_contiguous() and _fits(first) and _fits(second):
        return _product(first, second, bias)
    result: Tensor = kernel.call_boxed(keys, bias, first, second, beta=beta, alpha=alpha)
    return result


def _product(first: Tensor, second: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(first, second.t(), bias, "none", [], "")
    return product


def _fits(matrix: Tensor) -> bool:
    """Return whether oneDNN takes a matrix as it lies in memory: fp32, not empty, with one stride of 1."""
    rows, columns = matrix.shape
    return (
        matrix.dtype == torch.float32
        and rows > 0
        and columns > 0
        and (matrix.stride() == (columns, 1) or matrix.stride() == (1, rows))
    )
