"""The one tolerance rule of the kernel tests.

A kernel may be at most twice as far from the float64 reference as plain torch is in the same dtype, plus two units in
the last place of the largest value:

    max|kernel - reference64| <= 2 * max|reference_same_dtype - reference64| + 2 * ulp(max|reference64|)

It holds for outputs and for the gradients of every floating-point input, on inputs scaled so that outputs are of order
one. Integer outputs must be equal. There are no per-test constants.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def assert_as_accurate(name: str, actual: Tensor, same_dtype: Tensor, reference: Tensor) -> None:
    """Applies the rule to one tensor; `reference` is float64, the others share the dtype under test."""
    assert actual.shape == reference.shape, f"{name}: shape {list(actual.shape)}, expected {list(reference.shape)}"
    assert actual.dtype == same_dtype.dtype, f"{name}: dtype {actual.dtype}, expected {same_dtype.dtype}"
    if reference.numel() == 0:
        return
    if not actual.is_floating_point():
        assert torch.equal(actual.double(), reference), f"{name}: {actual.tolist()}, expected {reference.tolist()}"
        return
    assert torch.isfinite(actual).all() or not torch.isfinite(reference).all(), f"{name}: not finite"
    error = (actual.double() - reference).abs().max().item()
    torch_error = (same_dtype.double() - reference).abs().max().item()
    ulp = torch.finfo(actual.dtype).eps * reference.abs().max().item()
    assert error <= 2 * torch_error + 2 * ulp, (
        f"{name}: error {error:.3e} against float64; plain torch in {actual.dtype} has {torch_error:.3e}, "
        f"one ulp is {ulp:.3e}"
    )


def check_op(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Compares `op(*inputs)` on `device` and all its gradients with `reference(*inputs)` under the rule.

    Inputs that are floating-point tensors are differentiated when they require grad. Both functions return a tensor or
    a tuple of tensors; the k-th differentiable output receives the same random upstream gradient in every run.
    """
    same_dtype = _run(reference, inputs, None, seed)
    wide = _run(reference, inputs, torch.float64, seed)
    actual = _run(op, inputs, None, seed, device)
    for key in wide:
        assert_as_accurate(key, actual[key], same_dtype[key], wide[key].double())


def _run(
    function: Callable[..., Any], inputs: Sequence[Any], dtype: torch.dtype | None, seed: int, device: str = "cpu"
) -> dict[str, Tensor]:
    arguments = [_leaf(value, dtype, device) for value in inputs]
    outputs = function(*arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}

    leaves = [leaf for argument in arguments for leaf in (argument if isinstance(argument, list) else [argument])]
    leaves = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    differentiable = [output for output in outputs if output.requires_grad]
    if leaves and differentiable:
        generator = torch.Generator().manual_seed(seed)
        upstream = [
            torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output) for output in differentiable
        ]
        for i, gradient in enumerate(torch.autograd.grad(differentiable, leaves, upstream)):
            results[f"gradient {i}"] = gradient
    return {name: result.cpu() for name, result in results.items()}


def _leaf(value: Any, dtype: torch.dtype | None, device: str) -> Any:
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor):
        return [_leaf(item, dtype, device) for item in value]
    if not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return value.to(device)
    # A detached copy that keeps the strides of the input: non-contiguous inputs stay non-contiguous.
    copy = torch.empty_strided(value.shape, value.stride(), dtype=dtype or value.dtype, device=device)
    copy.copy_(value.detach())
    return copy.requires_grad_(value.requires_grad)
