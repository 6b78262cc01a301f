"""Loads the compiled op libraries that lie beside this file, at import: torch.compile then traces without a break.

Torch ops live in two namespaces. `torch.ops.forge` is C++ and CUDA: csrc/ops.cpp holds the schemas. An op that also has
Triton kernels has a twin of the same schema in `torch.ops.forge_triton`, implemented by kernels/gpu/. `register_op`
gives both the same fake and the same backward.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .list_autograd import register_list_autograd

_HERE = Path(__file__).parent

CUDA_LIBRARY_MISSING = (
    f"{_HERE / '_C_cuda.so'} is not loaded: it needs a CUDA build of torch, a GPU, and nvcc when forge_core was built "
    "(FORGE_CUDA=on pip install . says what is missing)"
)

if not (_HERE / "_C.so").is_file():
    raise ImportError(
        f"{_HERE / '_C.so'} is not built; run `pip install .` (or `pip install -e .`) in the source folder"
    )
torch.ops.load_library(_HERE / "_C.so")  # every schema, and the CPU kernels

_CUDA_LOADED = torch.cuda.is_available() and (_HERE / "_C_cuda.so").is_file()
if _CUDA_LOADED:
    torch.ops.load_library(_HERE / "_C_cuda.so")


def cuda_library_loaded() -> bool:
    """Whether `_C_cuda.so`, with the CUDA kernels, is loaded."""
    return _CUDA_LOADED


def empty_cache() -> int:
    """Gives the blocks that the CPU ops keep for reuse back to the system, like torch.cuda.empty_cache.

    Results and scratch of the CPU ops from 64 KiB come from blocks that stay with the process when a tensor is freed:
    fresh pages cost more than many ops do. At most FORGE_CPU_CACHE_MIB (default: an eighth of the machine's memory; 0
    keeps nothing) stay unused.

    Returns:
        Bytes given back.
    """
    return torch.ops.forge.empty_cache()


TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads the variable when a kernel is defined; its interpreter then runs the kernel with NumPy, tensors on the
# CPU included. For tests only: a program costs milliseconds.
TRITON_INTERPRETED = TRITON_INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"

_TWINS = torch.library.Library("forge_triton", "DEF")
_COMPILED = torch.library.Library("forge", "IMPL")


def register_op(
    name: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    *,
    gpu: str | None = None,
    gpu_fake: Callable[..., Any] | None = None,
    schema: str | None = None,
    gpu_schema: str | None = None,
) -> None:
    """Gives `torch.ops.forge.<name>` its fake and its backward, and the same to its Triton twin, if it has one.

    Args:
        name: of an op in csrc/ops.cpp, or a new one with `schema`.
        fake: shapes, dtypes and strides of the results from those of the arguments.
        backward: `backward(ops, ctx, *gradients)`, where ops is the namespace that the forward pass came from; None for
            an op without gradients.
        setup_context: keeps in ctx what backward needs.
        gpu: module of kernels/gpu/ with a function `name` that takes the op's arguments and launches Triton kernels; it
            is imported by the first call. None: there is no twin.
        gpu_fake: fake of the twin, where its scratch outputs differ from those of the compiled op.
        schema: arguments and results of an op that only Triton has: "(Tensor x, ...) -> Tensor".
        gpu_schema: those of the twin, where it has further scratch arguments or results.
    """
    namespaces = {"forge": fake} if schema is None else {}
    if gpu is not None:
        twin = schema or gpu_schema
        compiled_schema = "" if twin else str(getattr(torch.ops.forge, name).default._schema)
        _TWINS.define(name + twin if twin else compiled_schema.removeprefix("forge::"))
        launch = functools.partial(_launch, gpu, name)
        _TWINS.impl(name, launch, "CUDA")
        if TRITON_INTERPRETED:
            _TWINS.impl(name, launch, "CPU")
        namespaces["forge_triton"] = gpu_fake or fake
    for namespace, shapes in namespaces.items():
        torch.library.register_fake(f"{namespace}::{name}", shapes)
        if backward is not None:
            bound = functools.partial(backward, getattr(torch.ops, namespace))
            _register_autograd(f"{namespace}::{name}", bound, setup_context)


def implement_on_gpu(name: str, module: str, **options: Any) -> None:
    """Gives `torch.ops.forge.<name>` a launcher for GPUs: function `name` of kernels/gpu/`module`, plus `options`.

    For ops that are C++ on the CPU, and Python around a CUDA op and Triton kernels on a GPU.
    """
    _COMPILED.impl(name, functools.partial(_launch, module, name, **options), "CUDA")


def _register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any] | None) -> None:
    namespace, _, op_name = name.partition("::")
    schema = getattr(getattr(torch.ops, namespace), op_name).default._schema
    if setup_context is not None and any("List[Tensor]" in str(a.type) for a in (*schema.arguments, *schema.returns)):
        register_list_autograd(name, backward, setup_context)
    else:
        torch.library.register_autograd(name, backward, setup_context=setup_context)


def _launch(module: str, name: str, *arguments: Any, **options: Any) -> Any:
    function = _launcher(module, name)
    first = arguments[0] if isinstance(arguments[0], torch.Tensor) else arguments[0][0]
    with torch.cuda.device_of(first):  # Triton launches on the current device
        return function(*arguments, **options)


@functools.cache
def _launcher(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f".gpu.{module}", __package__), name)
