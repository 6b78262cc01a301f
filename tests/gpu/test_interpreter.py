"""Every Triton kernel in Triton's interpreter on the CPU, over the cases in tests/kernels of all backends."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from forge_core.kernels import available_backends, library

ROOT = Path(__file__).parents[2]
OPS = [op for op, names in available_backends().items() if "triton" in names]


def _interpret(op: str) -> subprocess.CompletedProcess[str]:
    # Triton reads the variable when kernels are defined, hence another process; see tests/backends.py.
    files = map(str, sorted((ROOT / "tests" / "kernels").glob(f"test_{op}*.py")))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", *files, "-k", "triton-interpreted"],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def interpreted() -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """One process per op, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {op: pool.submit(_interpret, op) for op in OPS}
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.mark.skipif(not library.TRITON_INSTALLED, reason="triton is not installed")
@pytest.mark.parametrize("op", OPS)
def test_matches_reference(op: str, interpreted: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    result = interpreted[op].result()
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert f"test_{op}.py::test_matches_reference[triton-interpreted" in result.stdout, "no interpreted case ran"
