"""Models as users write them: upstream's loops in ``sparse_mode()``, e-prop, a TTFS activation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snn_sparse_plugin import sparse_mode
from snn_sparse_plugin.bench.measure import Steps
from snn_sparse_plugin.core.errors import MissingDependencyError
from snn_sparse_plugin.layers.ttfs import TTFS
from snn_sparse_plugin.learners import eprop

from .compare import Comparison
from .sizes import Face, Sizes

UPSTREAM, SPARSE = "snntorch", "sparse_mode"


def _snntorch() -> Any:
    try:
        return import_module("snntorch")
    except ImportError as error:
        raise MissingDependencyError(f"snntorch is not installed: pip install snntorch ({error})") from error


def _mode(provider: str) -> AbstractContextManager[Any]:
    return sparse_mode() if provider == SPARSE else nullcontext()


def _training(net: nn.Module, loss: Callable[[], Tensor], provider: str, kept: list[Tensor]) -> Steps:
    """A whole training step, Adam included. Its state lies on the device, so that a graph can hold it."""
    parameters: list[Tensor] = list(net.parameters())
    on_gpu = parameters[0].is_cuda
    optimizer = torch.optim.Adam(parameters, lr=5e-4, capturable=on_gpu)

    def forward() -> Tensor:
        with _mode(provider):
            return loss()

    def backward(found: Tensor) -> None:
        found.backward()
        optimizer.step()

    return Steps(forward, backward, parameters, [*parameters, *kept])


def _shape(face: Face) -> dict[str, Any]:
    return face._asdict() | {"hidden": list(face.hidden)}


def _pair(build: Callable[..., Steps], face: Face, device: str) -> tuple[dict[str, Callable[[], Steps]], ...]:
    """Ours and the peers': the same model, in sparse mode and as it is."""
    return tuple({name: partial(build, face, device, name)} for name in (SPARSE, UPSTREAM))


class ClassifierNet(nn.Module):
    """snnTorch's tutorial 5: the same image at every step, and the membranes of the last layer."""

    def __init__(self, face: Face) -> None:
        super().__init__()
        snn = _snntorch()
        (hidden,) = face.hidden
        self.steps = face.T
        self.fc1, self.lif1 = nn.Linear(face.inputs, hidden), snn.Leaky(beta=0.95)
        self.fc2, self.lif2 = nn.Linear(hidden, face.classes), snn.Leaky(beta=0.95)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
        spk_rec, mem_rec = [], []
        for _ in range(self.steps):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk_rec.append(spk2)
            mem_rec.append(mem2)
        return torch.stack(spk_rec), torch.stack(mem_rec)


def _classifier(face: Face, device: str, provider: str) -> Steps:
    torch.manual_seed(0)
    net = ClassifierNet(face).to(device)
    x = torch.rand(face.B, face.inputs, device=device)
    target = torch.randint(face.classes, (face.B,), device=device)

    def loss() -> Tensor:
        _, mem_rec = net(x)
        total = torch.zeros(1, device=device)
        for step in range(face.T):  # as the tutorial reads them
            total += F.cross_entropy(mem_rec[step], target)
        return total

    return _training(net, loss, provider, [x])


def classifier(sizes: Sizes, device: str) -> Comparison:
    face = sizes.classifier
    row = f"tutorial classifier {face.inputs}–{face.hidden[0]}–{face.classes}, T={face.T}, B={face.B}"
    ours, peers = _pair(_classifier, face, device)
    own, figures = (SPARSE,), ("wall", "device", "graph")
    return Comparison(row, _shape(face), ours, peers, figures=figures, device=own, graph=own)


