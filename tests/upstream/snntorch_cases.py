"""Every thresholded neuron of snnTorch, the ways to make one sparse, and what a user sees of a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

snntorch = pytest.importorskip("snntorch")

import snn_sparse_plugin.snntorch as face  # noqa: E402
from snn_sparse_plugin import sparse_mode, sparsify  # noqa: E402

T, B, N = 6, 3, 4


@dataclass(frozen=True)
class Case:
    """One class: how it is built and called.

    ``states`` are its hidden buffers in the order of its arguments, ``init`` its deprecated reset method,
    ``shape`` that of one sample, ``neurons`` that of a parameter per neuron.
    """

    name: str
    args: dict[str, Any]
    states: tuple[str, ...] = ()
    init: str = ""
    shape: tuple[int, ...] = (N,)
    neurons: tuple[int, ...] = (N,)
    sequence: bool = False

    @property
    def recurrent(self) -> bool:
        return self.name in ("RLeaky", "RSynaptic")

    def knows(self, option: str) -> bool:
        """Whether the constructor has this option; DeltaLeaky hands Leaky's on."""
        cls = getattr(snntorch, self.name)
        classes = (cls, snntorch.Leaky) if cls is snntorch.DeltaLeaky else (cls,)
        return any(option in inspect.signature(c).parameters for c in classes)

    def build(self, library: Any = snntorch, **options: Any) -> nn.Module:
        """The same parameters at every call; a function among the options is called with the case."""
        torch.manual_seed(0)
        made = {name: v(self) if getattr(v, "per_case", False) else v for name, v in options.items()}
        return getattr(library, self.name)(**{**self.args, **made})

    def hidden(self, library: Any = snntorch, **options: Any) -> nn.Module:
        """Built with its state inside, where it has one."""
        kept = {"init_hidden": True} if self.states else {}
        return self.build(library, **{**kept, **options})

    def inputs(self) -> Tensor:
        """(T, B, ...), on both sides of every threshold used here."""
        x = torch.randn(T, B, *self.shape, generator=torch.Generator().manual_seed(1))
        return x + 0.3

    def zeros(self) -> tuple[Any, ...]:
        """The initial state as arguments of an explicit call."""
        size = (B, 3, 5, 5) if self.name == "SConv2dLSTM" else (B, N)
        if self.name == "DeltaLeaky":
            return ((torch.zeros(size), torch.zeros(size)),)
        return tuple(torch.zeros(size) for _ in self.states)


CASES = {
    case.name: case
    for case in (
        Case("Leaky", {"beta": 0.9}, ("mem",), "init_leaky"),
        Case("Synaptic", {"alpha": 0.8, "beta": 0.9}, ("syn", "mem"), "init_synaptic"),
        Case(
            "Alpha",
            {"alpha": 0.9, "beta": 0.8, "threshold": 0.5},
            ("syn_exc", "syn_inh", "mem"),
            "init_alpha",
        ),
        Case("Lapicque", {"beta": 0.9, "threshold": 0.1}, ("mem",), "init_lapicque"),
        Case("RLeaky", {"beta": 0.9, "linear_features": N}, ("spk", "mem"), "init_rleaky"),
        Case(
            "RSynaptic",
            {"alpha": 0.8, "beta": 0.9, "linear_features": N},
            ("spk", "syn", "mem"),
            "init_rsynaptic",
        ),
        Case("DeltaLeaky", {"delta_threshold": 0.5, "beta": 0.9}, ("mem",), "init_leaky"),
        Case("SLSTM", {"input_size": N, "hidden_size": N, "threshold": 0.05}, ("syn", "mem"), "init_slstm"),
        Case(
            "SConv2dLSTM",
            {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "threshold": 0.05},
            ("syn", "mem"),
            "init_sconv2dlstm",
            shape=(2, 5, 5),
            neurons=(3, 1, 1),
        ),
        Case("StateLeaky", {"beta": 0.9, "channels": N}, sequence=True),
        Case("LinearLeaky", {"beta": 0.9, "in_features": N, "out_features": N}, sequence=True),
        Case(
            "AssociativeLeaky",
            {"in_dim": N, "d_value": 2, "d_key": 3, "num_spiking_neurons": 6},
            sequence=True,
        ),
        Case("LeakyParallel", {"input_size": N, "hidden_size": N, "beta": 0.9}, sequence=True),
    )
}
STEPPED = {name: case for name, case in CASES.items() if not case.sequence}
every_class = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_stepped = pytest.mark.parametrize("case", STEPPED.values(), ids=STEPPED)


