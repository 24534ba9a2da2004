"""Products of matrices by oneDNN: the values and gradients of torch's own, in every form that a model uses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from learners.cpu_products import suits_onednn

# Runs in a process of its own, because the kernels stay in use.
PROGRAM = """
import torch
from learners import cpu_products
torch.manual_seed(0)

def values():
    torch.manual_seed(1)
    found = []
    for bias in (False, True):
        layer = torch.nn.Linear(5, 7, bias=bias)
        for shape in ((4, 5), (2, 3, 5), (1, 5), (0, 5)):
            x = torch.randn(shape, requires_grad=True)
            y = layer(x)
            y.square().sum().backward()
            found += [y.detach(), x.grad, layer.weight.grad.clone()]
    a, b = torch.randn(6, 4), torch.randn(4, 9)
    found += [a @ b, a.t().contiguous().t() @ b, a[::2] @ b, a[:, :1].expand(6, 4) @ b, b.t() @ a.t()]
    found += [a.double() @ b.double()]
    found += [torch.addmm(torch.randn(6, 9), a, b, beta=0.5, alpha=2), torch.mv(a, torch.randn(4))]
    return found

plain = values()
calls = []
whole = cpu_products._product
cpu_products._product = lambda *arguments: calls.append(1) or whole(*arguments)
cpu_products.suits_onednn = lambda path: True
assert cpu_products.fast_products() is cpu_products.fast_products() is not None
fast = values()
assert len(calls) > 20, len(calls)
for first, second in zip(plain, fast, strict=True):
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
"""


def test_values_and_gradients_are_those_of_torch() -> None:
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(
    ("text", "suits"),
    [
        ("vendor_id : AuthenticAMD\nflags : avx2 avx512f", True),
        ("vendor_id : AuthenticAMD\nflags : avx2", False),
        ("vendor_id : GenuineIntel\nflags : avx2 avx512f", False),
    ],
)
def test_only_wide_processors_that_mkl_knows_badly_change(text: str, suits: bool, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert suits_onednn(tmp_path / "cpuinfo") == suits
    assert not suits_onednn(tmp_path / "none")
