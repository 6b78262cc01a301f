import os
import subprocess
import sys

import torch

from forge_core.kernels import empty_cache, frozen_linear


def _result(rows: int) -> torch.Tensor:
    return frozen_linear(torch.ones(rows, 64), [torch.ones(1024, 64)])[0]


def test_a_freed_block_is_handed_out_again() -> None:
    empty_cache()
    first = _result(64)
    address = first.data_ptr()
    second = _result(64)
    assert second.data_ptr() != address  # in use
    del first
    third = _result(63)  # 252 KiB: the same step of sizes as 256 KiB
    assert third.data_ptr() == address
    assert torch.equal(third, torch.full((63, 1024), 64.0))
    assert torch.equal(second, torch.full((64, 1024), 64.0))


def test_empty_cache_returns_what_is_not_in_use() -> None:
    empty_cache()
    kept, freed = _result(64), _result(1024)
    del freed
    assert empty_cache() == 1024 * 1024 * 4
    assert empty_cache() == 0
    assert torch.equal(kept, torch.full((64, 1024), 64.0))


def test_a_view_keeps_its_block() -> None:
    row = _result(64)[3]
    _result(64).zero_()
    assert torch.equal(row, torch.full((1024,), 64.0))


def test_results_can_be_saved_and_shared(tmp_path) -> None:
    result = _result(64)
    torch.save(result, tmp_path / "result.pt")
    assert torch.equal(torch.load(tmp_path / "result.pt"), result)
    assert torch.equal(result.share_memory_(), torch.full((64, 1024), 64.0))


def _run(limit: str) -> subprocess.CompletedProcess:
    program = (
        "import torch; from forge_core.kernels import empty_cache, frozen_linear\n"
        "for rows in (1024, 1024, 2048):\n"
        "    frozen_linear(torch.ones(rows, 64), [torch.ones(1024, 64)])\n"
        "print(empty_cache())"
    )
    environment = {**os.environ, "FORGE_CPU_CACHE_MIB": limit}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def test_the_limit_bounds_what_is_kept() -> None:
    assert _run("0").stdout == "0\n"
    assert _run("5").stdout == f"{4 << 20}\n"  # the 8 MiB of the last call do not fit beside the 4 MiB kept
    assert _run("64").stdout == f"{12 << 20}\n"


def test_a_limit_that_is_no_number_is_refused() -> None:
    done = _run("much")
    assert done.returncode != 0
    assert "FORGE_CPU_CACHE_MIB: got much, expected a number of MiB" in done.stderr
