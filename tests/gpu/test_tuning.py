"""The choice between ways of computing the same thing."""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from forge_core.kernels import library

if not library.TRITON_INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)

from triton.runtime.errors import OutOfResources

from forge_core.kernels.gpu import lora_linear_choice, tuning
from forge_core.kernels.gpu.lora_linear_gemm import Operands
from forge_core.kernels.registry import Refusal

ONE = torch.ones(4)
WAYS = {"slow": lambda: ONE, "fast": lambda: ONE * 1.01}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGE_TUNING_CACHE", str(tmp_path / "folder" / "tuning.json"))
    monkeypatch.delenv("FORGE_TUNING", raising=False)
    monkeypatch.setattr(tuning, "_choices", None)
    return tmp_path / "folder" / "tuning.json"


def test_measures_once_and_remembers(cache: Path) -> None:
    time = mock.Mock(return_value={"slow": 2.0, "fast": 1.0})
    assert [tuning.choose("key", WAYS, "slow", time) for _ in range(2)] == ["fast", "fast"]
    assert time.call_count == 1 and json.loads(cache.read_text()) == {"key": "fast"}
    tuning.forget()
    assert tuning.choose("key", WAYS, "slow", time) == "fast" and time.call_count == 1
    assert tuning.choose("another key", WAYS, "slow", time) == "fast" and time.call_count == 2


def test_default_stays_unless_clearly_beaten(cache: Path) -> None:
    assert tuning.choose("key", WAYS, "slow", lambda ways: {"slow": 1.0, "fast": 0.995}) == "slow"
    # A way that does not fit the GPU has no time.
    assert tuning.choose("other", WAYS, "slow", lambda ways: {"fast": 1.0}) == "fast"


def test_a_remembered_way_that_is_gone_is_measured_again(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text('{"key": "a way of another version", "kept": "x"}')
    assert tuning.choose("key", WAYS, "slow", lambda ways: {"slow": 2.0, "fast": 1.0}) == "fast"
    assert json.loads(cache.read_text()) == {"key": "fast", "kept": "x"}


def test_ways_that_fail_or_disagree_are_left_out() -> None:
    def broken() -> torch.Tensor:
        raise OutOfResources(300, 227, "shared memory")

    def refuses() -> torch.Tensor:
        raise Refusal("ImportError: undefined symbol")

    shaking = iter([ONE, ONE * 1.001])
    ways = WAYS | {"broken": broken, "wrong": lambda: ONE * 1.1, "nan": lambda: ONE * float("nan")}
    ways |= {"refuses": refuses, "shakes": lambda: next(shaking)}
    with pytest.warns(UserWarning) as warned:
        assert set(tuning.usable(ways, "slow")) == {"slow", "fast"}
    assert tuning.usable({"slow": ways["nan"], "fast": ways["fast"]}, "slow") == {}
    named = [str(w.message).split(",")[0].split(": ")[0] for w in warned]
    assert named == ["broken", "wrong", "nan", "refuses", "shakes"]
    assert "does not repeat bit for bit" in str(warned[-1].message)


def test_an_error_that_is_no_refusal_goes_on() -> None:
    def fails() -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError):
        tuning.usable(WAYS | {"fails": fails}, "slow")


def test_files_that_cannot_be_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match=r"tuning\.json: choices are not kept"):
        assert tuning.choose("key", WAYS, "slow", lambda ways: {"slow": 2.0, "fast": 1.0}) == "fast"
    cache.parent.unlink()
    cache.parent.mkdir()
    cache.write_text("not JSON")
    tuning.forget()
    with pytest.raises(ValueError, match=r"tuning\.json: expected the choices of an earlier run"):
        tuning.choose("key", WAYS, "slow", lambda ways: {})


def test_off_and_alone_take_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    time = mock.Mock()
    assert tuning.choose("key", {"only": lambda: ONE}, "only", time) == "only"
    monkeypatch.setenv("FORGE_TUNING", "off")
    assert tuning.choose("key", WAYS, "slow", time) == "slow"
    assert not time.called


def test_ways_that_no_gpu_has_run_are_tried_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning.UNPROVED
    ways = WAYS | dict.fromkeys(tuning.UNPROVED, lambda: ONE)
    seen = []

    def time(ways: dict) -> dict:
        seen.append(set(ways))
        return {way: 2.0 if way == "slow" else 1.0 for way in ways}

    assert tuning.choose("key", ways, "slow", time) == "fast" and seen == [{"slow", "fast"}]
    monkeypatch.setenv("FORGE_TUNING", "all")
    tuning.choose("another key", ways, "slow", time)
    assert seen[1] == set(ways)


def _operands(k: int = 64, n: int = 128, rank: int = 16, group: int = 1, **change: object) -> Operands:
    x, w = torch.zeros(32, n).bfloat16(), torch.zeros(n, k).bfloat16()
    s, a = torch.zeros(32, rank * group).bfloat16(), torch.zeros(rank, k).bfloat16()
    values = {"xs": [x] * group, "ws": [w] * group, "s": s, "bs": [a] * group, "bias": None, "words": None}
    return Operands(**values | {"factor": 1.0, "nt": False} | change)  # type: ignore[arg-type]


def test_ways_are_those_that_the_gpu_and_the_shapes_allow() -> None:
    def names(capability: tuple[int, int], **change: object) -> list[str]:
        return lora_linear_choice.ways(_operands(**change), capability)  # type: ignore[arg-type]

    assert names((9, 0)) == ["cublas", "triton 128x256x64 w8 s3 tma", "triton 128x128x64 w8 s4 tma", "gluon"]
    assert names((8, 6)) == ["cublas", "triton 128x128x64 w8 s3", "triton 128x256x32 w8 s3"]
    assert "gluon" not in names((10, 0)) + names((9, 0), rank=8) + names((8, 0))
    assert names((9, 0), k=60) == ["cublas"]  # rows that TMA cannot address
    words = torch.zeros(2, 32, 2, dtype=torch.int32)
    assert names((9, 0), group=2, words=words) == ["cublas", "triton 128x128x64 w8 s4 tma", "gluon"]
    assert names((9, 0), rank=32) == ["cublas", "triton 128x128x64 w8 s4 tma", "gluon"]
    # On sm_100 a group's accumulators must fit tensor memory together: what does not is compiled to a trap.
    assert names((10, 0), group=2) == ["cublas", "triton 128x128x64 w8 s4 tma"]
    assert names((10, 0), group=3) == ["cublas", "triton 128x64x64 w8 s4 tma"]
    assert names((10, 0), group=3, rank=128) == ["cublas"]
    assert names((9, 0), ws=[torch.zeros(64, 128).bfloat16().t()]) == ["cublas"]
    wide = _operands()
    wide = Operands(wide.xs, wide.ws, wide.s.float(), wide.bs, None, None, 1.0, False)
    assert lora_linear_choice.ways(wide, (9, 0)) == ["cublas"]
