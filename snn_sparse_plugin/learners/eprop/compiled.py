"""``EProp.run`` for :class:`LSNNNetwork` on CPU: chunks of steps through the kernels of ``backends/cpu/eprop.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...adapters import has_hooks
from ...backends.cpu.bits import LANES
from ...backends.cpu.eprop import forward_chunk, gradient_chunk, leaky
from ...backends.cpu.threads import parallel, split
from ...errors import InputError
from ...spikes import SpikeTrain
from .lsnn import LSNN, LSNNState
from .network import LeakyReadout, LSNNNetwork
from .sequence import Targets, Totals, Window
from .synapses import only_autapses

if TYPE_CHECKING:
    from .learner import EProp

Events = tuple[
    np.ndarray, np.ndarray, np.ndarray, int, int
]  # ptr, columns, values, rows per sample, first row


def why_not(learner: EProp) -> str:
    """Why a model does not run through the kernels, or ``""``."""
    model: Any = learner.model
    if type(model) is not LSNNNetwork:
        return "it is not an LSNNNetwork"
    layers: Any = model.layers
    if any(type(x) is not LSNN for x in layers):
        return "its layers are of another class"
    if type(model.readout) is not LeakyReadout or any(has_hooks(m) for m in model.modules()):
        return "a module has hooks"
    weights = list(model.parameters())
    if any(w.device.type != "cpu" for w in weights):
        return "it is not on the CPU"
    if len({w.dtype for w in weights}) > 1 or weights[0].dtype not in (torch.float32, torch.float64):
        return "it is neither float32 nor float64"
    if learner.engine == "step" or learner.trace_dtype is not None:
        return "engine='step' or a trace_dtype"
    if any(not only_autapses(m) for x in layers for _, m in x.masks()):
        return "a sparse connectivity mask, whose traces are kept per existing synapse"
    return ""


class Network:
    """The states and traces of a network, and its steps chunk by chunk."""

    def __init__(self, learner: EProp, spare: Network | None = None) -> None:
        self.learner = learner
        self.spare: list[list[_Traces]] = (
            [] if spare is None else [x.sources for x in spare.layers]
        )  # memory for traces
        model: Any = learner.model
        self.model = model
        self.dtype = next(self.model.parameters()).dtype
        self.numpy_dtype = np.dtype("float32" if self.dtype == torch.float32 else "float64")
        self.kappa: float = self.model.readout.kappa
        memory = learner._filter
        self.decay = self.kappa if memory is None else float(memory.A[0, 0]) if len(memory.b) else 0.0
        self.layers: list[_Layer] = []
        self.out: _Readout | None = None

    def block(self, block: Any, target: Targets, state: Any, totals: Totals, on_update: Any) -> Any:
        """One chunk: forward, losses, gradient; returns the state of the model after it."""
        learner = self.learner
        events, K, B = self._events(block)
        if not self.layers:
            self._begin(B, state)
        if len(self.layers[0].v) != B:
            raise InputError(
                f"EProp.run: a block of {B} samples, the sequence began with {len(self.layers[0].v)}. "
                "Use fresh=True for other samples."
            )
        learner.check_versions()
        assert self.out is not None
        spikes = []
        for layer in self.layers:
            spikes.append(layer.forward(events, K))
            events = layer.events()
        z = spikes[0] if len(spikes) == 1 else torch.cat(spikes, -1)
        errors = self.out.errors(z, target, totals)
        carry = learner.engine != "offline"
        weight = self.model.readout.linear.weight.detach()
        matrix = learner.carriers.of(weight, learner.name_of(self.model.readout.linear.weight))
        weight = weight if matrix is None else matrix
        back = (errors.flatten(0, 1) @ weight).view(K, B, -1) if errors is not None else torch.zeros_like(z)
        self.out.learn(z, errors)
        sizes = [x.module.hidden_size for x in self.layers]
        for layer, signal in zip(self.layers, back.split(sizes, -1), strict=True):
            layer.gradient(signal, carry)
        learner.steps_seen += K
        if learner.update != "sequence" and carry:
            learner.deliver()
            if on_update is not None:
                on_update()
        return self.state()

    def _events(self, block: Tensor | Window) -> tuple[Events, int, int]:
        if isinstance(block, Window):
            train, start, K = block.train, block.start, block.stop - block.start
        else:
            if block.dim() != 3:
                raise InputError(f"EProp.run: LSNNNetwork takes (T, B, M), got {tuple(block.shape)}.")
            train, start, K = SpikeTrain.from_dense(block.to(self.dtype)), 0, block.shape[0]
        M = self.model.layers[0].input_size
        if train.features != M:
            raise InputError(f"EProp.run: {train.features} input channels, the first layer expects {M}.")
        values = None if train.values is None else train.values.to(self.dtype)
        given = np.empty(0, self.numpy_dtype) if values is None else values.numpy()
        return (train.indptr.numpy(), train.indices.numpy(), given, train.T, start), K, train.B

    def _begin(self, B: int, state: Any) -> None:
        states = [None] * (len(self.model.layers) + 1) if state is None else list(state)
        for k, (watched, module, before) in enumerate(
            zip(self.learner.hidden, self.model.layers, states, strict=False)
        ):
            spare = self.spare[k] if self.spare else []
            self.layers.append(_Layer(self, watched, module, B, before, spare))
        self.spare = []
        self.out = _Readout(self, B, states[-1])

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
        for part, tensors in zip([*self.layers, self.out], saved, strict=True):
            for name, value in part.tensors().items():  # type: ignore[union-attr]
                value.copy_(tensors[name])


class _Layer:
    def __init__(
        self,
        network: Network,
        watched: Any,
        module: LSNN,
        B: int,
        state: LSNNState | None,
        spare: list[_Traces],
    ) -> None:
        self.network, self.watched, self.module, self.B = network, watched, module, B
        N, M = module.hidden_size, module.input_size
        self.P = -(-N // LANES) * LANES
        self.low = (N - module.adaptive) // LANES * LANES if module.adaptive else self.P
        self.betas = self._padded(module.betas.to(network.dtype))
        zeros = torch.zeros(B, self.P, dtype=network.dtype)
        self.v, self.a, self.left, self.z = (zeros.clone() for _ in range(4))
        if state is not None:
            for own, given in zip((self.z, self.v, self.a, self.left), state, strict=True):
                own[:, :N] = given.detach()
        regular = network.learner.rate_reg
        self.rate = zeros[:0] if regular is None else torch.full_like(zeros, regular.target)
        rows = [M, N if module.recurrent else 0]
        old: list[Any] = spare or [None, None]
        self.sources: list[_Traces] = [
            _Traces(B, m, self.P, self.low, network, e) for m, e in zip(rows, old, strict=True)
        ]
        self.K = 0
        self.versions: tuple[int, ...] = ()
        self.weights: list[np.ndarray] = []

    def _padded(self, x: Tensor) -> Tensor:
        out = x.new_zeros(*x.shape[:-1], self.P)
        out[..., : x.shape[-1]] = x.detach()
        return out

    def _transposed(self) -> list[np.ndarray]:
        both = (self.module.input_weights, self.module.recurrent_weights)
        now = tuple(0 if w is None else w._version for w in both)
        if now != self.versions or not self.weights:
            empty = torch.empty(0, self.P, dtype=self.network.dtype)
            self.weights = [(empty if w is None else self._padded(w.detach().T)).numpy() for w in both]
            self.versions = now
        return self.weights

    def _allocate(self, K: int) -> None:
        """Space for a chunk of K steps, used again by the next."""
        B, N, P, dtype = self.B, self.module.hidden_size, self.P, self.network.dtype
        self.K = K
        self.psi, self.filtered = torch.empty(B, K, P, dtype=dtype), torch.zeros(B, K, P, dtype=dtype)
        self.direct = torch.zeros(B if len(self.rate) else 0, K, P, dtype=dtype)
        self.own_ptr = np.empty(B * (K + 2), np.int64)
        self.own = np.empty((B, (K + 1) * N + 1), np.int32)
        self.spikes = torch.empty(K, B, N, dtype=dtype)

    def forward(self, events: Events, K: int) -> Tensor:
        """Run the steps -> spikes (K, B, N)."""
        m, B, network = self.module, self.B, self.network
        dtype, regular = network.numpy_dtype, network.learner.rate_reg
        scalars = [m.alpha, m.rho, m.v_th, m.gamma_pd, 0.0, 0.0, 0.0]
        if regular is not None:
            scalars[4:] = [regular.decay, regular.c, regular.target]
        if not bool(torch.isfinite(self.v).all()):
            raise InputError(f"EProp.run: the membrane of {self.watched.name} is NaN or infinite.")
        self.input = events
        if K != self.K:
            self._allocate(K)
        self.direct.zero_()
        spikes = self.spikes
        weights = self._transposed()
        numbers = np.array(scalars, dtype)
        states = [x.numpy() for x in (self.v, self.a, self.left, self.z, self.rate)]
        outs = [spikes.numpy(), self.psi.numpy(), self.direct.numpy()]
        ptr, indices, values, stride, offset = events

        def task(first: int, last: int) -> None:
            forward_chunk(
                *(
                    first,
                    last,
                    K,
                    ptr,
                    indices,
                    values,
                    stride,
                    offset,
                    *weights,
                    self.betas.numpy(),
                    numbers,
                ),
                *(m.refractory, m.hidden_size, *states, self.own_ptr, self.own, *outs),
            )

        parallel([lambda r=r: task(*r) for r in split(B)])  # type: ignore[misc]
        self.watched.count(spikes)
        return spikes

    def events(self) -> Events:
        """The layer's own spikes, as input of the next."""
        none = np.empty(0, self.network.numpy_dtype)
        return self.own_ptr, self.own.reshape(-1), none, self.K + 2, 1

    def gradient(self, signal: Tensor, carry: bool) -> None:
        """Add the gradient of the chunk; ``signal`` (K, B, N) came through the readout."""
        K, B, N, network = self.K, self.B, self.module.hidden_size, self.network
        self.filtered[..., :N] = signal.transpose(0, 1)
        scalars = np.array([self.module.alpha, self.module.rho, network.decay], network.numpy_dtype)
        ptr, indices, values, stride, offset = self.input
        shapes = [(x.rows, self.P) for x in self.sources]
        own = self.own.reshape(-1)
        arrays = [x.arrays() for x in self.sources]
        shared = [x.numpy() for x in (self.betas, self.psi, self.filtered, self.direct)]

        def task(first: int, last: int) -> list[Tensor]:
            outs = [torch.zeros(shape, dtype=network.dtype) for shape in shapes]
            gradient_chunk(
                *(first, last, K, scalars, self.low, carry, *shared),
                *(ptr, indices, values, stride, offset, *arrays[0], outs[0].numpy()),
                *(self.own_ptr, own, *arrays[1], outs[1].numpy()),
            )
            return outs

        parts = parallel([lambda r=r: task(*r) for r in split(B)])  # type: ignore[misc]
        parameters = [self.module.input_weights, self.module.recurrent_weights]
        masks = dict(self.module.masks())
        for weight, *grads in zip(parameters, *parts, strict=True):
            if weight is not None and weight.requires_grad:
                self.watched.add(weight, sum(grads).T[:N], masks.get(weight))  # type: ignore[union-attr]

    def state(self) -> LSNNState:
        N = self.module.hidden_size
        return LSNNState(*(x[:, :N].clone() for x in (self.z, self.v, self.a, self.left)))

    def tensors(self) -> dict[str, Tensor]:
        own = {name: getattr(self, name) for name in ("v", "a", "left", "z", "rate")}
        for k, source in enumerate(self.sources):
            own |= {f"{name}{k}": getattr(source, name) for name in ("zeta", "eps", "ebar", "alive")}
        return own


