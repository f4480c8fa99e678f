"""Networks for the tests of e-prop: every kind of neuron of both libraries, built for any dtype."""

import norse.torch as norse
import snntorch as snn
import torch
from helpers import relative
from torch import nn

from snn_sparse_plugin import Surrogate
from snn_sparse_plugin.learners import eprop

M, N, C = 7, 6, 3


# snnTorch 1.0 makes float32 spikes of anything, with a float32 gradient
spike = Surrogate("fast_sigmoid", (5.0,))


class OwnNeuron(nn.Module):
    """A neuron of nobody's library: a soft threshold and a membrane that decays faster above it."""

    def forward(self, current, mem=None):
        mem = torch.zeros_like(current) if mem is None else mem
        mem = 0.9 * mem - 0.2 * torch.tanh(mem) ** 2 + current
        spikes = spike(mem - 1.0)
        return spikes, mem - spikes


class SnnNet(nn.Module):
    """Linear, a neuron of snnTorch with explicit states, Linear, readout."""

    def __init__(self, hidden, readout):
        super().__init__()
        self.fc1, self.hidden = nn.Linear(M, N), hidden
        self.fc2, self.readout = nn.Linear(N, C), readout

    def forward(self, x, state=None):
        if state is None:  # snnTorch's neurons remember their last state
            for m in (self.hidden, self.readout):
                if isinstance(m, snn.SpikingNeuron):
                    m.reset_mem()
        (first, second) = ((), ()) if state is None else state
        spikes, *first = self.hidden(self.fc1(x), *first)
        first = (spikes, *first) if isinstance(self.hidden, snn.RLeaky) else first
        first = (spikes, *first) if isinstance(self.hidden, snn.RSynaptic) else first
        _spk, *second = self.readout(self.fc2(spikes), *second)
        return second[-1], (tuple(first), tuple(second))


class Mixed(nn.Module):
    """Recurrence through a Linear outside the neuron, a constant input current beside it, a Linear readout."""

    def __init__(self):
        super().__init__()
        self.fc1, self.rec = nn.Linear(M, N), nn.Linear(N, N, bias=False)
        self.lif = snn.Leaky(beta=0.8, spike_grad=spike)
        self.out = nn.Linear(N, C)

    def forward(self, x, state=None):
        if state is None:
            self.lif.reset_mem()
        spikes, mem = (torch.zeros(len(x), N, dtype=x.dtype), None) if state is None else state
        spikes, mem = self.lif(self.fc1(x) + self.rec(spikes), mem)
        return self.out(spikes), (spikes, mem)


def silent_leaky(beta=0.7):
    return snn.Leaky(beta=beta, reset_mechanism="none")


def norse_net(*hidden, readout=None):
    return norse.SequentialState(*hidden, readout or norse.LICell())


LIF = norse.LIFParameters(method="super", alpha=torch.tensor(5.0), v_th=torch.tensor(0.4))

