"""Measuring in other processes: another commit's build, and a child that may crash."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import registry
from bench.base import BaseProcess
from bench.dry import listing
from bench.isolate import Isolated
from bench.load import OtherLoad
from bench.registry import Missing, Remote, Workload
from bench.timing import Roofline

ROOT = Path(__file__).parents[2]
ROOFLINE = Roofline({"float32": 1e12, "bfloat16": 1e12}, copy=1e10)


def _swiglu() -> Workload:
    return registry.load("cpu", "swiglu 2048")[0]


def test_base_process_measures_itself_and_names_what_it_lacks() -> None:
    process = BaseProcess("forge@abc1234", ROOT, "cpu")
    try:
        candidate = process.candidate(_swiglu())
        assert isinstance(candidate, Remote)
        assert candidate.memory() or sys.platform != "linux"
        assert 1e-6 < candidate.seconds() < 10
        unknown = Workload("new_op", "1x1", "cpu", "float32", 0.0, 0.0, dict)
        assert process.candidate(unknown) == Missing("ValueError: not in this build: new_op 1x1 float32")
    finally:
        process.close()


def test_base_process_refuses_another_build(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--base: the worker loaded forge_core from .*, expected the build in"):
        BaseProcess("forge@abc1234", tmp_path, "cpu")


def test_unknown_commit_is_an_error() -> None:
    command = [sys.executable, "-m", "bench", "run", "--filter", "rms_norm", "--base", "no-such-commit"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--base" in done.stderr and "no-such-commit" in done.stderr


def test_a_child_that_dies_or_hangs_costs_one_row() -> None:
    child = Isolated("cpu", 0.0, "no peers")
    try:
        first = child.measure(_swiglu(), ROOFLINE)
        assert first["seconds"]["forge"]["rounds"] == 5
        assert child._child
        child._child.kill()
        child._child.wait()
        assert "seconds" in child.measure(_swiglu(), ROOFLINE)  # a new child took over
        gone = Workload("new_op", "1x1", "cpu", "float32", 0.0, 0.0, dict)
        assert child.measure(gone, ROOFLINE)["failed"] == "its process ended with status 1"
        child._limit = 0.0
        assert "took more than 0 s" in child.measure(_swiglu(), ROOFLINE)["failed"]
    finally:
        child.close()


def test_dry_run_names_every_peer_of_the_gpu_suite() -> None:
    text = listing(registry.load("gpu"))
    assert "cannot be built" not in text
    for peer in ("PEFT default", "Unsloth-style", "LoRAFusion's scheme", "Liger", "cut-cross-entropy", "flash-attn 4"):
        assert f"  {peer}: " in text
    assert "Llama-3-8B layer, 7 projections" in text and "8192x4096x128256" in text


@pytest.mark.parametrize("arguments", [["--part", "4/3"], ["--part", "x"], ["--only", "x"], ["--wrong"]])
def test_gpu_script_refuses_wrong_arguments(arguments: list[str]) -> None:
    done = subprocess.run(["bash", "bench/gpu.sh", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "gpu.sh:" in done.stderr


BREAKS_ITS_CONTEXT = """
import pytest, torch

def test_breaks_it():
    def fail():
        raise RuntimeError("an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, fail

def test_after_it():
    assert not torch.cuda.is_initialized()
"""


def test_a_worker_with_a_broken_cuda_context_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_runtest_call\n")
    (tmp_path / "test_it.py").write_text(BREAKS_ITS_CONTEXT.replace("def test", "@pytest.mark.gpu\ndef test"))
    options = ["-q", "-m", "gpu", "-n", "1", "--rootdir", str(tmp_path), "-c", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "1 failed, 1 passed" in done.stdout
    assert "crashed while running" in done.stdout and "test_breaks_it: broke its CUDA context" in done.stderr


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="reads /proc")
def test_load_of_this_process_is_not_other_load() -> None:
    load, wall, own = OtherLoad(), time.monotonic(), time.process_time()
    while time.process_time() - own < 0.3:
        os.getpid()
    cores = load.cores()
    share = (time.process_time() - own) / (time.monotonic() - wall)
    # Whatever else runs: what this process used cannot have been used by others. 0.2: the system counts in 10 ms.
    assert cores is not None and cores <= (os.cpu_count() or 1) - share + 0.2
