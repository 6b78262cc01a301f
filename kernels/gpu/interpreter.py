"""Keeps Triton's interpreter (TRITON_INTERPRET=1) working with the NumPy that is installed."""

from typing import Any

from triton.runtime import interpreter


def repair() -> None:
    """Lets loops of interpreted kernels take their bounds from arrays of one element.

    The interpreter of Triton 3.6 turns them into Python integers by `int(array)`, which NumPy 2.4 and newer refuses.
    """
    patch = interpreter._patch_lang_tensor

    def patch_and_repair(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_repair
