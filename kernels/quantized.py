"""Frozen weights in a quantised format: dequantised for a matmul, never kept dense between forward and backward.

At thousands of tokens one dequantisation and a dense matmul beat kernels that do both at once; see docs/LOG.md.
"""

import importlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class FourBit(Tensor):
    """A weight of bitsandbytes' Linear4bit under its nominal shape and dtype; a view, made anew for each call.

    Its `Params4bit` shows the packed bytes, uint8 [out * in / 2, 1]; shape, dtype and scales are in its `quant_state`.
    """

    packed: Tensor

    @staticmethod
    def __new__(cls, packed: Any) -> "FourBit":
        """`packed`: a quantised Params4bit."""
        state = packed.quant_state
        self = Tensor._make_wrapper_subclass(cls, state.shape, dtype=state.dtype, device=packed.device)
        self.packed = packed
        return self

    def dequantize(self) -> Tensor:
        """The dense weight, in one launch."""
        try:
            functional = importlib.import_module("bitsandbytes.functional")
        except ImportError as error:
            raise ImportError(
                "weight: got a Params4bit, which bitsandbytes makes dense, but bitsandbytes cannot be imported here; "
                f"pip install bitsandbytes ({error})"
            ) from error
        state = self.packed.quant_state  # type: ignore[attr-defined]
        if self.device.type == "cpu" and self.shape[1] % state.blocksize:
            raise ValueError(
                f"weight: got a 4-bit weight with rows of {self.shape[1]} in blocks of {state.blocksize}, which "
                "bitsandbytes decodes wrongly on the CPU (0.50); expected a multiple, or a GPU"
            )
        dense: Tensor = functional.dequantize_4bit(self.packed.detach().as_subclass(Tensor), state)
        return dense

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """A FourBit only carries a weight to a matmul."""
        raise TypeError(f"{func}: got a 4-bit weight, expected a dense one; weight.dequantize() gives it")


def nominal(weight: Tensor) -> Tensor:
    """The weight as a tensor that shows its nominal shape and dtype: bitsandbytes' packed ones as `FourBit`."""
    return FourBit(weight) if getattr(weight, "quant_state", None) is not None else weight


def is_quantized(weight: Tensor) -> bool:
    """Whether the weight is a tensor subclass with a format of its own, such as torchao's: it can be made dense."""
    kind = type(weight)
    return hasattr(kind, "get_original_weight") or kind.dequantize is not Tensor.dequantize


def dense(weight: Tensor) -> Tensor:
    """The weight as a plain tensor of its nominal dtype; a plain one as it is."""
    if not is_quantized(weight):
        return weight
    with torch.no_grad():
        # torchao's NF4Tensor has a static method of the name `dequantize` with another meaning.
        get = getattr(weight, "get_original_weight", weight.dequantize)
        return get().to(weight.dtype)


def frozen(
    run: Callable[..., Sequence[Tensor]], backward: Callable[..., Tensor], x: Tensor, weights: list[Tensor], *rest: Any
) -> Sequence[Tensor]:
    """`run(x, weights, *rest)` with quantised weights; `backward(dys, weights)` is the gradient of x, the only one."""
    return _Frozen.apply(run, backward, weights, rest, x)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Any, backward: Any, weights: list[Tensor], rest: tuple, x: Tensor) -> tuple[Tensor, ...]:
        ctx.run_backward, ctx.weights = backward, weights
        return tuple(run(x, [dense(weight) for weight in weights], *rest))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple:
        return None, None, None, None, ctx.run_backward(list(dys), [dense(weight) for weight in ctx.weights])


def matmul(ops: Any, setup: Callable[..., None], backward: Callable[..., Any], *arguments: Any) -> Sequence[Tensor]:
    """`ops.lora_matmul(*arguments)` with quantised weights; `setup` and `backward` are those of the op."""
    x, s, weights, lora_a, lora_b, biases, *rest = arguments
    return _Matmul.apply(ops, setup, backward, weights, rest, len(lora_a), x, s, *lora_a, *lora_b, *biases)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ops: Any,
        setup: Callable[..., None],
        backward: Callable[..., Any],
        weights: list[Tensor],
        rest: list,
        projections: int,
        x: Tensor,
        s: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        lists = _split(tensors, projections)
        return tuple(ops.lora_matmul(x, s, [dense(weight) for weight in weights], *lists, *rest))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ops, setup, backward, weights, rest, ctx.projections, x, s, *tensors = inputs
        ctx.ops, ctx.run_backward, ctx.of_op = ops, backward, SimpleNamespace()
        setup(ctx.of_op, (x, s, weights, *_split(tensors, ctx.projections), *rest), output)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple:
        need_x, need_s, *needs = ctx.needs_input_grad[6:]
        _, needs_b, needs_bias = _split(needs, ctx.projections)
        of_op = SimpleNamespace(**vars(ctx.of_op))
        of_op.weights = [dense(weight) for weight in ctx.of_op.weights]
        of_op.needs_input_grad = (need_x, need_s, None, None, needs_b, needs_bias)
        dx, ds, _, das, dbs, dbiases, *_ = ctx.run_backward(ctx.ops, of_op, list(dys))
        return None, None, None, None, None, None, dx, ds, *das, *dbs, *dbiases


def _split(values: Sequence[Any], count: int) -> tuple[list, list, list]:
    # lora_a, lora_b and biases, of which there may be none.
    return list(values[:count]), list(values[count : 2 * count]), list(values[2 * count :])
