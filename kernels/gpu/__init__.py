"""Device code in Triton: one module per op, imported by its first launch, so that nothing here needs triton to import.

A module `<op>.py` holds kernels and launchers: functions with the name, the arguments and the results of a torch op.
`register_op(..., gpu="<op>")` in kernels/<op>.py connects them. `workloads()` lists the calls whose kernels
`python -m forge_core.kernels.gpu.aot` compiles without a GPU.
"""

from ..library import TRITON_INTERPRETED

if TRITON_INTERPRETED:
    from .interpreter import repair

    repair()
