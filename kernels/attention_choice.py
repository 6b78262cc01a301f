"""Which backend of packed_attention "auto" takes on a GPU, and which blocks Triton's kernels have: by measurement.

A choice holds for a class of sizes: heads, head dimension, options, and tokens and mean length of the documents up to
powers of two. The first call of a class measures and remembers (kernels/gpu/tuning.py). A compiled graph and a CUDA
graph measure nothing: they take what was measured before.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from .attention_call import AttentionCall
from .gpu.attention_blocks import alternatives

Run = Callable[[AttentionCall], Tensor]


def fastest(own: Mapping[str, Run], peers: Mapping[str, Run], call: AttentionCall) -> str:
    """The backend that "auto" takes: "triton" unless another one was measured to be faster here.

    First one of `own`, this package's; then the winner or one of `peers`, those of other packages. So what a compiled
    graph takes, which has no peers, is measured too, and a package is measured once it is installed.

    Forward and backward are timed together, also where no gradient is wanted: a recomputed forward pass must be the
    first one again.
    """
    key = f"packed_attention {_size_class(call)}"
    best = _choose(key, own, "triton", call)
    if peers:
        best = _choose(f"{key} or {', '.join(peers)}", {best: own[best], **peers}, best, call)
    return best


def blocks(call: AttentionCall, lists: Sequence[Tensor], contexts: Sequence[Tensor]) -> list[int]:
    """The configurations with which Triton's forward, dQ and dK/dV kernels run: places among their `alternatives`.

    Each kernel has its own choice; the two backward ones are measured by the first call that wants gradients.
    """
    q, k, v, *_, causal, window, softcap, scale, parents = call
    names = alternatives(q, k, causal, softcap, parents is not None)
    if all(len(of_kernel) == 1 for of_kernel in names):
        return [0, 0, 0]
    key = f"packed_attention blocks {_size_class(call)}"
    keys = [f"{key} {kernel}" for kernel in ("forward", "dq", "dkdv")]
    if torch.compiler.is_compiling():
        return [n.index(_remembered(key, n, n[0])) for key, n in zip(keys, names, strict=True)]
    tensors, options = [x.detach() for x in (q, k, v)], (causal, window or 0, softcap or 0.0, scale)
    ops = torch.ops.forge_triton

    def forward(index: int) -> tuple[Tensor, Tensor]:
        return ops.packed_attention(*tensors, *lists, *options, *contexts, blocks=[index, 0, 0])

    chosen = [_pick(keys[0], names[0], lambda index: forward(index)[0]), 0, 0]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        saved = cache(partial(forward, chosen[0]))  # only if there is something to measure
        for kernel in (1, 2):
            alike = _Alike()

            def gradients(index: int, kernel: int = kernel, alike: _Alike = alike) -> Tensor:
                out, lse = saved()
                tried = [*chosen[:kernel], index, 0][:3]
                backward = ops.packed_attention_backward
                return alike(backward(out, *tensors, out, lse, *lists[1:], *options, *contexts[1:], blocks=tried))

            chosen[kernel] = _pick(keys[kernel], names[kernel], gradients)
    return chosen


def _size_class(call: AttentionCall) -> str:
    q, k, _, cu_seqlens, _, causal, window, softcap, _, parents = call
    tokens, documents = q.shape[0], max(1, cu_seqlens.shape[0] - 1)
    bits = (tokens.bit_length(), (tokens // documents).bit_length(), (window or 0).bit_length())
    options = f"{'causal' if causal else 'both'}{' window' if window else ''}{' softcap' if softcap else ''}"
    options += " shared" if parents is not None else ""
    return f"{q.shape[1]}/{k.shape[1]} heads of {q.shape[2]} {options} {q.dtype} sizes {bits}"


class _Alike:
    """Puts the results of a way into one vector, divided by the largest values of the first way's: each counts alike.

    `tuning.choose` compares such vectors, and runs the default first.
    """

    def __init__(self) -> None:
        self.scales: list[Tensor] = []

    def __call__(self, results: Sequence[Tensor]) -> Tensor:
        self.scales.extend(x.abs().amax().clamp(min=1e-30) for x in results[len(self.scales) :])
        return torch.cat([(x / scale).flatten() for x, scale in zip(results, self.scales, strict=True)])


def _choose(key: str, backends: Mapping[str, Run], default: str, call: AttentionCall) -> str:
    if torch.compiler.is_compiling():
        return _remembered(key, tuple(backends), default)
    from .gpu import tuning

    alike = _Alike()

    def results(run: Run) -> Tensor:
        if torch.is_inference_mode_enabled():
            return run(call)
        tensors = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
        with torch.enable_grad():
            out = run(call._replace(q=tensors[0], k=tensors[1], v=tensors[2]))
            return alike([out.detach(), *torch.autograd.grad(out, tensors, out.detach())])

    return tuning.choose(key, {name: partial(results, run) for name, run in backends.items()}, default)


def _pick(key: str, names: tuple[str, ...], run: Callable[[int], Tensor]) -> int:
    from .gpu import tuning

    return names.index(tuning.choose(key, {name: partial(run, i) for i, name in enumerate(names)}, names[0]))


@torch.compiler.assume_constant_result
def _remembered(key: str, names: tuple[str, ...], default: str) -> str:
    from .gpu import tuning

    return tuning.remembered(key, names, default)
