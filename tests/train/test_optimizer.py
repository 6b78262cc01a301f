"""MasterAdamW against torch's AdamW in float64, its groups, its float32 masters and its state."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from forge_core.train import MasterAdamW

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {"q.lora_A.weight": (3, 8), "q.lora_B.weight": (8, 3), "norm.weight": (8,)}
    return {name: nn.Parameter(torch.randn(shape).to(device, dtype)) for name, shape in shapes.items()}


def gradients(step: int, like: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator).to(p.device) for name, p in like.items()}


def feed(named: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    sum((p * values[name].to(p.dtype)).sum().float() for name, p in named.items()).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("device", DEVICES)
def test_equals_torch_with_groups_and_clipping(device: str) -> None:
    ours, theirs = parameters(device=device), parameters(torch.float64, device)
    optimizer = MasterAdamW(ours, weight_decay=0.1, max_grad_norm=0.5, lora_plus_ratio=4.0)
    a, b, norm_weight = theirs.values()
    peer = torch.optim.AdamW(
        [
            {"params": [a], "lr": 1e-2, "weight_decay": 0.1},
            {"params": [b], "lr": 4e-2, "weight_decay": 0.1},
            {"params": [norm_weight], "lr": 1e-2, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(5):
        feed(ours, gradients(step, ours))
        feed(theirs, {name: g.double() for name, g in gradients(step, ours).items()})
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        norm = optimizer.step(1e-2)
        peer.step()
        peer.zero_grad()
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.double(), theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_norm_and_update_repeat_bit_for_bit(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    many = [torch.randn(size, generator=generator) for size in (1, 1000, 70_000, 300_001) for _ in range(40)]
    results = []
    for _ in range(3):
        named = {str(i): nn.Parameter(torch.zeros_like(g, device=device)) for i, g in enumerate(many)}
        optimizer = MasterAdamW(named, max_grad_norm=0.5)
        for parameter, gradient in zip(named.values(), many, strict=True):
            parameter.grad = gradient.to(device, copy=True)  # the update overwrites it
        results.append([optimizer.step(1e-3), *(p.detach() for p in named.values())])
    assert all(torch.equal(a, b) for again in results[1:] for a, b in zip(again, results[0], strict=True))
    expected = torch.cat(many).double().norm()
    assert float(results[0][0]) == pytest.approx(float(expected), rel=1e-5)


def test_bfloat16_learns_below_its_own_resolution() -> None:
    # A step of 1e-4 is lost on a bfloat16 weight near 1, where the spacing is 2^-7; the master keeps it.
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"w": weight}, max_grad_norm=1e9)
    for _ in range(200):
        weight.sum().backward()
        optimizer.step(1e-4)
    assert optimizer.state_tensors()["master.w"].allclose(torch.full((4, 4), 0.98), atol=1e-4)
    assert weight.float().allclose(torch.full((4, 4), 0.98), atol=2**-8)


def test_bfloat16_gradients_are_summed_in_float32() -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"w": weight}, max_grad_norm=1e9)
    for gradient in (256.0, *[0.5] * 8):  # in bfloat16 each 0.5 would vanish against 256
        (weight * gradient).sum().backward()
    assert weight.grad is None
    assert float(optimizer.step(1e-3)) == 260.0


def test_tied_gradients_of_a_pack_are_taken_once() -> None:
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"w": weight}, max_grad_norm=1e9)
    (weight * 2 + weight * 3).sum().backward()
    assert float(optimizer.step(1e-3)) == 5.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    straight = parameters(dtype)
    first = MasterAdamW(straight, weight_decay=0.1, lora_plus_ratio=4.0)
    for step in range(3):
        feed(straight, gradients(step, straight))
        first.step(1e-2)
    again = {name: nn.Parameter(p.detach().clone()) for name, p in straight.items()}
    second = MasterAdamW(again, weight_decay=0.1, lora_plus_ratio=4.0)
    if dtype == torch.bfloat16:
        for parameter in again.values():
            parameter.data.zero_()  # the masters in the state bring the values back
    second.load_state_tensors({name: t.clone() for name, t in first.state_tensors().items()})
    assert all(torch.equal(parameter, again[name]) for name, parameter in straight.items())
    for step in range(3, 6):
        for named, optimizer in ((straight, first), (again, second)):
            feed(named, gradients(step, named))
            optimizer.step(1e-2)
    for name, parameter in straight.items():
        assert torch.equal(parameter, again[name]), name


def test_state_of_another_model_is_refused() -> None:
    source = parameters()
    optimizer = MasterAdamW(source)
    feed(source, gradients(0, source))
    optimizer.step(1e-2)
    state = optimizer.state_tensors()
    renamed = MasterAdamW({"other": nn.Parameter(torch.zeros(3, 8))})
    with pytest.raises(ValueError, match=r"belongs to other parameters: exp_avg.norm.weight"):
        renamed.load_state_tensors(state)
    smaller = MasterAdamW({"norm.weight": nn.Parameter(torch.zeros(4))})
    with pytest.raises(ValueError, match=r"exp_avg.norm.weight \[8\] \(expected \[4\]\)"):
        smaller.load_state_tensors({k: v for k, v in state.items() if "norm" in k})
    low = MasterAdamW({"w": nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))})
    with pytest.raises(ValueError, match=r"1 missing"):
        low.load_state_tensors({})


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="nothing to train"):
        MasterAdamW({"w": nn.Parameter(torch.zeros(1), requires_grad=False)})


def test_gradient_of_a_single_pack_is_not_widened() -> None:
    # It would be read as float32 from then on: twice the bytes, the same numbers.
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"w": weight})
    weight.sum().backward()
    assert optimizer._gradients["w"].dtype == torch.bfloat16
    weight.sum().backward()
    assert optimizer._gradients["w"].dtype == torch.float32


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    # Shards of three rows, of four and three, of one and none; one copy on each rank.
    layouts = {"a": Shard(0), "b": Shard(0), "c": Shard(0), "d": Replicate()}
    torch.manual_seed(0)
    whole = {name: torch.randn(rows, 5) for name, rows in zip(layouts, (6, 7, 1, 3), strict=True)}

    def shared(name: str, value: Tensor) -> Tensor:
        return distribute_tensor(value.clone(), mesh, [layouts[name]])

    ours = {name: nn.Parameter(shared(name, value)) for name, value in whole.items()}
    alone = {name: nn.Parameter(value.clone()) for name, value in whole.items()}
    optimizers = [MasterAdamW(named, weight_decay=0.1, max_grad_norm=0.5) for named in (ours, alone)]
    for step in range(3):
        for name, gradient in gradients(step, alone).items():
            ours[name].grad, alone[name].grad = shared(name, gradient), gradient
        norms = [optimizer.step(1e-2) for optimizer in optimizers]
        torch.testing.assert_close(*norms)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.full_tensor(), alone[name])
    sharded, state = (optimizer.state_tensors() for optimizer in optimizers)
    for name, tensor in state.items():
        saved = sharded[name]
        torch.testing.assert_close(saved if name.startswith("steps") else saved.full_tensor(), tensor)  # type: ignore[operator]
    dist.destroy_process_group()


def test_sharded_parameters_are_trained_as_whole_ones(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), 2)
