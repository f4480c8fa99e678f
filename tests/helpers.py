"""What several test files need: weights on a binary grid, relative norms, the neuron family."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import combinations

import pytest
import torch

from snn_sparse_plugin import NeuronSpec

STEP = 2.0**-8  # sums of 0/1 inputs times multiples of this are exact in float32, in any order


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run with so many; one where the tensors are so small that a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _traces_a_comparison_with_none() -> bool:
    def as_snntorch_asks(x):
        return x if x == None else x + 1  # noqa: E711

    try:
        torch.compile(as_snntorch_asks, backend="eager", fullgraph=True)(torch.ones(1))
    except RuntimeError:
        return False
    return True


compiles_whole = pytest.mark.skipif(
    not _traces_a_comparison_with_none(),
    reason="this torch cannot trace snnTorch's `mem == None`, nor a class's own attribute, into one graph",
)


def on_grid(*shape, scale=1.0):
    """Random multiples of 2^-8 in [-scale, scale]."""
    return torch.round((2 * torch.rand(shape) - 1) * scale / STEP) * STEP


def spikes(*shape, p=0.1):
    return (torch.rand(shape) < p).float()


def relative(a, b):
    """Norm of the difference relative to the norm of b."""
    scale = b.norm()
    return ((a - b).norm() / scale).item() if scale > 0 else a.norm().item()


def family():
    """Every member of the canonical family."""
    found = []
    for synapse in (False, True):
        for reset, scope in [("none", "state"), ("subtract", "state"), ("zero", "state"), ("zero", "sum")]:
            found.append(NeuronSpec("decay", synapse, reset, "delayed", scope))
            if reset != "none":
                found.append(NeuronSpec("decay", synapse, reset, "corrected", scope, attached=True))
                found.append(NeuronSpec("decay", synapse, reset, "corrected", scope))
    for update in ("decay", "euler", "box"):
        for reset in ("none", "subtract", "zero", "value"):
            for attached in (False, True):
                found.append(NeuronSpec(update, update == "euler", reset, "immediate", attached=attached))
        found.append(NeuronSpec(update, update == "euler", "none", spiking=False))
    return found


def members():
    """The family as parameters of a test: a member has kernels of its own, which take ten seconds to compile."""
    return some({name(spec): spec for spec in family()})


def some(specs):
    """Parameters of a test: as many of the neurons as let every two options meet; the others are ``slow``."""
    left = {pair for spec in specs.values() for pair in _pairs(spec)}
    chosen = []
    while left:
        chosen.append(max(specs, key=lambda label: len(left & _pairs(specs[label]))))
        left -= _pairs(specs[chosen[-1]])
    return [
        pytest.param(spec, id=label, marks=() if label in chosen else pytest.mark.slow)
        for label, spec in specs.items()
    ]


def _pairs(spec):
    return set(combinations(sorted(asdict(spec).items()), 2))


def name(spec):
    parts = [spec.update, "synapse" if spec.synapse else "", spec.reset, spec.timing, spec.scope]
    parts += ["attached" if spec.attached else "", "" if spec.spiking else "readout"]
    return "-".join(p for p in parts if p)
