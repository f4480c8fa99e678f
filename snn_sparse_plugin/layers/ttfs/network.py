"""TTFSNetwork: the spiking network of a trained TTFS model."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ...core.errors import InputError
from ...files import reading, write_atomic
from ...files.plain import load_plain
from .checks import check_network, check_values
from .grid import on_grid
from .report import TTFSReport, report
from .simulator import Simulator
from .stages import Pool, Stage
from .verify import VerifyReport, verify

_FORMAT = "snn-sparse-plugin TTFSNetwork 1"


class TTFSNetwork(Simulator):
    """Layers that integrate in one window and fire in the next, one spike per neuron; made by :func:`to_snn`.

    ``net(x)`` is the readout of intensities (B, …) in [0, 1]; :meth:`run` also gives spike times and counts,
    :meth:`verify` compares with the trained network, :meth:`report` counts spikes, operations and energy.

    Args:
        encoder: thresholds and values (2, window) of the input.
        stages: the layers.
        input_shape: of one sample.
        source: gives the trained network's pre-activations, for :meth:`verify`; None: the stages' own weights.
    """

    def __repr__(self) -> str:
        layers = ", ".join(f"{s.name}: {'×'.join(map(str, s.out_shape))}" for s in self.stages)
        exact = ", on an exact grid" if self.exact else ""
        return (
            f"TTFSNetwork({'×'.join(map(str, self.input_shape))} → {layers}; {self.latency()} steps{exact})"
        )

    def to(self, *args: Any, **kwargs: Any) -> TTFSNetwork:
        """A copy on another device or in another floating dtype, without the trained network."""
        return TTFSNetwork(
            self.encoder.to(*args, **kwargs),
            [s.to(*args, **kwargs) for s in self.stages],
            self.input_shape,
            exact=self.exact,
        )

    # --- what it is measured by ---

    def on_grid(self) -> TTFSNetwork:
        """A copy with weights and kernels on a binary grid, where sums do not depend on their order.

        Raises:
            UnsupportedError: no grid fits the significand of the dtype; the message names the layer.
        """
        return TTFSNetwork(*on_grid(self.encoder, self.stages), self.input_shape, exact=True)

    def verify(
        self,
        x: Tensor,
        *,
        exact_grid: bool = False,
        simulator: str | None = None,
        batch_size: int = 256,
        progress: Callable[[int, int], None] | None = None,
    ) -> VerifyReport:
        """Compare every spike time with the trained network's on intensities (B, …).

        Args:
            exact_grid: compare on the binary grid, where all have to be equal.
            simulator: as in :meth:`run`.
            progress: called with samples done and to do.

        Example: see :func:`to_snn`.
        """
        net = self.on_grid() if exact_grid and not self.exact else self
        return verify(net, x, simulator, batch_size, progress)

    def report(self, x: Tensor, **options: Any) -> TTFSReport:
        """Spikes, rate, sparsity, latency, operations and energy on intensities (B, …); see :class:`TTFSReport`."""
        return report(self, x, **options)

    # --- files ---

    def save(self, path: str | PathLike[str]) -> None:
        """Write the network to a file that :meth:`load` reads; the trained network stays outside.

        Raises:
            FileError: the file cannot be written; an older one is as it was.
        """
        stages = []
        for stage in self.stages:
            entry = {k: v for k, v in vars(stage).items() if k not in ("before", "after")}
            stages.append(entry | {k: [vars(p) for p in getattr(stage, k)] for k in ("before", "after")})
        data = {
            "format": _FORMAT,
            "encoder": self.encoder,
            "input_shape": self.input_shape,
            "exact": self.exact,
            "stages": stages,
        }
        write_atomic(path, lambda file: torch.save(data, file))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> TTFSNetwork:
        """Read what :meth:`save` wrote. Nothing in the file is executed, and all sizes and values are checked.

        Raises:
            InputError: not such a file, or a network whose parts do not fit together.
        """
        what = "a network written by TTFSNetwork.save"
        with reading(path, what):
            data = load_plain(path, what)
            if data["format"] != _FORMAT:
                raise ValueError(data["format"])
            stages = []
            for entry in data["stages"]:
                pools = {k: [Pool(**p) for p in entry[k]] for k in ("before", "after")}
                stages.append(Stage(**(entry | pools)))
            encoder, shape, exact = data["encoder"], data["input_shape"], data["exact"]
        try:
            check_network(encoder, stages, shape)
            check_values(encoder, stages)
        except InputError as error:
            raise InputError(f"{path} holds a network that does not fit together: {error}") from error
        return cls(encoder, stages, shape, exact=exact is True)