class _Traces:
    """Of one weight matrix: per input, of the adaptation and of the output per synapse, in rows of P neurons."""

    def __init__(
        self, B: int, rows: int, P: int, low: int, network: Network, spare: _Traces | None = None
    ) -> None:
        dtype, self.rows = network.dtype, rows
        carried = B if network.learner.engine != "offline" else 0
        self.zeta = torch.zeros(B, rows, dtype=dtype)
        self.alive = torch.zeros(B, rows, dtype=torch.bool)  # whether the input has spiked
        shapes = (carried, rows, P - low), (carried if network.decay else 0, rows, P)
        if spare is not None and (spare.eps.shape, spare.ebar.shape) == shapes and spare.eps.dtype == dtype:
            # a row is cleared when its input first spikes; new memory for every sequence would take longer
            self.eps: Tensor = spare.eps
            self.ebar: Tensor = spare.ebar
        else:
            # filled, so that all the memory that a sequence may need is taken at once
            self.eps, self.ebar = (torch.empty(shape, dtype=dtype).fill_(0) for shape in shapes)

    def arrays(self) -> list[np.ndarray]:
        return [x.numpy() for x in (self.zeta, self.eps, self.ebar, self.alive)]


class _Readout:
    def __init__(self, network: Network, B: int, state: Tensor | None) -> None:
        self.network, self.linear = network, network.model.readout.linear
        self.y = torch.zeros(B, self.linear.out_features, dtype=network.dtype)
        if state is not None:
            self.y.copy_(state.detach())
        self.zeta = torch.zeros(B, self.linear.in_features, dtype=network.dtype)
        self.bias_zeta = torch.zeros(B, 1, dtype=network.dtype)

    def errors(self, z: Tensor, target: Targets, totals: Totals) -> Tensor | None:
        """dE/dy of every step, (K, B, C); None where the loss of no step depends on it."""
        with torch.no_grad():
            y = self.linear(z)
        _leaky(y, self.y, self.network.kappa)
        self.y = y[-1].clone()
        with torch.enable_grad():
            y.requires_grad_()
            loss = totals.add_all(y, target)
            if not loss.requires_grad:
                return None
            loss.backward()
        return y.grad

    def learn(self, z: Tensor, errors: Tensor | None) -> None:
        kappa, K = self.network.kappa, len(z)
        watched = self.network.learner.readout
        ones = z.new_ones(K, z.shape[1], 1)
        parameters = [(self.linear.weight, z, "zeta"), (self.linear.bias, ones, "bias_zeta")]
        if errors is not None:
            nu = errors.clone()
            _leaky(nu, torch.zeros_like(self.y), kappa, reverse=True)
        weights = kappa ** torch.arange(K - 1, -1, -1, dtype=z.dtype)
        for weight, x, name in parameters:
            if weight is None:
                continue
            trace = getattr(self, name)
            if errors is not None and weight.requires_grad:
                grad = nu.flatten(0, 1).T @ x.flatten(0, 1) + (kappa * nu[0]).T @ trace
                watched.add(weight, grad, None)
            setattr(self, name, kappa**K * trace + torch.tensordot(weights, x, 1))

    def tensors(self) -> dict[str, Tensor]:
        return {"y": self.y, "zeta": self.zeta, "bias_zeta": self.bias_zeta}


def _leaky(x: Tensor, before: Tensor, kappa: float, reverse: bool = False) -> None:
    flat = x.numpy().reshape(len(x), -1)
    leaky(flat, before.contiguous().numpy().reshape(-1), flat.dtype.type(kappa), reverse)
