"""Training: exact mode follows upstream step for step, and the windows of "auto" learn what upstream learns."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

snntorch = pytest.importorskip("snntorch")
norse = pytest.importorskip("norse.torch")
pytest.importorskip("sklearn")

from helpers import torch_threads  # noqa: E402
from snntorch import functional, surrogate  # noqa: E402

from snn_sparse_plugin import sparse_mode, unroll  # noqa: E402
from snn_sparse_plugin.data import load_images  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The layers are so small that a second thread only waits, and one keeps the sums in one order."""
    with torch_threads(1):
        yield


@cache
def digits():
    return load_images("digits")


def reset(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, snntorch.SpikingNeuron):
            module.reset_mem()


# --- exact mode: 32 steps of Adam, side by side ---

HIDDEN = {"init_hidden": True, "spike_grad": surrogate.fast_sigmoid(25)}


def leaky() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(64, 50), snntorch.Leaky(0.9, **HIDDEN)),
        *(nn.Linear(50, 50), snntorch.Leaky(0.9, **HIDDEN)),
        *(nn.Linear(50, 10), snntorch.Leaky(0.9, output=True, **HIDDEN)),
    )


def synaptic() -> nn.Module:
    def neuron(n: int, **options: Any) -> nn.Module:
        decays = {"alpha": torch.full((n,), 0.8), "beta": torch.full((n,), 0.9)}
        learned = {"learn_alpha": True, "learn_beta": True, "learn_threshold": True}
        return snntorch.Synaptic(**decays, **learned, threshold=torch.ones(n), **HIDDEN, **options)

    return nn.Sequential(nn.Linear(64, 50), neuron(50), nn.Linear(50, 10), neuron(10, output=True))


def recurrent() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(64, 40), snntorch.RLeaky(0.9, linear_features=40, **HIDDEN)),
        *(nn.Linear(40, 10), snntorch.RLeaky(0.9, linear_features=10, output=True, **HIDDEN)),
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 6, 3, padding=1), nn.MaxPool2d(2), snntorch.Leaky(0.9, **HIDDEN)),
        *(nn.Conv2d(6, 8, 3, padding=1), snntorch.Leaky(0.9, **HIDDEN)),
        *(nn.Flatten(), nn.Linear(128, 10), snntorch.Leaky(0.9, output=True, **HIDDEN)),
    )


def norse_lif() -> nn.Module:
    fast = {"tau_mem_inv": torch.tensor(100.0), "v_th": torch.tensor(0.3)}
    return norse.SequentialState(
        nn.Linear(64, 50), norse.LIF(norse.LIFParameters(**fast)), norse.Lift(nn.Linear(50, 10)), norse.LI()
    )


def norse_lsnn() -> nn.Module:
    adaptive = norse.LSNNRecurrent(64, 40, norse.LSNNParameters(v_th=torch.tensor(0.3)))
    return norse.SequentialState(adaptive, norse.Lift(nn.Linear(40, 10)), norse.LI())


NETWORKS = {
    "snntorch-leaky": leaky,
    "snntorch-synaptic-learned": synaptic,
    "snntorch-recurrent": recurrent,
    "snntorch-convolutional": convolutional,
    "norse-lif-sequence": norse_lif,
    "norse-lsnn-recurrent": norse_lsnn,
}
STEPS, BATCH, UPDATES = 12, 32, 32


def outputs(net: nn.Module, x: Tensor, sparse: bool, options: dict[str, Any]) -> Tensor:
    """The membrane of the last layer at every step."""
    if isinstance(net, norse.SequentialState):
        if not sparse:
            return net(x)[0]
        with sparse_mode(**options):
            return net(x)[0]
    reset(net)
    if not sparse:
        return torch.stack([net(h)[-1] for h in x])
    return unroll(net, x, **options).mem


def on_grid(net: nn.Module) -> None:
    """Parameters on multiples of 2^-10.

    With inputs 0 and 1 every order of summation then gives the same float32 current. Without that a spike flips now
    and then because its membrane is within rounding of the threshold, and from there on two trainings part: so do
    two runs of upstream itself with sums in another order. (float64 is no way out, snnTorch's spikes are float32.)
    """
    with torch.no_grad():
        for p in net.parameters():
            p.copy_((p * 1024).round() / 1024)


