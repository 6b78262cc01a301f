"""Every kernel against its reference once more with each lower instruction set than the one that this CPU picks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
LOWER = {"DEFAULT": [], "NO AVX": [], "AVX2": ["portable"], "AVX512": ["portable", "avx2"]}
SETS = list(LOWER.get(torch.backends.cpu.get_cpu_capability(), []))
if torch.cpu._is_avx512_bf16_supported():
    SETS.append("avx512")


@pytest.mark.parametrize("isa", SETS)
def test_kernels_match_reference_with(isa: str) -> None:
    # The set is chosen when the library is first used, hence another process; test_matches_reference of every op.
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/kernels", "-k",
         "test_matches_reference"],
        cwd=ROOT, env=os.environ | {"FORGE_CPU_ISA": isa}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def test_unknown_set_is_refused() -> None:
    program = "import torch; from forge_core.kernels import rms_norm; rms_norm(torch.ones(2, 4), torch.ones(4))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env=os.environ | {"FORGE_CPU_ISA": "sse9"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode != 0
    assert "FORGE_CPU_ISA: got sse9, expected portable, avx2, avx512 or avx512_bf16" in result.stderr