@dataclass(frozen=True)
class Way:
    """One way to make a neuron sparse."""

    library: Any = snntorch
    marked: bool = False
    options: dict[str, Any] = field(default_factory=lambda: {"backprop_threshold": None})

    def ready(self, module: nn.Module) -> nn.Module:
        if self.marked:
            sparsify(module, **self.options)
        return module

    @contextmanager
    def on(self) -> Iterator[None]:
        with nullcontext() if self.marked else sparse_mode(**self.options):
            yield


# the window of "wide" holds every neuron: the masked gradient is computed, and is upstream's
WIDE = {"backprop_threshold": 1e9, "min_active": 0}
WAYS = {
    "sparse_mode": Way(),
    "sparsify": Way(marked=True),
    "face": Way(library=face),
    "wide": Way(options=WIDE),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def steps(module: nn.Module, case: Case, x: Tensor) -> list[Any]:
    """What the module returns: at every step, or once for a sequence."""
    return [module(x)] if case.sequence else [module(h) for h in x.unbind(0)]


def explicit_steps(
    module: nn.Module, case: Case, x: Tensor, state: tuple[Any, ...] | None = None
) -> list[Any]:
    """The same with the state passed in and out."""
    outs, state = [], case.zeros() if state is None else state
    for h in x.unbind(0):
        out = module(h, *state)
        state = out if case.recurrent else out[1:]
        outs.append(out)
    return outs


def observe(
    module: nn.Module, case: Case, run: Callable[..., list[Any]] = steps, **kwargs: Any
) -> dict[str, Any]:
    """Outputs, hidden states and every gradient of a run."""
    x = case.inputs().to(next((p.dtype for p in module.parameters()), torch.float32)).requires_grad_()
    torch.manual_seed(2)  # a spike function may be random
    returned = run(module, case, x, **kwargs)
    leaves = tree_leaves(returned)
    differentiable = [leaf for leaf in leaves if leaf.requires_grad]
    seen: dict[str, Any] = {"structure": [_shape_of(out) for out in returned], "outputs": leaves}
    seen["hidden"] = dict(module.named_buffers())
    if differentiable:
        generator = torch.Generator().manual_seed(3)
        loss = sum((leaf * torch.rand(leaf.shape, generator=generator)).sum() for leaf in differentiable)
        parameters = dict(module.named_parameters())
        owners = {"input": x, **{name: p for name, p in parameters.items() if p.requires_grad}}
        grads = torch.autograd.grad(loss, list(owners.values()), allow_unused=True)
        seen["grads"] = dict(zip(owners, grads, strict=True))
    return seen


def _shape_of(out: Any) -> Any:
    if isinstance(out, tuple):
        return tuple(_shape_of(o) for o in out)
    return tuple(out.shape), out.dtype


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], rtol: float = 1e-5) -> None:
    """Structure, outputs and hidden states are equal; gradients to rounding."""
    assert ours["structure"] == theirs["structure"]
    assert all(equal(a, b) for a, b in zip(ours["outputs"], theirs["outputs"], strict=True))
    assert ours["hidden"].keys() == theirs["hidden"].keys()
    assert all(equal(value, theirs["hidden"][name]) for name, value in ours["hidden"].items())
    assert ours.get("grads", {}).keys() == theirs.get("grads", {}).keys()
    for name, grad in ours.get("grads", {}).items():
        expected = theirs["grads"][name]
        if expected is None or grad is None:
            assert grad is expected, name
            continue
        difference = (grad - expected).nan_to_num().norm()
        assert equal(grad.isnan(), expected.isnan()), name
        assert difference <= rtol * expected.nan_to_num().norm(), name


def equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def outcome(run: Callable[[], Any]) -> tuple[str, Any]:
    """("", what it returned), or the kind of its error and the message."""
    try:
        return "", run()
    except Exception as error:
        return type(error).__name__, str(error)


def fires(seen: dict[str, Any]) -> bool:
    """Whether there are spikes and silences among the first outputs of the steps."""
    spikes = seen["outputs"][0]
    return bool((spikes == 0).any()) and any(bool((o != 0).any()) for o in seen["outputs"])


def spike_gradient(module, case):
    """Gradient of the spikes of two steps, which is zero where every neuron is masked."""
    x = case.inputs()[:2].requires_grad_()
    if (
        case.name == "AssociativeLeaky"
    ):  # with a projection the output also depends on the input without spikes
        module.use_q_projection = False
    outs = steps(module, case, x)
    return torch.autograd.grad(sum((o[0] if isinstance(o, tuple) else o).sum() for o in outs), x)[0]
