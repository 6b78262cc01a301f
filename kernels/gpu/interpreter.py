"""Repairs Triton's interpreter (TRITON_INTERPRET=1): the NumPy that is installed, and bfloat16."""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Corrects what the interpreter of Triton 3.6 gets wrong.

    - Loop bounds from arrays of one element: it calls `int(array)`, which NumPy 2.4 and newer refuses.
    - bfloat16, which it keeps as bit patterns: `tl.dot` multiplied the patterns, and a conversion from float32 cut off
      what a GPU rounds to nearest even.
    """
    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_repair

    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return dot(self, _widened(a), _widened(b), d, *options)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        bits = src.data.view(np.uint32)
        rounded = np.where(np.isnan(src.data), bits, bits + 0x7FFF + ((bits >> 16) & 1))
        return interpreter.TensorHandle((rounded >> 16).astype(np.uint16), dst_type.scalar)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
