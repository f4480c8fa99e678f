"""What carries errors from the readout back to the hidden layers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from .options import check_option

FEEDBACKS = ("symmetric", "random", "adaptive")


class Feedback:
    """One matrix for each weight of the readout, by its name; none where the weight itself carries errors back.

    Args:
        kind: ``"symmetric"``, ``"random"``, ``"adaptive"``, or the matrix.
        decay: of adaptive feedback and of the readout's weights, per update.
        generator: draws random matrices.
    """

    def __init__(
        self,
        kind: Literal["symmetric", "random", "adaptive"] | Tensor,
        decay: float,
        generator: torch.Generator | None,
    ) -> None:
        if not isinstance(kind, Tensor):
            check_option("feedback", kind, FEEDBACKS)
        self.kind, self.decay, self.generator = kind, decay, generator
        self.symmetric = isinstance(kind, str) and kind == "symmetric"
        self.adaptive = isinstance(kind, str) and kind == "adaptive"
        self.matrices: dict[str, Tensor] = {}
        self.followed: dict[str, Tensor] = {}  # the weights as they were when the matrices followed them last

    def of(self, weight: Tensor, name: str) -> Tensor | None:
        """The matrix in place of a readout weight (C, N), None for the weight itself."""
        if self.symmetric:
            return None
        if name not in self.matrices:
            weight = weight.detach()
            self.matrices[name] = self._first(weight, name)
            if self.adaptive:
                self.followed[name] = weight.clone()
        return self.matrices[name]

    def _first(self, weight: Tensor, name: str) -> Tensor:
        if isinstance(self.kind, Tensor):
            if self.kind.shape != weight.shape:
                raise ConfigError(
                    f"EProp(feedback=tensor): shape {tuple(self.kind.shape)}, but readout weight {name} "
                    f"has {tuple(weight.shape)}."
                )
            return self.kind.detach().to(weight)
        drawn = torch.rand(weight.shape, generator=self.generator, dtype=weight.dtype)
        return ((2 * drawn - 1) / weight.shape[1] ** 0.5).to(weight.device)  # spread as nn.Linear's own start

    @torch.no_grad()
    def follow(self, names: dict[nn.Parameter, str]) -> None:
        """Adaptive feedback changes as the readout did since the last time, and both decay (Kolen & Pollack)."""
        for weight, name in names.items():
            if name in self.followed and not torch.equal(weight, self.followed[name]):
                self.matrices[name] += weight - self.followed[name]
                self.matrices[name] *= 1 - self.decay
                weight.mul_(1 - self.decay)
                self.followed[name] = weight.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        return {
            "matrices": {name: x.clone() for name, x in self.matrices.items()},
            "followed": {name: x.clone() for name, x in self.followed.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.matrices = {name: x.clone() for name, x in state["matrices"].items()}
        self.followed = {name: x.clone() for name, x in state["followed"].items()}
