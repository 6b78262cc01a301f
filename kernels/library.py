"""Loads the compiled op libraries that lie beside this file, at import: torch.compile then traces without a break."""

from pathlib import Path

import torch

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
