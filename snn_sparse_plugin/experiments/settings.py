"""The published settings of each data set, and what a run may change of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ..core.errors import ConfigError

SLOPE = 100.0  # sigma'(x) = 1 / (100 |x| + 1)^2


@dataclass(frozen=True)
class Settings:
    """One network and its training [Perez-Nieves & Goodman 2021].

    Args:
        data: name of the data set.
        T, dt: number of steps and their length in seconds.
        tau, tau_readout: time constants of hidden neurons and readout, in seconds.
        init: weights from N(0, (20 (1 - beta) / sqrt(M))^2) (``"normal"``) or U(+-1 / sqrt(M)) (``"uniform"``).
        readout: cross entropy of the ``"max"`` or the ``"sum"`` over time of the readout's membrane.
        target: mean spikes per hidden neuron and sample above which activity is penalised.
        hidden, layers: neurons of a hidden layer, and number of hidden layers.
        threshold: B_th, ``backprop_threshold`` of sparse training.
        min_active: the guard of this package; 0, none, as published.
        batch, learning_rate, epochs: of Adam(0.9, 0.999).
    """

    data: str
    T: int = 100
    dt: float = 1e-3
    tau: float = 10e-3
    tau_readout: float = 10e-3
    init: Literal["normal", "uniform"] = "uniform"
    readout: Literal["max", "sum"] = "max"
    target: float = 1.0
    hidden: int = 200
    layers: int = 2
    threshold: float = 0.2
    min_active: float = 0.0
    batch: int = 256
    learning_rate: float = 2e-4
    epochs: int = 10

    def __post_init__(self) -> None:
        if min(self.T, self.hidden, self.layers, self.batch, self.epochs) < 1:
            raise ConfigError("steps, hidden, layers, batch and epochs must be at least 1.")
        if not self.threshold > 0 or not self.learning_rate > 0 or not 0 <= self.min_active <= 1:
            raise ConfigError(
                f"threshold and learning rate must be > 0 and min_active between 0 and 1, got "
                f"{self.threshold}, {self.learning_rate} and {self.min_active}."
            )

    @property
    def beta(self) -> float:
        """Decay of a hidden membrane in one step."""
        return math.exp(-self.dt / self.tau)

    @property
    def beta_readout(self) -> float:
        """Decay of the readout in one step."""
        return math.exp(-self.dt / self.tau_readout)

    def changed(self, **changes: Any) -> Settings:
        """A copy in which what is not None is changed."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ConvSettings(Settings):
    """A convolutional network: ``layers`` times a convolution, a max-pool and LIF neurons, then the readout.

    Args:
        hidden: channels of every convolution.
        kernel: odd side of its kernel; zeros around the map keep its size. ``pool``: side of the pool.
    """

    hidden: int = 16
    layers: int = 1
    kernel: int = 5
    pool: int = 2
    init: Literal["normal", "uniform"] = "normal"
    batch: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0 or self.pool < 1:
            raise ConfigError(
                f"a kernel has an odd side and a pool one of at least 1, got {self.kernel} and {self.pool}."
            )


SETTINGS = {
    "fashion-mnist": Settings("fashion-mnist", init="normal"),
    "n-mnist": Settings("n-mnist", T=300),
    "shd": Settings(
        "shd", T=500, dt=2e-3, tau_readout=20e-3, readout="sum", target=10.0, learning_rate=1e-3, epochs=100
    ),
    # not in the publication: a small set that needs no files
    "digits": Settings("digits", init="normal", batch=64, learning_rate=1e-3, epochs=40),
}


CONV_SETTINGS = {
    "fashion-mnist": ConvSettings("fashion-mnist", learning_rate=1e-3),
    # not in the publication; polarities are channels
    "n-mnist": ConvSettings(
        "n-mnist",
        dt=3e-3,
        tau=20e-3,
        tau_readout=20e-3,
        init="uniform",
        readout="sum",
        target=3.0,
        hidden=12,
        layers=2,
        batch=16,
        learning_rate=1e-3,
    ),
    "digits": ConvSettings("digits", hidden=8, kernel=3, learning_rate=2e-3, epochs=40),
}


def settings_of(data: str) -> Settings:
    """The published settings of a data set (of ``"digits"``, those of Fashion-MNIST in small batches).

    Example:
        >>> settings_of("shd").T
        500
    """
    if data not in SETTINGS:
        raise ConfigError(f"no experiment on {data!r}; there are {', '.join(SETTINGS)}.")
    return SETTINGS[data]


def conv_settings_of(data: str) -> ConvSettings:
    """Settings of the convolutional network on a data set.

    Example:
        >>> conv_settings_of("n-mnist").layers
        2
    """
    if data not in CONV_SETTINGS:
        raise ConfigError(f"no convolutional experiment on {data!r}; there are {', '.join(CONV_SETTINGS)}.")
    return CONV_SETTINGS[data]
