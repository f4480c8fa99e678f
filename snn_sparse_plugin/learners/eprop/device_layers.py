"""The layers of :class:`LSNNNetwork` over a chunk of steps on a device: no number is read on the host.

All steps run in one kernel, the scan back is one, and the gradient of each weight matrix with its traces is one
(:class:`~.rule.ChunkRule`); products of the inputs and of the readout are the library's or sums over events.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core import bits
from .blocks import Window
from .compiled_readout import Common
from .described import parameters
from .layer import WatchedLayer
from .lsnn import LSNN, LSNNState
from .options import one_pole
from .rule import ChunkRule
from .scan import Filter, Steps
from .stepper import Stepper

WIDEST = 16384
"""Neurons of a recurrent layer: one program holds them all in registers."""


_ADAPTATION = 1 + LSNNState._fields.index("a")  # its row and column of the derivatives


class Given(NamedTuple):
    """What a layer received in some steps: (K, B, M), and which of it is not 0 as bits, if they are known."""

    x: Tensor
    words: Tensor | None
    binary: bool  # whether all others are 1


def device_chunk_of(block: Tensor | Window, dtype: torch.dtype) -> Given:
    """The input of some steps as the layers take it."""
    if isinstance(block, Tensor):
        return Given(block.detach().to(dtype).contiguous(), None, False)
    train, steps = block.train, slice(block.start, block.stop)
    words = train.words[steps]
    x = bits.unpack(words, train.features).to(dtype)
    if train.values is None:
        return Given(x, words, True)
    return Given(train._dense_data()[steps].detach().to(dtype).contiguous(), words, False)


class DeviceLayer:
    """A layer's states, and what a chunk of it is made of until its gradient has been added.

    Args:
        spare: the layer in the sequence before, whose kernels and memory are used again where they fit.
    """

    stepper: Stepper
    local: Tensor  # derivatives of the chunk, (entries, K, B, N)
    spikes: Tensor  # (1 + K, B, N), those before it first
    words: Tensor  # the same as bits

    def __init__(
        self,
        common: Common,
        watched: WatchedLayer,
        module: LSNN,
        B: int,
        state: LSNNState | None,
        spare: DeviceLayer | None,
    ) -> None:
        self.common, self.watched, self.module, self.B = common, watched, module, B
        N = module.hidden_size
        zeros = torch.zeros(B, N, dtype=common.dtype, device=common.device)
        given = LSNNState(*(zeros if state is None else x.detach().to(zeros) for x in (state or 4 * [zeros])))
        self.K, neuron = 0, module.neuron()
        numbers = {k: v for k, v in parameters(neuron).items() if not isinstance(v, Tensor)}
        # to look into tensors would be to wait
        self.made_of = B, common, numbers, neuron.surrogate, module.betas, module.betas._version
        if spare is not None and _same(self.made_of, spare.made_of):
            self.stepper, self.K = spare.stepper, spare.K
            self.local, self.spikes, self.words = spare.local, spare.spikes, spare.words
        else:
            self.stepper = Stepper(neuron, LSNNState._fields, False, zeros, steps=1)
        # the kernels' order of states is that of the equations
        self.states = torch.stack([given[k] for k in self.stepper.leaf])
        self.z = given.z.clone()
        A, b, out = one_pole(common.decay)
        self.readout = Filter(A.to(zeros), b.to(zeros), out)
        regular = common.rate_reg
        self.rate = zeros[:0] if regular is None else torch.full_like(zeros, regular.target)

    def forward(self, given: Given, K: int) -> Tensor:
        """Run the steps -> spikes (K, B, N)."""
        kernels: Any = import_module("snn_sparse_plugin.triton_kernels.products")
        module, B, N = self.module, self.B, self.module.hidden_size
        self.given = given
        if K != self.K:  # space that the next chunk uses again
            self.K = K
            self.local = self.states.new_empty(self.stepper.entries, K, B, N)
            self.spikes = self.states.new_empty(1 + K, B, N)
            self.words = torch.empty(1 + K, B, -(-N // 32), dtype=torch.int32, device=self.z.device)
        self.spikes[0] = self.z
        self.words[:1] = kernels.packed(self.spikes[:1])
        recurrent = module.recurrent_weights
        self.stepper.run_chunk(
            self._current(kernels),
            None if recurrent is None else recurrent.detach(),
            self.words,
            self.spikes,
            self.states,
            self.local,
        )
        self.z.copy_(self.spikes[K])
        self.watched.count(self.spikes[1:])
        return self.spikes[1:]

    def _current(self, kernels: Any) -> Tensor:
        """The input current of all steps: rows of the weight for events, or the library's product."""
        choice: Any = import_module("snn_sparse_plugin.triton_kernels.choice")
        (x, words, binary), weight = self.given, self.module.input_weights.detach()
        if words is None and not choice.adds_rows(self.watched.name, x, weight):
            return F.linear(x, weight)
        words = kernels.packed(x) if words is None else words
        return kernels.current(words, None if binary else x, weight, None)  # type: ignore[no-any-return]

    def events(self) -> Given:
        """The layer's own spikes, as input of the next."""
        return Given(self.spikes[1:], self.words[1:], True)

    def gradient(self, signal: Tensor) -> None:
        """Add the gradient of the chunk; ``signal`` (K, B, N) came through the readout."""
        watched, common = self.watched, self.common
        if watched.rule is None:
            watched.rule = ChunkRule(self.readout)
        watched.rule.readout = self.readout  # one that was saved does not know it
        found = self.stepper.jacobian(self.local)
        if not self.module.adaptive:  # then nothing depends on the adaptation
            found = {pair: value for pair, value in found.items() if _ADAPTATION not in pair}
        watched.states = sorted({place - 1 for pair in found for place in pair if place > 0})
        place = {0: 0} | {state + 1: k + 1 for k, state in enumerate(watched.states)}
        local = {(place[row], place[column]): value for (row, column), value in found.items()}
        steps = Steps(local, len(watched.states), signal, self._direct(signal))
        masks = dict(self.module.masks())
        sources = [
            (self.module.input_weights, self.given.x),
            (self.module.recurrent_weights, self.spikes[: self.K]),
        ]
        inputs = []
        for weight, x in sources:
            if weight is not None and weight.requires_grad:
                name = watched.learner.name_of(weight)
                inputs.append((watched.synapses_of(name, weight.shape, masks.get(weight)), x))
        watched.rule.process(steps, watched.states, inputs, common.carry)

    def _direct(self, like: Tensor) -> Tensor:
        """What acts on the spikes themselves: the regularisation of rates."""
        regular = self.common.rate_reg
        if regular is None:
            return like.new_zeros(like.shape[-1]).expand_as(like)
        kernels: Any = import_module("snn_sparse_plugin.triton_kernels.eprop")
        rate = (1 - regular.decay) * self.spikes[1:]
        kernels.leak(rate, self.rate, regular.decay)
        self.rate = rate[-1].clone()
        return rate.sub_(regular.target).mul_(regular.c)

    def state(self) -> LSNNState:
        """The states after the last step."""
        values = dict(zip(self.stepper.leaf, self.states.clone(), strict=True))
        return LSNNState(*(values[k] for k in range(len(LSNNState._fields))))

    def tensors(self) -> dict[str, Tensor]:
        """What has to be kept to go on later, beside the traces: those are the watched layer's."""
        return {"states": self.states, "z": self.z, "rate": self.rate}


def _same(found: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    return all(x is y if isinstance(x, Tensor) else x == y for x, y in zip(found, before, strict=True))