def train(
    build: Callable[[], nn.Module], sparse: bool, grid: bool, **options: Any
) -> tuple[list[float], list[Tensor]]:
    """-> (the loss of every update, the final parameters)."""
    torch.manual_seed(0)
    net, data, losses = build(), digits(), []
    if grid:
        on_grid(net)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for update in range(UPDATES):
        samples = slice(BATCH * update, BATCH * (update + 1))
        generator = torch.Generator().manual_seed(update)
        images, labels = data.train_x[samples], data.train_y[samples]
        x = (torch.rand(STEPS, *images.shape, generator=generator) < images).float()
        loss = F.cross_entropy(outputs(net, x, sparse, options).mean(0), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if grid:
            on_grid(net)
        losses.append(loss.item())
    return losses, [p.detach() for p in net.parameters()]


def apart(
    ours: tuple[list[float], list[Tensor]], theirs: tuple[list[float], list[Tensor]]
) -> tuple[float, float]:
    """Largest difference of the losses and of the parameters."""
    losses = max(abs(a - b) for a, b in zip(ours[0], theirs[0], strict=True))
    return losses, max(float((a - b).abs().max()) for a, b in zip(ours[1], theirs[1], strict=True))


@pytest.mark.parametrize("name", NETWORKS)
class TestExact:
    def test_fused_training_is_upstreams(self, name, counted):
        theirs = train(NETWORKS[name], sparse=False, grid=True)
        assert not counted
        ours = train(NETWORKS[name], sparse=True, grid=True, backprop_threshold=None)
        fused = sum(n for (_, kind), n in counted.items() if kind == "forward")
        assert fused >= UPDATES
        losses, parameters = apart(ours, theirs)
        assert losses < 1e-4
        assert parameters < 1e-3
        assert theirs[0][-1] < theirs[0][0]

    def test_stepped_training_is_upstreams_with_any_weights(self, name):
        theirs = train(NETWORKS[name], sparse=False, grid=False)
        ours = train(NETWORKS[name], sparse=True, grid=False, backprop_threshold=None, fuse_time=False)
        losses, parameters = apart(ours, theirs)
        assert losses < 1e-4
        assert parameters < 1e-3

    def test_these_tolerances_notice_another_gradient(self, name):
        theirs = train(NETWORKS[name], sparse=False, grid=True)
        ours = train(NETWORKS[name], sparse=True, grid=True, backprop_threshold=0.3, min_active=0)
        losses, parameters = apart(ours, theirs)
        assert losses > 1e-3
        assert parameters > 1e-2


# --- windows: what is learned from the default initialisation ---


@dataclass(frozen=True)
class Task:
    """A classifier of 8x8 digits by spike counts, each image shown as a constant current."""

    build: Callable[[Any], nn.Module]
    spike_grad: Any
    chance: float = 0.11


def dense_net(spike_grad: Any) -> nn.Module:
    options = {"beta": 0.9, "init_hidden": True, "spike_grad": spike_grad}
    return nn.Sequential(
        *(nn.Linear(64, 60), snntorch.Leaky(**options)),
        *(nn.Linear(60, 10), snntorch.Leaky(output=True, **options)),
    )


def convolutional_net(spike_grad: Any) -> nn.Module:
    """Built like snnTorch's convolutional tutorial: at first no neuron of the deeper layers is near threshold."""
    options = {"beta": 0.5, "init_hidden": True, "spike_grad": spike_grad}
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 8, 3), nn.MaxPool2d(2), snntorch.Leaky(**options)),
        *(nn.Conv2d(8, 16, 2), snntorch.Leaky(**options)),
        *(nn.Flatten(), nn.Linear(64, 10), snntorch.Leaky(output=True, **options)),
    )


TASKS = {
    "dense": Task(dense_net, surrogate.fast_sigmoid(25)),
    "convolutional": Task(convolutional_net, surrogate.fast_sigmoid(25)),
    "convolutional-atan": Task(convolutional_net, surrogate.atan()),
}
MODES: dict[str, dict[str, Any] | None] = {
    "upstream": None,
    "auto": {},
    "auto, stepped": {"fuse_time": False},
    "window, no guard": {"backprop_threshold": 0.2, "min_active": 0},
    "window": {"backprop_threshold": 0.2},
}


def spike_counts(net: nn.Module, images: Tensor, mode: str) -> Tensor:
    reset(net)
    x, options = images.expand(10, *images.shape), MODES[mode]
    if options is None:
        return torch.stack([net(h)[0] for h in x])
    return unroll(net, x, **options).spikes


def accuracy(task: Task, mode: str, seed: int, epochs: int) -> float:
    """Of the held-out digits after training."""
    torch.manual_seed(seed)
    net, data, order = task.build(task.spike_grad), digits(), torch.Generator().manual_seed(seed)
    optimizer, criterion = torch.optim.Adam(net.parameters(), 5e-3), functional.ce_rate_loss()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_y), generator=order).split(64):
            loss = criterion(spike_counts(net, data.train_x[batch], mode), data.train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        guesses = spike_counts(net, data.test_x, mode).sum(0).argmax(1)
    return (guesses == data.test_y).float().mean().item()


def accuracies(task: Task, mode: str, seeds: range, epochs: int) -> list[float]:
    return [accuracy(task, mode, seed, epochs) for seed in seeds]


@pytest.mark.parametrize("name", TASKS)
class TestLearning:
    """What a slice of a few seeds shows; the sweep below is the measurement."""

    def test_auto_learns_what_upstream_learns(self, name):
        # one seed is worth 0.02 either way, and another order of sums is as another seed
        seeds, epochs = range(6 if name == "dense" else 2), 5
        expected = statistics.mean(accuracies(TASKS[name], "upstream", seeds, epochs))
        assert expected > 0.7
        for mode in ("auto", "auto, stepped"):
            assert statistics.mean(accuracies(TASKS[name], mode, seeds, epochs)) > expected - 0.03, mode

    def test_a_window_needs_the_guard(self, name):
        """Two seeds: without it what starts far from threshold never gets a gradient."""
        bare = accuracies(TASKS[name], "window, no guard", range(2), 3)
        guarded = accuracies(TASKS[name], "window", range(2), 5)
        assert statistics.mean(guarded) > 0.6
        assert max(bare) < (
            0.5 if name == "dense" else TASKS[name].chance
        )  # all silent: the most frequent digit


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_final_accuracy_is_within_one_standard_deviation(name, capsys):
    found = {mode: accuracies(TASKS[name], mode, range(5), 15) for mode in MODES}
    with capsys.disabled():
        print(f"\n{name}, test accuracy, 5 seeds, 15 epochs")
        for mode, values in found.items():
            print(f"  {mode:18} {statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
    upstream = found["upstream"]
    least = statistics.mean(upstream) - statistics.stdev(upstream)
    assert statistics.mean(found["auto"]) >= least
    assert statistics.mean(found["auto, stepped"]) >= least
