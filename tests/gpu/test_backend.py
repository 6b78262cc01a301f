"""The triton backend where it cannot run: reasons are named, and device code is imported by the first launch only."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from forge_core.kernels import available_backends, library, swiglu

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(library.TRITON_INTERPRETED, reason="TRITON_INTERPRET=1 lets triton take tensors on the CPU")
def test_refuses_what_it_cannot_take() -> None:
    x = torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"triton: .*TRITON_INTERPRET=1.*on cpu; takes float32, .* torch\.float64"):
        swiglu(x, x, backend="triton")


def test_comes_after_compiled_kernels() -> None:
    for op, names in available_backends().items():
        assert names[-1] == "reference", op
        assert "triton" not in names or names.index("cpp") < names.index("triton"), op
    assert available_backends("rms_norm")["rms_norm"] == ["cpp", "cuda", "triton", "reference"]


def test_runs_without_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from forge_core.kernels import library, rms_norm
import forge_core.kernels.gpu, forge_core.kernels.gpu.aot, forge_core.kernels.gpu.workload
assert not library.TRITON_INSTALLED
x = torch.ones(2, 4)
rms_norm(x, torch.ones(4))
try:
    rms_norm(x, torch.ones(4), backend="triton")
except ValueError as error:
    assert "triton is not installed" in str(error), error
else:
    raise AssertionError("ran")
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)


def test_is_imported_by_the_first_launch_only() -> None:
    program = "import sys, forge_core.kernels; assert 'forge_core.kernels.gpu.rms_norm' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
