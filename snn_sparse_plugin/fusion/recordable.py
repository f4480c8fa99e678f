"""Which functions of torch may be recorded, and why: a table, and how a call's arguments are written down.

A recorded call runs once over all steps instead of once a step. That is allowed where the result at a step depends on
what is given at that step alone:

==============  ==================================================  =================================================
functions       what they mean at one step                          how they run over all steps
==============  ==================================================  =================================================
``ARITHMETIC``  numbers one by one, or sums and products of them    ``torch.vmap`` over the steps
``linear``      a product with one weight                           inside the neuron's call, or as one product
``LAYERS``      each sample by itself, or samples put together      steps and samples as one batch (``BATCHED``), else
                                                                    ``vmap``
``VIEWS``       another view of the same numbers                    ``vmap``; a view of what the user holds stays one
``stack``       of successive values of one result                  that result as it is, which holds all steps
==============  ==================================================  =================================================

Everything else runs the record first: functions that write in place or into ``out``, draw random numbers, look at the
batch as a whole, or return anything but one tensor. ``functions.py`` has the few exceptions (``x += y``, ``dropout``),
and answers questions for shapes, dtypes and the like without running anything.

To add a function, put its name into one of the lists: all its spellings are found.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def functions(names: str) -> set[Any]:
    """Every spelling of these functions: of ``torch``, of ``Tensor``, as an operator and in ``nn.functional``."""
    found = set()
    for name in names.split():
        for home, spelling in ((torch, name), (Tensor, name), (Tensor, f"__{name}__"), (F, name)):
            found.add(getattr(home, spelling, None))
    return found - {None}


ARITHMETIC = functions(
    """add sub mul div truediv true_divide radd rsub rmul rdiv rtruediv rpow neg pow abs exp log sqrt rsqrt square
    sigmoid tanh sin cos clamp clip clamp_min clamp_max minimum maximum where lt le gt ge eq ne relu relu6 leaky_relu
    elu celu selu gelu silu mish softplus softsign hardtanh hardsigmoid hardswish threshold softmax log_softmax
    sum mean amax amin matmul rmatmul mv bmm linear bilinear prelu"""
)
# their forward on an input with more samples is their forward on each
BATCHED = functions(
    """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d max_pool3d
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d"""
)
LAYERS = BATCHED | functions("layer_norm group_norm pad cat concat concatenate stack clone")
VIEWS = functions(
    """flatten unflatten reshape view permute transpose t squeeze unsqueeze movedim select narrow expand contiguous
    detach getitem view_as"""
)
RECORDABLE = ARITHMETIC | LAYERS | VIEWS
LINEAR = F.linear
CONSTANTS = (int, float, bool, str, type(None), torch.dtype, torch.memory_format, type(...))


def batched_dims(func: Any) -> int:
    """Dimensions of (T, B, C, ...) for a function of ``BATCHED``, whose name says how many are spatial."""
    name = getattr(func, "__name__", "")
    return 3 + next((int(c) for c in name if c.isdigit()), 9)


class Placeholder:
    """Stands for the ``index``-th tensor among the arguments of a call."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


def filled(form: Any, tensors: list[Any]) -> Any:
    """Arguments with their tensors in place."""
    if type(form) is Placeholder:
        return tensors[form.index]
    if type(form) in (tuple, list):
        return type(form)(filled(item, tensors) for item in form)
    return form
