"""How a layer's input meets its weight, forward and backward, in the way that :mod:`.choice` finds fastest."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.backend import LayerCall
from ..core.spikes import at_active
from . import choice, products, terms


class Driven(NamedTuple):
    """The input current (T, B, C * N), and what it was made from: events as words, with values where they are graded,
    or numbers (T, B, M) alone. ``added_rows``: so the events were multiplied."""

    current: Tensor
    words: Tensor | None = None
    values: Tensor | None = None
    added_rows: bool | None = None

    def takes_pairs(self, call: LayerCall, weight_too: bool) -> bool:
        """Whether nu is wanted as pairs of bf16 numbers for the input's gradient (``weight_too``: and the weight's)."""
        if call.weight is None or call.rec_weight is not None:  # a recurrence reads nu back
            return False
        if weight_too and self.words is None:  # the library would have to read them
            return False
        return choice.pairs_for_input_gradient(call.T * call.B, call.weight)

    def weight_gradient(self, nu: Tensor, features: int, pairs: bool) -> Tensor:
        if self.words is not None:
            return products.weight_gradient(nu, self.words, self.values, features, pairs)
        assert self.values is not None
        return nu.flatten(0, 1).t() @ self.values.flatten(0, 1)


def drive(call: LayerCall, rows: bool | None = None) -> Driven:
    """The input current of all steps. ``rows``: how the forward multiplied its input; None: this is the forward."""
    if call.weight is None:
        assert call.current is not None
        return Driven(call.current)
    weight, bias = call.weight.detach(), None if call.bias is None else call.bias.detach()
    if call.train is not None:
        words = call.train.words
        values = None if call.train.values is None else call.train._dense_data()
        if rows is None:
            rows = values is not None or choice.adds_rows_of_bits(call.name, words, weight)
        if not rows:
            return Driven(terms.current(words, weight, bias), words, None, False)
        return Driven(products.current(words, values, weight, bias), words, values, True)
    assert call.dense is not None
    x = call.dense.detach()
    if rows is None:
        rows = choice.adds_rows(call.name, x, weight)
    if not rows:  # in float32: any numbers may stand here, and a spike alone is sure to be exact in bf16
        with _own_precision(x):
            return Driven(F.linear(x, weight, bias), None, x, False)
    words = products.packed(x)
    return Driven(products.current(words, x, weight, bias), words, x, True)


def input_gradient(call: LayerCall, nu: Tensor, odd: Tensor | None) -> Tensor:
    """nu (T, B, C * N) times the weight; ``odd`` is given where nu is pairs of bf16 numbers."""
    assert call.weight is not None
    weight = call.weight.detach()
    grad = nu @ weight if odd is None else terms.input_gradient(nu, odd, weight)
    active = None if call.train is None else call.train.active
    return grad if active is None else at_active(grad, active)


def _own_precision(x: Tensor) -> AbstractContextManager[object]:
    """Products in the precision of their factors."""
    if torch._C._is_any_autocast_enabled():
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
