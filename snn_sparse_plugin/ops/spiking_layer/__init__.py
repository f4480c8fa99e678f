"""The fused op: a synapse matrix and a layer of spiking neurons, over all time steps at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.config import current_config
from ...core.dynamics import NeuronParams, NeuronSpec, NeuronState
from ...core.equations import Equations
from ...core.errors import InputError, UnsupportedError
from ...core.precision import HALF, without_autocast
from ...core.spikes import SpikeTrain, as_spike_train, is_sparse_input
from ...core.surrogates import Surrogate
from .inputs import Given, Synapses, given, layout_of, widened
from .library import spiking_layer_op
from .prepared import Asked, SpikingLayerOutput, output, prepare, rounded

__all__ = ["SpikingLayerOutput", "spiking_layer"]


def spiking_layer(
    x: Tensor | SpikeTrain | Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    spec: NeuronSpec | Equations | None = None,
    params: NeuronParams | Mapping[str, Tensor | float],
    surrogate: Surrogate | None = None,
    recurrent_weight: Tensor | None = None,
    recurrent_bias: Tensor | None = None,
    state: NeuronState | Mapping[str, Tensor | None] | None = None,
    steps: int | None = None,
    events: bool = False,
    return_mem: bool = False,
    dtype: torch.dtype | None = None,
    name: str = "spiking_layer",
    **overrides: Any,
) -> SpikingLayerOutput:
    """Synapses and neurons of one layer over T steps, with the sparse surrogate gradient [Perez-Nieves & Goodman 2021].

    Args:
        x: input, (T, B, M) with ``weight``, the neurons' input current (T, B, N...) without. Dense, SpikeTrain,
            torch COO (T, B, M), torch CSR (T, B, M) or torch_sparse. In float16 and bfloat16 the neurons compute in
            float32, and what leaves is rounded.
        weight: (N, M), as of ``nn.Linear``. ``bias``: (N,). For equations with C > 1 inputs every N in the shape of a
            weight, bias or current is C·N, the neurons of the first input first; a current may be (T, B, C, N...).
        spec: which neuron: a member of the canonical family, or :class:`~snn_sparse_plugin.core.equations.Equations`;
            default is snnTorch's Leaky.
        params: decays, thresholds: scalars or per neuron, tensors may require a gradient; with equations a dict by
            name.
        surrogate: default is snnTorch's ``atan(2)``.
        recurrent_weight: (N, N), ``recurrent_bias`` (N,): fed with the layer's spikes of the previous step.
        state: initial state, each entry (B, N...); zeros where missing. With equations a dict by name, in which
            ``"spikes"`` are the last ones of a recurrent layer.
        steps: T, for an x (1, B, ...) that is the same at every step: it is multiplied once, and its gradient is the
            sum over the steps. An x of T steps that is ``expand``-ed from one and needs no gradient is recognised.
        events: return spikes as a :class:`~snn_sparse_plugin.core.spikes.SpikeTrain`.
        return_mem: also return the membrane after every step, (T, B, N...).
        dtype: of spikes and membranes; default is that of ``x``. The final state is float32 where x is half.
        name: how error messages call this layer.
        **overrides: options of :class:`~snn_sparse_plugin.core.config.SparseConfig` for this call.

    Returns:
        SpikingLayerOutput: ``spikes`` (T, B, N...), ``mem`` of that shape or None, ``state`` with entries (B, N...),
        and ``active_fraction``.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or non-finite values where they are seen. On a GPU nobody
            looks at the numbers, unless with ``check=True``: a membrane there turns NaN as upstream's does.
        UnsupportedError: the backend asked for by name cannot do it.

    Example:
        >>> x = (torch.rand(20, 4, 30) < 0.05).float()
        >>> w = torch.randn(10, 30, requires_grad=True)
        >>> out = spiking_layer(x, w, params=NeuronParams(mem=0.9))
        >>> out.spikes.shape, out.state.v.shape
        (torch.Size([20, 4, 10]), torch.Size([4, 10]))
        >>> out.spikes.sum().backward(); w.grad.shape
        torch.Size([10, 30])
    """
    synapses = Synapses(weight, bias, recurrent_weight, recurrent_bias)
    spec, surrogate = spec or _LEAKY, surrogate or _ATAN
    if is_sparse_input(x):
        x = as_spike_train(x)
    elif not isinstance(x, Tensor):
        raise InputError(f"{name}: input must be a tensor or a SpikeTrain, got {type(x).__name__}.")
    with without_autocast():  # what is given says in which precision to compute
        if torch.compiler.is_compiling():
            layout = layout_of(x, synapses, spec, surrogate, steps, name)
            return _in_graph(given(layout, x, synapses, params, state), overrides, events, return_mem, dtype)
        config = current_config().updated(**overrides) if overrides else current_config()
        asked = Asked(spec, surrogate, config, steps, events, return_mem, dtype, name)
        return prepare(asked, x, synapses).run(x, synapses, params, state)


_LEAKY, _ATAN = NeuronSpec(), Surrogate("atan", (2.0,))


def _in_graph(
    call: Given,
    overrides: dict[str, Any],
    events: bool,
    return_mem: bool,
    dtype: torch.dtype | None,
) -> SpikingLayerOutput:
    """The op as ``torch.compile`` sees it: one node."""
    wanted = dtype or call.dtype
    call = widened(call) if call.dtype in HALF else call
    name, synapses, dense = call.name, call.synapses, call.dense
    if events or dense is None:
        raise UnsupportedError(f"{name}: inside torch.compile the op takes and returns dense tensors.")
    if isinstance(call.spec, Equations):
        raise UnsupportedError(f"{name}: a neuron given by equations cannot enter a compiled graph.")
    if call.surrogate.kind == "custom":
        raise UnsupportedError(f"{name}: a custom surrogate function cannot enter a compiled graph.")
    flat = dense if len(dense) == call.T else dense.expand(call.T, *dense.shape[1:])
    flat = flat if synapses.weight is not None else flat.reshape(call.T, call.B, call.N)
    inputs = (
        *(flat, synapses.weight, synapses.bias, synapses.recurrent, synapses.recurrent_bias),
        *(call.rec0, call.v0, call.i0, call.params),
    )
    node, membrane, v, i = spiking_layer_op(inputs, call.spec, call.surrogate, overrides)
    return rounded(output(call, node, membrane if return_mem else None, v, i, math.nan), wanted)
