"""Inputs, weights and buffers that change in a step loop without a version: upstream's numbers, or an error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

import snn_sparse_plugin as ssp
from snn_sparse_plugin.core import tally
from snn_sparse_plugin.core.errors import FusionError

snn = pytest.importorskip("snntorch")

STEPS, B, M, N = 12, 3, 20, 16


def frames() -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        yield (rng.random((B, M)) < 0.4).astype(np.float32)


# --- one frame, filled again for each step: -> what the layer gets ---


def refilled_numpy(folder: Path) -> Iterator[Tensor]:
    frame = np.zeros((B, M), np.float32)
    for numbers in frames():
        frame[:] = numbers
        yield torch.from_numpy(frame).float()


def refilled_as_tensor(folder: Path) -> Iterator[Tensor]:
    frame = np.zeros((B, M), np.float32)
    for numbers in frames():
        frame[:] = numbers
        yield torch.as_tensor(frame)


def one_tensor_on_numpy(folder: Path) -> Iterator[Tensor]:
    frame = np.zeros((B, M), np.float32)
    x = torch.from_numpy(frame)
    for numbers in frames():
        frame[:] = numbers
        yield x


def memory_map(folder: Path) -> Iterator[Tensor]:
    frame = np.memmap(folder / "frame", np.float32, "w+", shape=(B, M))
    for numbers in frames():
        frame[:] = numbers
        yield torch.from_numpy(frame)


def byte_buffer(folder: Path) -> Iterator[Tensor]:
    buffer = bytearray(4 * B * M)
    for numbers in frames():
        buffer[:] = numbers.tobytes()
        yield torch.frombuffer(buffer, dtype=torch.float32).view(B, M)


def dlpack_import(folder: Path) -> Iterator[Tensor]:
    frame = np.zeros((B, M), np.float32)
    for numbers in frames():
        frame[:] = numbers
        yield torch.from_dlpack(frame)


def dlpack_export(folder: Path) -> Iterator[Tensor]:
    x = torch.zeros(B, M)
    frame = np.from_dlpack(x)
    if not frame.flags.writeable:
        pytest.skip("this torch and numpy share memory to be read alone")
    for numbers in frames():
        frame[:] = numbers
        yield x


def numpy_of_a_tensor(folder: Path) -> Iterator[Tensor]:
    x = torch.zeros(B, M)
    frame = x.numpy()
    for numbers in frames():
        frame[:] = numbers
        yield x


def numpy_at_each_step(folder: Path) -> Iterator[Tensor]:
    x = torch.zeros(B, M)
    for numbers in frames():
        x.numpy()[:] = numbers
        yield x


def data_at_each_step(folder: Path) -> Iterator[Tensor]:
    x = torch.zeros(B, M)
    for numbers in frames():
        x.data.copy_(torch.from_numpy(numbers))
        yield x


def data_before_the_loop(folder: Path) -> Iterator[Tensor]:
    x = torch.zeros(B, M)
    alias = x.data
    for numbers in frames():
        alias.copy_(torch.from_numpy(numbers))
        yield x


def new_data(folder: Path) -> Iterator[Tensor]:
    x = torch.zeros(B, M)
    for numbers in frames():
        x.data = torch.from_numpy(numbers.copy())
        yield x


def other_storage(folder: Path) -> Iterator[Tensor]:
    x = torch.zeros(B, M)
    for numbers in frames():
        x.set_(torch.from_numpy(numbers.copy()))
        yield x


def swapped(folder: Path) -> Iterator[Tensor]:
    x = torch.zeros(B, M)
    for numbers in frames():
        torch.utils.swap_tensors(x, torch.from_numpy(numbers.copy()))
        yield x


def slices_that_come_to_be(folder: Path) -> Iterator[Tensor]:
    whole = np.zeros((STEPS, B, M), np.float32)
    x = torch.from_numpy(whole)
    for t, numbers in enumerate(frames()):
        whole[t] = numbers
        yield x[t]
        whole[t] = 7.0


def ring_of_slices(folder: Path) -> Iterator[Tensor]:
    whole = np.zeros((2, B, M), np.float32)
    x = torch.from_numpy(whole)
    for t, numbers in enumerate(frames()):
        whole[t % 2] = numbers
        yield x[t % 2]


INPUTS = [
    *(refilled_numpy, refilled_as_tensor, one_tensor_on_numpy, memory_map, byte_buffer, dlpack_import),
    *(
        dlpack_export,
        numpy_of_a_tensor,
        numpy_at_each_step,
        data_at_each_step,
        data_before_the_loop,
        new_data,
    ),
    *(other_storage, swapped, slices_that_come_to_be, ring_of_slices),
]


def run(inputs: Any, block: Any, change: Callable[..., Any] = lambda *_: None, **options: Any) -> Tensor:
    """Spike counts and the last membrane of a layer; ``change`` is called after each step."""
    torch.manual_seed(0)
    layer, neuron = nn.Linear(M, N), snn.Leaky(beta=0.9, threshold=0.5, **options)
    held: dict[str, Any] = {}
    mem, out = neuron.init_leaky(), []
    with block:
        for t, x in enumerate(inputs):
            spikes, mem = neuron(layer(x), mem)
            out.append(spikes)
            change(layer, neuron, t, held)
        return torch.cat([torch.stack(out).sum(0), mem]).detach().clone()


def run_or_refused(inputs: Any, change: Any = lambda *_: None, **options: Any) -> Tensor | None:
    """:func:`run` in sparse mode; None where an error says that something changed, and what to do."""
    try:
        return run(inputs, ssp.sparse_mode(**options), change)
    except FusionError as error:
        if "changed" in str(error) and "flush()" in str(error):
            return None
        raise


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.enable_grad, torch.inference_mode], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("inputs", INPUTS, ids=lambda f: f.__name__)
def test_an_input_that_is_filled_again(inputs: Any, mode: Any, tmp_path: Path) -> None:
    if inputs is swapped and mode is torch.enable_grad:  # the graph holds the tensor
        with pytest.raises(RuntimeError):
            run(inputs(tmp_path), nullcontext())
        return
    with mode():
        want = run(inputs(tmp_path), nullcontext())
        for _ in range(2):  # from the second time on the layer's input is recorded, too
            got = run_or_refused(inputs(tmp_path), backprop_threshold=None)
            if got is None:  # torch gives `set_` a version, which is seen when it is too late
                assert inputs is other_storage
                continue
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
            assert torch.equal(got[:B], want[:B])


def test_inference_tensors_have_no_version() -> None:
    def inputs() -> Iterator[Tensor]:
        x = torch.zeros(B, M)
        for numbers in frames():
            x.copy_(torch.from_numpy(numbers))
            yield x

    with torch.inference_mode():
        want = run(inputs(), nullcontext())
        for _ in range(2):
            assert torch.equal(run(inputs(), ssp.sparse_mode())[:B], want[:B])


def test_a_frame_that_stays_is_multiplied_once(tmp_path: Path) -> None:
    """Memory that others may write to is compared with its last copy, so that one image at every step stays one."""
    frame = torch.from_numpy(next(frames()))
    assert torch.equal(run([frame] * STEPS, ssp.sparse_mode())[:B], run([frame] * STEPS, nullcontext())[:B])
    from snn_sparse_plugin.fusion.plain import Plain

    plain = Plain()
    first = plain.entry(frame)
    assert first[0] is not frame
    assert plain.entry(frame) is first


# --- weights and buffers, changed after each step ---


def by_vector(layer: nn.Linear, neuron: Any, t: int, held: Any) -> None:
    vector_to_parameters(parameters_to_vector(layer.parameters()).detach() * 1.1, layer.parameters())


def by_data(layer: nn.Linear, neuron: Any, t: int, held: Any) -> None:
    layer.weight.data.mul_(1.1)


def by_new_data(layer: nn.Linear, neuron: Any, t: int, held: Any) -> None:
    layer.weight.data = layer.weight.data * 1.1


def by_a_data_held(layer: nn.Linear, neuron: Any, t: int, held: Any) -> None:
    held.setdefault("data", layer.weight.data).mul_(1.1)


def by_numpy(layer: nn.Linear, neuron: Any, t: int, held: Any) -> None:
    held.setdefault("numpy", layer.weight.detach().numpy())[:] *= 1.1


def by_swap(layer: nn.Linear, neuron: Any, t: int, held: Any) -> None:
    torch.utils.swap_tensors(layer.weight, nn.Parameter(layer.weight.detach() * 1.1))


def by_moving_average(layer: nn.Linear, neuron: Any, t: int, held: Any) -> None:
    mean = held.setdefault("mean", nn.Linear(M, N))
    for ours, theirs in zip(layer.parameters(), mean.parameters(), strict=True):
        ours.data.mul_(0.9).add_(theirs.data, alpha=0.1)


def by_pruning(layer: nn.Linear, neuron: Any, t: int, held: Any) -> None:
    prune.l1_unstructured(layer, "weight", 0.1)
    prune.remove(layer, "weight")


def by_optimizer(layer: nn.Linear, neuron: Any, t: int, held: Any) -> None:
    optimizer = held.setdefault("optimizer", torch.optim.SGD(layer.parameters(), 0.1))
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def of_beta(layer: nn.Linear, neuron: Any, t: int, held: Any) -> None:
    neuron.beta.data.fill_(0.9 - 0.02 * t)


def of_threshold(layer: nn.Linear, neuron: Any, t: int, held: Any) -> None:
    neuron.threshold.data = torch.tensor(0.5 + 0.02 * t)


def of_threshold_by_spikes(layer: nn.Linear, neuron: Any, t: int, held: Any) -> None:
    neuron.threshold.data = neuron.threshold.data + 0.1 * (neuron.mem.detach().mean() - 0.1)


def in_place(layer: nn.Linear, neuron: Any, t: int, held: Any) -> None:
    with torch.no_grad():
        layer.weight.mul_(1.1)


CHANGES = [
    *(by_vector, by_data, by_new_data, by_a_data_held, by_numpy, by_swap, by_moving_average, by_pruning),
    *(by_optimizer, of_beta, of_threshold, of_threshold_by_spikes, in_place),
]
# seen only when the numbers before are gone
ERRORS = (in_place, by_numpy, by_a_data_held)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_a_record_reads_changes(change: Any, grad: bool) -> None:
    inputs = [torch.from_numpy(x).clone() for x in frames()]
    with torch.set_grad_enabled(grad):
        want = run(inputs, nullcontext(), change)
        for _ in range(2):
            got = run_or_refused(inputs, change, backprop_threshold=None)
            if got is None:
                assert change in ERRORS
                continue
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_random_changes_between_steps() -> None:
    """Any of these, after any step, decided by what the neurons did."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        plan = rng.integers(0, 2 * len(CHANGES), STEPS)

        def change(layer: Any, neuron: Any, t: int, held: Any, plan: Any = plan) -> None:
            kind = plan[t]
            if kind < len(CHANGES) and float(neuron.mem.sum()) > 0:
                CHANGES[kind](layer, neuron, t, held)

        inputs = [torch.from_numpy(x).clone() for x in frames()]
        with torch.no_grad():
            want = run(inputs, nullcontext(), change)
            got = run(inputs, ssp.sparse_mode(backprop_threshold=None), change)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_reading_data_of_what_no_record_reads_runs_nothing() -> None:
    other, inputs = torch.ones(3), [torch.from_numpy(x).clone() for x in frames()]
    tally.clear()
    run(inputs, ssp.sparse_mode(), lambda *_: other.data.sum().item())
    assert tally.by_class()["Leaky"].calls["fused"] == 1


def test_kernels_leave_no_note_on_the_memory_they_read() -> None:
    """``Tensor.numpy`` would: torch resizes it no more, and the next record would have to copy it."""
    x = torch.rand(STEPS, B, M)
    layer, neuron = nn.Linear(M, N), snn.Leaky(beta=0.9)
    for _ in range(2):
        with ssp.sparse_mode():
            mem, total = neuron.init_leaky(), 0
            for step in x:
                spikes, mem = neuron(layer(step), mem)
                total = total + spikes.sum()
            total.backward()
    for tensor in (x, layer.weight, layer.bias):
        assert tensor.untyped_storage().resizable()
