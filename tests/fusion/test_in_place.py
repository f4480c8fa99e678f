"""Recorded steps that are added to, or written into, ordinary tensors: as if each had been done at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

snn = pytest.importorskip("snntorch")

import snn_sparse_plugin as ssp  # noqa: E402
from snn_sparse_plugin.adapters import record_of  # noqa: E402
from snn_sparse_plugin.core.errors import FusionError  # noqa: E402
from snn_sparse_plugin.fusion.record import reasons  # noqa: E402
from snn_sparse_plugin.fusion.recorded import Recorded  # noqa: E402

T, B, M, N, C = 9, 4, 12, 10, 5


class Places:
    """The tensors of a loop."""

    def __init__(self) -> None:
        self.total, self.every = torch.zeros(B, C), torch.zeros(T, B, C)
        self.across, self.last, self.wide = (
            torch.zeros(B, T, C),
            torch.ones(B, T),
            torch.full((T + 3, B, C), 7.0),
        )


Form = Callable[[Places, int, Tensor, Tensor], Any]


def assign(target: Tensor, index: Any, value: Any) -> None:
    target[index] = value


def augmented(p: Places, k: int, o: Tensor, m: Tensor) -> None:
    p.total += o


FORMS: dict[str, Form] = {
    "total += o": augmented,
    "add_ with alpha": lambda p, k, o, m: p.total.add_(m, alpha=0.5),
    "sub_": lambda p, k, o, m: p.total.sub_(m),
    "mul_": lambda p, k, o, m: None if m.requires_grad else p.total.add_(1).mul_(1 + 0.1 * m),
    "div_": lambda p, k, o, m: p.total.add_(m).div_(2 + o),
    "a running mean": lambda p, k, o, m: p.total.__iadd__((m - p.total) / (k + 1)),
    "maximum into itself": lambda p, k, o, m: (
        None if m.requires_grad else torch.maximum(p.total, m, out=p.total)
    ),
    "the sum of a step": lambda p, k, o, m: p.total.__iadd__(o.sum(1, keepdim=True)),
    "every[k] = o": lambda p, k, o, m: assign(p.every, k, o),
    "every[k] = m": lambda p, k, o, m: assign(p.every, k, m),
    "backwards": lambda p, k, o, m: assign(p.every, T - 1 - k, m),
    "negative": lambda p, k, o, m: assign(p.every, k - T, m),
    "every other": lambda p, k, o, m: assign(p.every, k, m) if k % 2 else None,
    "twice": lambda p, k, o, m: (assign(p.every, k, m), assign(p.every, k, o)),
    "always at one place": lambda p, k, o, m: assign(p.every, 0, m),
    "in a larger tensor": lambda p, k, o, m: assign(p.wide, k + 2, m),
    "across[:, k] = o": lambda p, k, o, m: assign(p.across, (slice(None), k), m),
    "across[:, k, :] = o": lambda p, k, o, m: assign(p.across, (slice(None), k, slice(None)), o),
    "last[..., k] = a sum": lambda p, k, o, m: assign(p.last, (..., k), m.sum(1)),
    "a slice": lambda p, k, o, m: assign(p.every, slice(k, k + 1), m),
    "broadcast": lambda p, k, o, m: assign(p.every, k, m[0]),
    "index_copy_": lambda p, k, o, m: p.every.index_copy_(0, torch.tensor([k]), m.unsqueeze(0)),
    "index_add_": lambda p, k, o, m: p.every.index_add_(0, torch.tensor([k // 2]), m.unsqueeze(0)),
    "copy_": lambda p, k, o, m: p.total.copy_(m),
    "a number between": lambda p, k, o, m: (assign(p.every, k, m), assign(p.every, 0, 3.0)),
    "read between": lambda p, k, o, m: (assign(p.every, k, m), p.total.add_(p.every[0])),
    "read once": lambda p, k, o, m: (assign(p.every, k, m), p.total.add_(p.every.sum(0)) if k == 4 else None),
    "several": lambda p, k, o, m: (
        p.total.add_(o),
        assign(p.every, k, m),
        assign(p.across, (slice(None), k), o),
    ),
}
FUSED = set(FORMS) - {
    "a slice",
    "a number between",
    "read between",
    "read once",
    "maximum into itself",
    "mul_",
}


def network() -> tuple[Any, ...]:
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(M, N), nn.Linear(N, C)
    with torch.no_grad():
        for fc in (fc1, fc2):
            fc.weight.copy_((fc.weight * 64).round() / 16)
            fc.bias.copy_((fc.bias * 64).round() / 16)
    return fc1, snn.Leaky(0.5), fc2, snn.Leaky(0.5)


def run(net: tuple[Any, ...], form: Form, grad: bool = True) -> tuple[Places, list[Tensor]]:
    fc1, l1, fc2, l2 = net
    generator = torch.Generator().manual_seed(1)
    x = (torch.rand(T, B, M, generator=generator) < 0.4).float()
    m1, m2, places = torch.zeros(B, N), torch.zeros(B, C), Places()
    with torch.set_grad_enabled(grad):
        for k in range(T):
            s, m1 = l1(fc1(x[k]), m1)
            o, m2 = l2(fc2(s), m2)
            form(places, k, o, m2)
    return places, [fc1.weight, fc1.bias, fc2.weight]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("name", FORMS)
def test_as_if_at_once(name: str, grad: bool) -> None:
    net = network()
    expected, parameters = run(net, FORMS[name], grad)
    before = list(vars(expected).values())
    with ssp.sparse_mode(backprop_threshold=None):
        net2 = network()
        found, parameters2 = run(net2, FORMS[name], grad)
        after = list(vars(found).values())
        if name in FUSED:
            assert any(type(x) is Recorded for x in after)
        losses = []
        for xs in (before, after):
            loss: Any = 0.0
            for i, x in enumerate(xs):
                loss = loss + (x * torch.arange(x.numel()).view_as(x) * (i + 1)).sum() + (x**2).sum()
            losses.append(loss)
    for a, b in zip(after, before, strict=True):
        assert type(a) is Tensor
        assert torch.equal(a, b), name
        assert a._version == b._version, name
        assert a.requires_grad == b.requires_grad
    if name in FUSED:
        assert record_of(net2[1]).calls.get("fused") == 1
    assert losses[0].requires_grad == losses[1].requires_grad
    if losses[0].requires_grad:
        for a, b in zip(
            torch.autograd.grad(losses[1], parameters2),
            torch.autograd.grad(losses[0], parameters),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


# --- tensors that are not borrowed ---


def lent(prepare: Callable[[Tensor], Any], total: Tensor | None = None) -> tuple[Any, Tensor]:
    """The type of a tensor after a recorded step was added to it."""
    total = torch.zeros(B, C) if total is None else total
    kept = prepare(total)
    lif = snn.Leaky(0.5)
    with ssp.sparse_mode():
        mem = torch.zeros(B, C)
        for _ in range(3):
            o, mem = lif(torch.rand(B, C) * 2, mem)
            total += o
        kind = type(total)
        seen = kept if isinstance(kept, Tensor) else None
        if seen is not None:
            assert torch.equal(seen.reshape(-1), total.detach().reshape(-1)[: seen.numel()])
    assert total.sum() > 0
    return kind, total


def test_one_that_is_nobody_elses_is_borrowed() -> None:
    assert lent(lambda x: None)[0] is Recorded


@pytest.mark.parametrize(
    "prepare",
    [
        lambda x: x.view(-1),
        lambda x: x[0],
        lambda x: x.detach(),
        lambda x: x.numpy(),
        lambda x: x.share_memory_(),
    ],
    ids=["view", "row", "detach", "numpy", "shared"],
)
def test_one_whose_memory_others_see_is_not(prepare: Callable[[Tensor], Any]) -> None:
    assert lent(prepare)[0] is Tensor


def test_numpys_memory_is_not() -> None:
    array = np.zeros((B, C), dtype=np.float32)
    assert lent(lambda x: None, torch.from_numpy(array))[0] is Tensor
    assert array.sum() > 0


def test_one_that_autograd_keeps_is_not() -> None:
    weight, total = torch.ones(B, C, requires_grad=True), torch.zeros(B, C)
    made = total * weight  # needs total for its backward
    lif = snn.Leaky(0.5)
    with ssp.sparse_mode():
        mem = torch.zeros(B, C)
        for _ in range(3):
            o, mem = lif(torch.rand(B, C) * 2, mem)
            total += o
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            made.sum().backward()


def test_a_leaf_that_wants_a_gradient_is_refused_in_the_users_line() -> None:
    total, lif = torch.zeros(B, C, requires_grad=True), snn.Leaky(0.5)
    with ssp.sparse_mode():
        o, mem = lif(torch.rand(B, C), torch.zeros(B, C))
        o, mem = lif(torch.rand(B, C), mem)
        with pytest.raises(RuntimeError, match="leaf Variable"):
            total += o
    assert type(total) is Tensor


@pytest.mark.parametrize(
    ("index", "error"), [(T, IndexError), (-T - 1, IndexError), ((0, 0), RuntimeError)], ids=str
)
def test_what_torch_refuses_is_refused_in_the_users_line(index: Any, error: type[Exception]) -> None:
    every, lif = torch.zeros(T, B, C), snn.Leaky(0.5)
    with ssp.sparse_mode():
        _, mem = lif(torch.rand(B, C), torch.zeros(B, C))
        _, mem = lif(torch.rand(B, C), mem)
        with pytest.raises(error):
            every[index] = mem
    assert type(every) is Tensor
    assert torch.equal(every, torch.zeros(T, B, C))


def test_a_sum_that_grows_is_refused_in_the_users_line() -> None:
    total, lif = torch.zeros(1, C), snn.Leaky(0.5)
    with ssp.sparse_mode():
        o, mem = lif(torch.rand(B, C), torch.zeros(B, C))
        o, mem = lif(torch.rand(B, C), mem)
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            total += o


def test_another_dtype_is_cast_as_torch_casts_it() -> None:
    lif, x = snn.Leaky(0.5), torch.rand(T, B, C)

    def loop() -> list[Tensor]:
        mem, double, half = torch.zeros(B, C), torch.zeros(T, B, C).double(), torch.zeros(T, B, C).half()
        total = torch.zeros(B, C).double()
        for k, step in enumerate(x):
            _, mem = lif(step, mem)
            double[k], half[k] = mem, mem
            total += mem
        return [double, half, total]

    expected = loop()
    with ssp.sparse_mode():
        found = loop()
        assert all(type(x) is Recorded for x in found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- the object ---


def test_it_is_the_same_object_with_its_attributes_and_memory() -> None:
    total, lif = torch.zeros(B, C), snn.Leaky(0.5)
    total.label = "mine"  # type: ignore[attr-defined]
    pointer, same = total.data_ptr(), total
    with ssp.sparse_mode():
        mem = torch.zeros(B, C)
        for _ in range(3):
            o, mem = lif(torch.rand(B, C) * 2, mem)
            total += o
        assert type(total) is Recorded
        assert (total.shape, total.dtype, total.device) == (same.shape, torch.float32, torch.device("cpu"))
        assert torch.zeros_like(total).shape == (B, C)
    assert total.data_ptr() == pointer
    assert total is same
    assert total.label == "mine"  # type: ignore[attr-defined]
    assert vars(total) == {"label": "mine"}


def test_a_step_that_fails_leaves_it_as_it_was() -> None:
    total, every, lif, weight = (
        torch.full((B, C), 3.0),
        torch.zeros(T, B, C),
        snn.Leaky(0.5),
        torch.ones(B, C),
    )
    with ssp.sparse_mode():
        mem = torch.zeros(B, C)
        for k in range(3):
            o, mem = lif(torch.rand(B, C) * weight, mem)
            total += o * weight
            every[k] = o
        weight.add_(1)  # a record that reads it cannot run any more
        with pytest.raises(FusionError, match="changed in place"):
            total.sum().item()
    assert type(total) is type(every) is Tensor
    assert torch.equal(total, torch.full((B, C), 3.0))
    assert torch.equal(every, torch.zeros(T, B, C))


def test_a_view_made_while_it_is_borrowed_sees_what_comes_after() -> None:
    lif, x = snn.Leaky(0.5), 2 * torch.rand(T, B, C)

    def loop() -> tuple[Tensor, Tensor, Tensor]:
        total, mem, row = torch.zeros(B, C), torch.zeros(B, C), None
        for k, step in enumerate(x):
            o, mem = lif(step, mem)
            total += o
            if k == 3:
                row = total[0]
        kept = row.clone()
        total.add_(1)
        return kept, row, total

    expected = loop()
    with ssp.sparse_mode():
        found = loop()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_two_loops_into_one_tensor() -> None:
    lif, x = snn.Leaky(0.5), 2 * torch.rand(T, B, C)

    def loop() -> Tensor:
        total = torch.zeros(B, C)
        for _ in range(2):
            mem = torch.zeros(B, C)
            for step in x:
                o, mem = lif(step, mem)
                total += o
        return total

    expected = loop()
    reasons.clear()
    with ssp.sparse_mode():
        found = loop()
        assert not reasons
    assert torch.equal(found, expected)
