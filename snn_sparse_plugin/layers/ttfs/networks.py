"""The networks of the published comparison and of the ablation, with ReLUs; :func:`to_ttfs` converts them."""

from __future__ import annotations

from torch import nn

from ...core.errors import ConfigError

PLANS = {  # channels of the convolutions; 0 is a pooling
    9: (64, 64, 0, 128, 128, 0, 256, 256, 0),
    11: (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0),
    16: (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0),
}


def digits_mlp() -> nn.Module:
    """64-128-64-10 for 8×8 images, batch normalised."""
    layers: list[nn.Module] = []
    for a, b in ((64, 128), (128, 64)):
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def small_conv(width: int = 32) -> nn.Module:
    """Two 3×3 convolutions and a hidden layer of 128 for 28×28 images, batch normalised."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28))]
    for a, b in ((1, width), (width, 2 * width)):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(2 * width * 49, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def vgg(depth: int = 16, classes: int = 10, width: float = 1.0) -> nn.Module:
    """VGG-9, -11 or -16 for 32×32 colour images (B, 3072), batch normalised, two hidden layers of 512 behind.

    Args:
        depth: 9, 11 or 16 layers with weights.
        classes: outputs.
        width: factor on all channels.

    Raises:
        ConfigError: another depth.

    Example:
        >>> sum(isinstance(m, nn.Conv2d | nn.Linear) for m in vgg(11).modules())
        11
    """
    if depth not in PLANS:
        raise ConfigError(f"vgg has depths {', '.join(map(str, PLANS))}; got {depth}.")
    layers: list[nn.Module] = [nn.Unflatten(1, (3, 32, 32))]
    channels = 3
    for wanted in PLANS[depth]:
        if wanted:
            out = max(4, round(wanted * width))
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        else:
            layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    features, hidden = channels * (32 >> PLANS[depth].count(0)) ** 2, max(8, round(512 * width))
    for _ in range(2):
        layers += [
            nn.Linear(features, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(0.2),
        ]
        features = hidden
    return nn.Sequential(*layers, nn.Linear(hidden, classes))
