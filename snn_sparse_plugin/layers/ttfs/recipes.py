"""How a network of images is trained: a recipe of coding and regularisation, AdamW with a cosine schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import ImageData
from .convert import to_ttfs
from .training import RelaxationSchedule, ttfs_loss


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. ``coding`` False is the ReLU network; ``relax`` the share of the epochs with SR."""

    name: str
    coding: bool = True
    relax: float = 0.0
    tr: float = 0.0
    tb: float = 0.0
    form: str = "paper"


@dataclass(frozen=True)
class TrainOptions:
    """Options of :func:`train`.

    ``flip`` mirrors images at random, ``shift`` moves them by up to so many pixels. ``weight_decay`` is decoupled, of
    the synapses alone: biases, normalisations and kernels do not decay.
    """

    epochs: int = 30
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    window: int = 32
    tau: float = 10.0
    flip: bool = False
    shift: int = 0
    threads: int = 0


def build(network: nn.Module, recipe: Recipe, options: TrainOptions) -> nn.Module:
    """The network for a recipe: as it is, or with TTFS layers and an encoder of the images in front."""
    if not recipe.coding:
        return network
    return to_ttfs(network, window=options.window, tau=options.tau)


def train(
    model: nn.Module,
    data: ImageData,
    recipe: Recipe,
    options: TrainOptions,
    *,
    seed: int = 0,
    epoch_done: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """AdamW with a cosine schedule; returns the model in eval mode.

    ``epoch_done`` is called with the number of epochs done and the model.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    decaying = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": decaying, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr)
    steps = options.epochs * -(-len(data.train_y) // options.batch)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    tr, tb = (recipe.tr, recipe.tb) if recipe.coding else (0.0, 0.0)
    relaxation = None
    if recipe.relax:
        relaxation = RelaxationSchedule(model, round(recipe.relax * options.epochs))
    for epoch in range(options.epochs):
        model.train()
        for batch in torch.randperm(len(data.train_y), generator=generator).split(options.batch):
            if len(batch) < 2:  # one sample has no batch statistics
                continue
            x, y = data.train_x[batch], data.train_y[batch].to(device)
            x = augmented(x, flip=options.flip, shift=options.shift, generator=generator).to(device)
            smoothing = options.label_smoothing
            loss = ttfs_loss(model(x), y, model, tr=tr, tb=tb, form=recipe.form, label_smoothing=smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            cosine.step()
        if relaxation is not None:
            relaxation.step()
        if epoch_done is not None:
            epoch_done(epoch + 1, model)
    return model.eval()


def augmented(
    x: Tensor, *, flip: bool = False, shift: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    """Square images (B, pixels) of one or three channels, half of them mirrored, each moved by up to ``shift`` pixels.

    What moves in from outside is 0. The generator is one of the CPU.

    Example:
        >>> augmented(torch.ones(2, 9), shift=1).shape
        torch.Size([2, 9])
    """
    if not (flip or shift):
        return x
    channels = 1 if math.isqrt(x.shape[1]) ** 2 == x.shape[1] else 3
    side = math.isqrt(x.shape[1] // channels)
    images = x.view(-1, channels, side, side)
    if flip:
        mirror = torch.rand(len(x), generator=generator) < 0.5
        images = torch.where(mirror.to(x.device).view(-1, 1, 1, 1), images.flip(-1), images)
    if shift:
        at = torch.arange(side, device=x.device)
        moves = torch.randint(2 * shift + 1, (2, len(x), 1), generator=generator).to(x.device)
        rows, columns = moves + at
        sample = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1)
        channel = torch.arange(channels, device=x.device).view(1, -1, 1, 1)
        padded = F.pad(images, (shift,) * 4)
        images = padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
    return images.reshape(x.shape)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 500) -> float:
    """Share of samples (B, …) whose largest output is their label."""
    device = next(model.parameters()).device
    parts = zip(x.split(batch), y.split(batch), strict=True)
    return sum(int((model(a.to(device)).argmax(-1).cpu() == b).sum()) for a, b in parts) / len(y)