def _convolution(face: Face, device: str, provider: str) -> Steps:
    """snnTorch's tutorial 6: neurons that keep their states in an ``nn.Sequential``, a loss of every step's spikes."""
    snn = _snntorch()
    torch.manual_seed(0)
    grad = import_module("snntorch.surrogate").fast_sigmoid(slope=25)
    reset = import_module("snntorch.utils").reset
    neuron = {"beta": 0.5, "spike_grad": grad, "init_hidden": True}
    first, second = face.hidden
    side = ((face.inputs - 4) // 2 - 4) // 2
    net = nn.Sequential(
        *(nn.Conv2d(1, first, 5), nn.MaxPool2d(2), snn.Leaky(**neuron)),
        *(nn.Conv2d(first, second, 5), nn.MaxPool2d(2), snn.Leaky(**neuron)),
        *(nn.Flatten(), nn.Linear(second * side * side, face.classes), snn.Leaky(**neuron, output=True)),
    ).to(device)
    x = torch.rand(face.B, 1, face.inputs, face.inputs, device=device)
    target = torch.randint(face.classes, (face.B,), device=device)

    def loss() -> Tensor:
        reset(net)
        spk_rec = []
        for _ in range(face.T):
            spikes, _ = net(x)
            spk_rec.append(spikes)
        total = torch.zeros(1, device=device)
        for spikes in torch.stack(spk_rec):
            total = total + F.cross_entropy(spikes, target)
        return total

    return _training(net, loss, provider, [x])


def convolution(sizes: Sizes, device: str, **more: Any) -> Comparison:
    face = sizes.convolution
    first, second = face.hidden
    row = f"convolutional tutorial {first}C5–MP2–{second}C5–MP2–{face.classes}, T={face.T}, B={face.B}"
    ours, peers = _pair(_convolution, face, device)
    more = {"figures": ("wall", "device", "graph"), "device": (SPARSE,), "graph": (SPARSE,)} | more
    return Comparison(row, _shape(face), ours, peers, **more)


def _recurrent(face: Face, device: str, provider: str) -> Steps:
    """One Linear and one RLeaky, all to all; the loss is of its spike counts. Without an optimizer."""
    snn = _snntorch()
    torch.manual_seed(0)
    (hidden,) = face.hidden
    grad = import_module("snntorch.surrogate").fast_sigmoid(slope=25)
    fc = nn.Linear(face.inputs, hidden).to(device)
    with torch.no_grad():
        fc.weight *= 3  # at 2 % of the inputs the default hardly fires
    lif = snn.RLeaky(beta=0.9, linear_features=hidden, spike_grad=grad).to(device)
    x = (torch.rand(face.T, face.B, face.inputs, device=device) < 0.02).float()
    target = torch.randint(face.classes, (face.B,), device=device)
    parameters = [*fc.parameters(), *lif.parameters()]

    def forward() -> Tensor:
        with _mode(provider):
            spikes, mem = lif.init_rleaky()
            spk_rec = []
            for step in x.unbind(0):
                spikes, mem = lif(fc(step), spikes, mem)
                spk_rec.append(spikes)
            return F.cross_entropy(torch.stack(spk_rec).sum(0), target)

    return Steps(forward, lambda found: found.backward(), parameters, [*parameters, x])


def recurrent(sizes: Sizes, device: str, **more: Any) -> Comparison:
    face = sizes.recurrent
    row = f"RLeaky {face.inputs}–{face.hidden[0]}, T={face.T}, B={face.B}"
    ours, peers = _pair(_recurrent, face, device)
    figures = ("wall", "device", "graph")
    more = {"figures": figures, "device": (SPARSE,), "graph": (SPARSE,), "ops": ("layer", "recurrent")} | more
    return Comparison(row, _shape(face), ours, peers, neuron_steps=face.T * face.B * face.hidden[0], **more)


def _lsnn(face: Face, device: str, chunk: int, provider: str) -> Steps:
    torch.manual_seed(0)
    net = eprop.LSNNNetwork(face.inputs, face.hidden[0], face.classes, adaptive=0.5).to(device)
    x = (torch.rand(face.T, face.B, face.inputs, device=device) < 0.02).float()
    target = torch.randint(face.classes, (face.B,), device=device)
    parameters: list[Tensor] = list(net.parameters())
    if provider == "EProp.run":
        learner = eprop.EProp(net, chunk=chunk)

        def run() -> None:
            with learner:
                learner.run(x, F.cross_entropy, target)

        return Steps(run, lambda _: None, parameters, [*parameters, x])

    def forward() -> Tensor:
        state, total = None, torch.zeros((), device=device)
        for step in x.unbind(0):
            y, state = net(step, state)
            total = total + F.cross_entropy(y, target)
        return total

    return Steps(forward, lambda found: found.backward(), parameters, [*parameters, x])


def learner(sizes: Sizes, device: str) -> Comparison:
    """Milliseconds per step of e-prop, against backward through time by the step loop."""
    face = sizes.lsnn
    row = f"EProp.run, LSNN {face.inputs}–{face.hidden[0]}–{face.classes}, B={face.B}, per step"
    ours, peers = (
        {name: partial(_lsnn, face, device, sizes.chunk, name)}
        for name in ("EProp.run", "backward through time")
    )
    return Comparison(row, _shape(face), ours, peers, ops=("eprop",), per=face.T)


def _activation(make: Callable[[], nn.Module], elements: int, device: str) -> Steps:
    torch.manual_seed(0)
    module = make().to(device)
    x, grad = torch.randn(elements, device=device, requires_grad=True), torch.randn(elements, device=device)
    parameters = [x, *module.parameters()]
    return Steps(lambda: module(x), lambda out: out.backward(grad), parameters, parameters)


def activation(sizes: Sizes, device: str) -> Comparison:
    """A TTFS activation, forward and backward; its rival rounds to as many levels."""
    from ttfs import fake_quantised

    def made(**by: Callable[[], nn.Module]) -> dict[str, Callable[[], Steps]]:
        return {name: partial(_activation, make, sizes.elements, device) for name, make in by.items()}

    ours = made(TTFS=lambda: TTFS(t_d=0.5), fixed=lambda: TTFS(t_d=0.5, train_kernel=False))
    row, shape = f"TTFS activation, {sizes.elements:.0e} elements", {"elements": sizes.elements}
    peers, also = made(fake_quantise=fake_quantised), made(ReLU=nn.ReLU)
    figures = ("wall", "device", "graph")
    own = ("TTFS",)
    return Comparison(row, shape, ours, peers, also, figures, ops=("ttfs",), device=own, graph=own)
