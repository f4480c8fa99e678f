"""One small network, and halves of one batch for two processes."""

from __future__ import annotations

import snntorch as snn
import torch
from snntorch import surrogate, utils
from torch import Tensor, nn

from snn_sparse_plugin import unroll
from snn_sparse_plugin.fusion.sequence import Unrolled

T, B, M, N = 12, 4, 12, 5


def network() -> nn.Sequential:
    torch.manual_seed(0)
    options = {"beta": 0.9, "spike_grad": surrogate.fast_sigmoid(5), "init_hidden": True}
    return nn.Sequential(
        nn.Linear(M, 10), snn.Leaky(**options), nn.Linear(10, N), snn.Leaky(**options, output=True)
    )


def batch() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(T, B, M, generator=generator) < 0.3).float()


class Unrolling(nn.Module):
    """``unroll`` inside the forward that is wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Unrolled:
        utils.reset(self.net)
        return unroll(self.net, x)


class Looping(Unrolling):
    """A tutorial's loop."""

    def forward(self, x: Tensor) -> Tensor:
        utils.reset(self.net)
        return torch.stack([self.net(step)[0] for step in x])


def loss_of(out: Unrolled | Tensor) -> Tensor:
    spikes = out if isinstance(out, Tensor) else out.spikes
    weights = torch.linspace(-1, 1, spikes.shape[2])
    return (spikes * weights).sum(2).mean()


def gradients_of_the_whole_batch() -> list[Tensor]:
    model = Unrolling()
    loss_of(model(batch())).backward()
    return [p.grad for p in model.parameters()]


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative distance of two lists of gradients."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
