"""Every Triton kernel in Triton's interpreter on the CPU, over the cases in tests/kernels of all backends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forge_core.kernels import available_backends, library

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not library.TRITON_INSTALLED, reason="triton is not installed")
def test_triton_kernels_match_reference_when_interpreted() -> None:
    # Triton reads the variable when kernels are defined, hence another process; see tests/backends.py.
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "tests/kernels", "-k",
         "triton-interpreted"],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    for op, names in available_backends().items():
        case = f"test_{op}.py::test_matches_reference[triton-interpreted"
        assert "triton" not in names or case in result.stdout, f"{op}: no interpreted case ran"