NETWORKS = {
    "leaky-subtract": lambda: SnnNet(snn.Leaky(beta=0.9, spike_grad=spike), silent_leaky()),
    "leaky-zero": lambda: SnnNet(
        snn.Leaky(beta=0.9, spike_grad=spike, reset_mechanism="zero"), silent_leaky()
    ),
    "leaky-attached": lambda: SnnNet(
        snn.Leaky(beta=0.9, spike_grad=spike, reset_delay=False), silent_leaky()
    ),
    "leaky-beta-per-neuron": lambda: SnnNet(
        snn.Leaky(beta=torch.linspace(0.5, 0.95, N), spike_grad=spike), silent_leaky()
    ),
    "leaky-spiking-readout": lambda: SnnNet(
        snn.Leaky(beta=0.9, spike_grad=spike), snn.Leaky(beta=0.8, spike_grad=spike)
    ),
    "leaky-synaptic-readout": lambda: SnnNet(
        snn.Leaky(beta=0.9, spike_grad=spike),
        snn.Synaptic(alpha=0.6, beta=0.8, reset_mechanism="none", spike_grad=spike),
    ),
    "synaptic": lambda: SnnNet(snn.Synaptic(alpha=0.8, beta=0.9, spike_grad=spike), silent_leaky()),
    "alpha": lambda: SnnNet(
        snn.Alpha(alpha=0.9, beta=0.7, spike_grad=spike, reset_mechanism="none", threshold=0.5),
        silent_leaky(),
    ),
    "lapicque": lambda: SnnNet(snn.Lapicque(beta=0.9, threshold=0.02, spike_grad=spike), silent_leaky()),
    "rleaky": lambda: SnnNet(snn.RLeaky(beta=0.9, linear_features=N, spike_grad=spike), silent_leaky()),
    "rsynaptic": lambda: SnnNet(
        snn.RSynaptic(alpha=0.7, beta=0.9, linear_features=N, spike_grad=spike), silent_leaky()
    ),
    "rleaky-zero": lambda: SnnNet(
        snn.RLeaky(beta=0.9, linear_features=N, spike_grad=spike, reset_mechanism="zero"), silent_leaky()
    ),
    "rsynaptic-zero": lambda: SnnNet(
        snn.RSynaptic(alpha=0.7, beta=0.9, linear_features=N, spike_grad=spike, reset_mechanism="zero"),
        silent_leaky(),
    ),
    "recurrence-outside": Mixed,
    "norse-lif": lambda: norse_net(nn.Linear(M, N), norse.LIFCell(p=LIF), nn.Linear(N, C)),
    "norse-lif-recurrent": lambda: norse_net(norse.LIFRecurrentCell(M, N, p=LIF), nn.Linear(N, C)),
    "norse-lsnn-recurrent": lambda: norse_net(
        norse.LSNNRecurrentCell(M, N, p=norse.LSNNParameters(v_th=torch.tensor(0.3))), nn.Linear(N, C)
    ),
    "norse-lsnn": lambda: norse_net(
        nn.Linear(M, N), norse.LSNNCell(p=norse.LSNNParameters(v_th=torch.tensor(0.3))), nn.Linear(N, C)
    ),
    "norse-box": lambda: norse_net(
        nn.Linear(M, N),
        norse.LIFBoxCell(p=norse.LIFBoxParameters(v_th=torch.tensor(0.05))),
        nn.Linear(N, C),
        readout=norse.LIBoxCell(),
    ),
    "norse-iaf": lambda: norse_net(
        nn.Linear(M, N), norse.IAFCell(p=norse.IAFParameters(v_th=torch.tensor(0.5))), nn.Linear(N, C)
    ),
    "norse-ex": lambda: norse_net(
        nn.Linear(M, N), norse.LIFExCell(p=norse.LIFExParameters(v_th=torch.tensor(0.3))), nn.Linear(N, C)
    ),
    "norse-adex-recurrent": lambda: norse_net(
        norse.LIFAdExRecurrentCell(M, N, p=norse.LIFAdExParameters(v_th=torch.tensor(0.3))), nn.Linear(N, C)
    ),
    "norse-refractory": lambda: norse_net(
        nn.Linear(M, N), norse.LIFRefracCell(p=norse.LIFRefracParameters(lif=LIF)), nn.Linear(N, C)
    ),
    "norse-refractory-recurrent": lambda: norse_net(
        norse.LIFRefracRecurrentCell(M, N, p=norse.LIFRefracParameters(lif=LIF)), nn.Linear(N, C)
    ),
    "norse-li-linear": lambda: norse_net(
        nn.Linear(M, N), norse.LIFCell(p=LIF), readout=norse.LILinearCell(N, C)
    ),
    "own-neuron": lambda: SnnNet(OwnNeuron(), silent_leaky()),
    "lsnn": lambda: eprop.LSNNNetwork(M, N, C, v_th=0.4, beta=0.3, tau_a=50.0, refractory=2.0),
    "lsnn-feed-forward": lambda: eprop.LSNNNetwork(M, N, C, recurrent=False, adaptive=1.0, beta=0.3),
    "lsnn-autapses": lambda: eprop.LSNNNetwork(M, N, C, autapses=True, adaptive=2, beta=0.3),
    "lsnn-masked": lambda: eprop.LSNNNetwork(
        M, N, C, beta=0.3, input_mask=torch.rand(N, M) < 0.5, recurrent_mask=torch.rand(N, N) < 0.5
    ),
    "lsnn-two-layers": lambda: eprop.LSNNNetwork(M, [N, 5], C, beta=0.3),
}
SEQUENCES = {
    "norse-lif-sequence": lambda: norse_net(
        nn.Linear(M, N), norse.LIF(p=LIF), nn.Linear(N, C), readout=norse.LI()
    ),
    "norse-lif-recurrent-sequence": lambda: norse_net(
        norse.LIFRecurrent(M, N, p=LIF), nn.Linear(N, C), readout=norse.LI()
    ),
    "norse-lsnn-recurrent-sequence": lambda: norse_net(
        norse.LSNNRecurrent(M, N, p=norse.LSNNParameters(v_th=torch.tensor(0.3))),
        nn.Linear(N, C),
        readout=norse.LI(),
    ),
}


def build(name, dtype=torch.float64):
    net = {**NETWORKS, **SEQUENCES}[name]().to(dtype)
    with torch.no_grad():  # so that every layer spikes
        for p in net.parameters():
            p.mul_(2.0 if p.dim() > 1 else 1.0)
    return net


def options(net):
    """Options of EProp and detached that the network needs."""
    own = [m for m in net.modules() if isinstance(m, OwnNeuron)]
    return {"neurons": own, "readout": net.readout} if own else {}


def inputs(T=23, B=4, dtype=torch.float64, p=0.4):
    return (torch.rand(T, B, M) < p).to(dtype)


def loss_of(y, target=0.3):
    return (y - target).square().mean() + y.sin().sum() / 7


def loop(net, x, step=None, state=None):
    """The sum of the steps' losses, or ``step`` called with each; and the last state."""
    total = 0.0
    for now in x:
        y, state = net(now, state)
        loss = loss_of(y)
        if step is None:
            total = total + loss
        else:
            step(loss)
    return total, state


def grads(net):
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def oracle(net, x, state=None, **extra):
    """Gradients of ordinary backward through the detached network."""
    net.zero_grad()
    with eprop.detached(net, **options(net), **extra):
        loop(net, x, state=state)[0].backward()
    found = grads(net)
    net.zero_grad()
    return found


def learned(net, x, **extra):
    net.zero_grad()
    with eprop.EProp(net, **options(net), **extra) as learner:
        loop(net, x, learner.step)
        learner.flush()
    found = grads(net)
    net.zero_grad()
    return found


def compare(found, expected, bound=1e-12):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert relative(found[name], grad) < bound, name
