"""``EProp.run`` for :class:`LSNNNetwork`: chunks of steps through kernels, of the CPU or of Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import has_hooks
from ...core.errors import InputError
from ...core.host import known
from .blocks import Targets, Totals, Window
from .compiled_layers import CompiledLayer, chunk_of
from .compiled_readout import Common, CompiledReadout
from .device_layers import WIDEST, DeviceLayer, device_chunk_of
from .feedback import Feedback
from .layer import WatchedLayer
from .lsnn import LSNN
from .network import LeakyReadout, LSNNNetwork
from .options import FiringRate
from .scan import Filter, on_cpu, on_triton
from .synapses import only_autapses


def why_not(model: Any, engine: str, trace_dtype: torch.dtype | None) -> str:
    """Why a model does not run through the kernels, or ``""``."""
    if type(model) is not LSNNNetwork:
        return "it is not an LSNNNetwork"
    layers: Any = model.layers
    if any(type(x) is not LSNN for x in layers):
        return "its layers are of another class"
    if type(model.readout) is not LeakyReadout or any(has_hooks(m) for m in model.modules()):
        return "a module has hooks"
    weights = list(model.parameters())
    if len({(w.device, w.dtype) for w in weights}) > 1:
        return "its weights are of several devices or dtypes"
    if not (on_cpu(weights[0]) or on_triton(weights[0])):
        return "it is neither float32 nor float64, or on a device without Triton"
    if not on_cpu(weights[0]) and any(x.recurrent and x.hidden_size > WIDEST for x in layers):
        return f"a recurrent layer has more than {WIDEST} neurons"
    if engine == "step" or trace_dtype is not None:
        return "engine='step' or a trace_dtype"
    if any(not known(m, only_autapses) for x in layers for _, m in x.masks()):
        return "a sparse connectivity mask, whose traces are kept per existing synapse"
    return ""


class Network:
    """The states and traces of a network, and its steps chunk by chunk.

    Args:
        hidden: the layers as the learner watches them; they gather the gradient.
        memory: of the readout, where it was inferred or given.
        feedback: carries errors from the readout to the spikes.
        names: of the model's parameters.
        carry: whether a chunk hands traces on to the next.
        spare: of the sequence before, whose memory is used again.
    """

    def __init__(
        self,
        model: Any,
        hidden: Sequence[WatchedLayer],
        readout: WatchedLayer,
        *,
        memory: Filter | None,
        feedback: Feedback,
        names: dict[nn.Parameter, str],
        rate_reg: FiringRate | None,
        carry: bool,
        spare: Network | None = None,
    ) -> None:
        self.model, self.hidden, self.readout = model, hidden, readout
        self.feedback, self.names = feedback, names
        self.spare: list[Any] = [None] * len(hidden) if spare is None or not spare.layers else spare.layers
        weight = next(model.parameters())
        self.on_cpu, self.dtype = on_cpu(weight), weight.dtype
        kappa: float = self.model.readout.kappa
        decay = kappa if memory is None else float(memory.A[0, 0]) if len(memory.b) else 0.0
        self.common = Common(weight.dtype, weight.device, kappa, decay, rate_reg, carry)
        self.layers: list[Any] = []
        self.out: CompiledReadout | None = None

    def take(self, block: Any, state: Any) -> tuple[Any, int]:
        """The input of one chunk and its number of steps; ``state`` is the model's where a sequence begins."""
        given, K, B = self._given(block)
        if not self.layers:
            self._begin(B, state)
        if self.layers[0].B != B:
            raise InputError(
                f"EProp.run: a block of {B} samples, the sequence began with {self.layers[0].B}. "
                "Use fresh=True for other samples."
            )
        return given, K

    def learn(self, events: Any, K: int, target: Targets, totals: Totals) -> None:
        """One chunk: forward, losses, gradient."""
        assert self.out is not None
        spikes = []
        for layer in self.layers:
            spikes.append(layer.forward(events, K))
            events = layer.events()
        z = spikes[0] if len(spikes) == 1 else torch.cat(spikes, -1)
        errors = self.out.errors(z, target, totals)
        own = self.model.readout.linear.weight
        matrix = self.feedback.of(own.detach(), self.names.get(own, ""))
        weight = own.detach() if matrix is None else matrix
        back = (
            (errors.flatten(0, 1) @ weight).view(K, z.shape[1], -1)
            if errors is not None
            else torch.zeros_like(z)
        )
        self.out.learn(z, errors)
        sizes = [x.module.hidden_size for x in self.layers]
        for layer, signal in zip(self.layers, back.split(sizes, -1), strict=True):
            layer.gradient(signal)

    def _given(self, block: Tensor | Window) -> tuple[Any, int, int]:
        if isinstance(block, Window):
            K, B, features = block.stop - block.start, block.train.B, block.train.features
        elif block.dim() != 3:
            raise InputError(f"EProp.run: LSNNNetwork takes (T, B, M), got {tuple(block.shape)}.")
        else:
            K, B, features = block.shape
        M = self.model.layers[0].input_size
        if features != M:
            raise InputError(f"EProp.run: {features} input channels, the first layer expects {M}.")
        return (chunk_of if self.on_cpu else device_chunk_of)(block, self.dtype), K, B

    def _begin(self, B: int, state: Any) -> None:
        states = [None] * (len(self.model.layers) + 1) if state is None else list(state)
        for k, (watched, module, before) in enumerate(
            zip(self.hidden, self.model.layers, states, strict=False)
        ):
            if self.on_cpu:
                sources = [] if self.spare[k] is None else self.spare[k].sources
                self.layers.append(CompiledLayer(self.common, watched, module, B, before, sources))
            else:
                self.layers.append(DeviceLayer(self.common, watched, module, B, before, self.spare[k]))
        self.spare = []
        self.out = CompiledReadout(self.common, self.readout, self.model.readout.linear, B, states[-1])

    def state(self) -> tuple[Any, ...]:
        assert self.out is not None
        return (*(x.state() for x in self.layers), self.out.y.clone())

    def tensors(self) -> list[dict[str, Tensor]]:
        """Everything that has to be kept to go on later."""
        parts: list[Any] = [*self.layers, *([] if self.out is None else [self.out])]
        return [x.tensors() for x in parts]

    def restore(self, saved: list[dict[str, Tensor]]) -> None:
        if not saved:
            return
        self._begin(len(saved[-1]["y"]), None)
        pairs = [
            (value, tensors.get(name))
            for part, tensors in zip([*self.layers, self.out], saved, strict=True)
            for name, value in part.tensors().items()  # type: ignore[union-attr]
        ]
        if any(found is None or found.shape != value.shape for value, found in pairs):
            raise ValueError("its traces are of other shapes")
        for value, found in pairs:
            value.copy_(found)  # type: ignore[arg-type]
