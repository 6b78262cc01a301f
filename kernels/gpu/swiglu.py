"""swiglu in Triton: y = activation(gate) * up, element by element, float32 arithmetic, every tensor touched once.

Both activations are `x * sigmoid(z(x))`: silu with z = x, the tanh form of gelu with z = 2 sqrt(2 / pi) (x + 0.044715
x^3), because (1 + tanh u) / 2 = sigmoid(2 u).
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .workload import Workload, meta

BLOCK, WARPS = 2048, 4  # 16 elements a thread: two loads of 16 bytes from each bfloat16 tensor


@triton.jit
def _sigmoids(x, GELU: tl.constexpr):
    # sigmoid(z(x)), sigmoid(-z(x)) and z'(x). Where one sigmoid is close to 1, 1 minus it has few digits of the other.
    if GELU:
        slope = 1.5957691216057308  # 2 sqrt(2 / pi)
        z = slope * (x + 0.044715 * x * x * x)
        dz = slope * (1.0 + 3 * 0.044715 * x * x)
    else:
        z = x
        dz = 1.0
    e = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(z >= 0, larger, smaller), tl.where(z >= 0, smaller, larger), dz


@triton.jit
def _forward(gate_N, up_N, y_N, n, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_N + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(up_N + at, mask=at < n, other=0.0).to(tl.float32)
    sigmoid, _, _ = _sigmoids(gate, GELU)
    tl.store(y_N + at, (gate * sigmoid * up).to(y_N.dtype.element_ty), mask=at < n)


@triton.jit
def _backward(dy_N, gate_N, up_N, dgate_N, dup_N, n, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_N + at, mask=at < n, other=0.0).to(tl.float32)
    gate = tl.load(gate_N + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(up_N + at, mask=at < n, other=0.0).to(tl.float32)
    sigmoid, opposite, dz = _sigmoids(gate, GELU)
    slope = sigmoid + gate * dz * sigmoid * opposite
    tl.store(dgate_N + at, (dy * up * slope).to(dgate_N.dtype.element_ty), mask=at < n)
    tl.store(dup_N + at, (dy * gate * sigmoid).to(dup_N.dtype.element_ty), mask=at < n)


def swiglu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Launches the forward kernel; the result is as the op's schema has it."""
    gate, up = gate.contiguous(), up.contiguous()
    y, n = torch.empty_like(gate), gate.numel()
    if n > 0:
        gelu = activation == "gelu_tanh"
        _forward[(triton.cdiv(n, BLOCK),)](gate, up, y, n, GELU=gelu, BLOCK=BLOCK, num_warps=WARPS)
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Launches the backward kernel; results as the op's schema has them."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    if n > 0:
        gelu = activation == "gelu_tanh"
        _backward[(triton.cdiv(n, BLOCK),)](dy, gate, up, dgate, dup, n, GELU=gelu, BLOCK=BLOCK, num_warps=WARPS)
    return dgate, dup


def workloads() -> list[Workload]:
    """The feed-forward width of Llama-3-8B, in bfloat16 and float32."""
    listed = []
    for activation, dtype in (("silu", torch.bfloat16), ("gelu_tanh", torch.bfloat16), ("silu", torch.float32)):
        x = meta(8192, 14336, dtype=dtype)
        size, name = x.numel() * x.element_size(), f"{activation} 8192 x 14336 {str(dtype).removeprefix('torch.')}"
        listed += [
            Workload(f"swiglu: forward {name}", partial(swiglu, x, x, activation), 3 * size),
            Workload(f"swiglu: backward {name}", partial(swiglu_backward, x, x, x, activation), 5 * size),
        ]
    return listed
