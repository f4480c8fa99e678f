"""Gradients and hooks at a step of the loop: upstream's, or an error."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snn_sparse_plugin import sparse_mode
from snn_sparse_plugin.core import tally
from snn_sparse_plugin.core.errors import FusionError

norse = pytest.importorskip("norse.torch")
snn = pytest.importorskip("snntorch")

EXACT = {"backprop_threshold": None, "min_active": 0}


def values(library: str, x: Tensor, at: int, look: Any) -> tuple[Tensor, Tensor]:
    """The step that ``look`` was called with, and the loss."""
    torch.manual_seed(0)
    fc = nn.Linear(4, 4)
    nn.init.uniform_(fc.weight, 0, 2)
    if library == "norse":
        p = norse.LIFBoxParameters(tau_mem_inv=torch.tensor(200.0))
        cell, state = norse.LIFBoxCell(p), None
    else:
        cell, state = snn.Leaky(0.9), torch.zeros(1)
    kept, out = None, []
    for step, frame in enumerate(x):
        spikes, state = cell(fc(frame) * 3, state)
        if step == at:
            kept = spikes if library == "norse" else state
            look(kept)
        out.append(spikes)
    return kept, torch.stack(out).mul(torch.arange(1.0, len(x) + 1).view(-1, 1, 1)).sum()


LOOKS = {
    "retain_grad": lambda z: z.retain_grad(),
    "requires_grad": lambda z: z.requires_grad and z.retain_grad(),
    "is_leaf": lambda z: z.is_leaf or z.retain_grad(),
    "grad_fn": lambda z: z.grad_fn is not None and z.retain_grad(),
    "retains_grad": lambda z: z.retains_grad or z.retain_grad(),
    "output_nr": lambda z: z.output_nr >= 0 and z.retain_grad(),
    "register_hook": lambda z: (z.register_hook(lambda grad: grad * 1), z.retain_grad()),
}


@pytest.mark.parametrize("library", ["norse", "snntorch"])
@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize("at", [1, 4])
def test_what_looks_at_a_steps_place_finds_the_loops(name, library, at):
    grads = []
    for context in (nullcontext(), sparse_mode(**EXACT)):
        x = (torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(1)) < 0.6).float().requires_grad_()
        with context:
            kept, loss = values(library, x, at, LOOKS[name])
            loss.backward()
        grads.append(kept.grad)
    assert float(grads[0].abs().sum()) > 0
    torch.testing.assert_close(grads[1], grads[0])


ASKS = {
    "retain_grad": lambda z, loss: z.retain_grad(),
    "register_hook": lambda z, loss: z.register_hook(print),
    "autograd.grad": lambda z, loss: torch.autograd.grad(loss, z),
    "autograd.grad of several": lambda z, loss: torch.autograd.grad(loss, [z]),
    "backward(inputs)": lambda z, loss: loss.backward(inputs=[z]),
    "get_gradient_edge": lambda z, loss: torch.autograd.graph.get_gradient_edge(z),
    "register_multi_grad_hook": lambda z, loss: torch.autograd.graph.register_multi_grad_hook([z], print),
}


@pytest.mark.parametrize("name", ASKS)
def test_asking_after_a_fused_run_raises(name):
    """Upstream answers; what would be silently another gradient is an error that says what to do."""
    x = torch.rand(6, 3, 4).requires_grad_()
    with sparse_mode(**EXACT):
        kept, loss = values("snntorch", x, 2, lambda z: None)
        loss.item()
        with pytest.raises(FusionError, match=r"(?s)test_gradients_inside_a_loop\.py.*fuse_time=False"):
            ASKS[name](kept, loss)
    loss.backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", ASKS)
def test_asking_after_single_steps_is_answered(name):
    x = torch.rand(6, 3, 4).requires_grad_()
    with sparse_mode(**EXACT, fuse_time=False):
        kept, loss = values("snntorch", x, 2, lambda z: z.sum().item())
        ASKS[name](kept, loss)


def test_a_result_that_nothing_was_made_of_has_its_place():
    x = torch.rand(6, 3, 4).requires_grad_()
    with sparse_mode(**EXACT):
        lif, mem, out = snn.Leaky(0.9), torch.zeros(1), []
        for frame in x:
            spikes, mem = lif(frame, mem)
            out.append(spikes)
        rates = torch.stack(out).mean(0)
        assert rates.requires_grad
        rates.retain_grad()
        rates.pow(2).sum().backward()
    assert torch.equal(rates.grad, 2 * rates.detach())
    assert tally.of(lif, str).calls["fused"] == 1


def test_a_gradient_asked_for_before_a_print_is_kept():
    grads = []
    for context in (nullcontext(), sparse_mode(**EXACT)):
        x = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()

        def look(z: Tensor) -> None:
            z.retain_grad()
            str(z.mean())

        with context:
            kept, loss = values("snntorch", x, 2, look)
            loss.backward()
        grads.append(kept.grad)
    torch.testing.assert_close(*grads)


def test_a_tensor_of_its_own_is_asked_again(tmp_path):
    """Loaded from a file, or changed in place since, it has no past that it stands beside."""
    x = torch.rand(6, 3, 4).requires_grad_()
    with sparse_mode(**EXACT):
        kept, loss = values("snntorch", x, 2, lambda z: None)
        loss.item()
    torch.save(kept, tmp_path / "step.pt")
    torch.load(tmp_path / "step.pt").requires_grad_().register_hook(print)
    kept.mul_(2).retain_grad()
    kept.sum().backward()
    assert torch.equal(kept.grad, torch.ones(3, 4))


@pytest.mark.parametrize(
    "read",
    [lambda z: (z > 0).sum(), lambda z: z.detach().mean(), lambda z: z.argmax(1)],
    ids=["compare", "detach", "argmax"],
)
def test_a_reader_without_a_gradient_leaves_the_place_as_it_is(read):
    """The usual accuracy of a step, printed before its gradient is asked for."""
    grads = []
    for context in (nullcontext(), sparse_mode(**EXACT)):
        x = torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with context:
            lif, out = snn.Leaky(0.5, init_hidden=True), []
            for step, frame in enumerate(x):
                spikes = lif(frame * 3)
                if step == 3:
                    str(read(spikes))
                    spikes.retain_grad()
                    kept = spikes
                out.append(spikes)
            torch.stack(out).cumsum(0).pow(2).sum().backward()
        grads.append(kept.grad)
    assert float(grads[0].abs().sum()) > 0
    torch.testing.assert_close(grads[1], grads[0])
