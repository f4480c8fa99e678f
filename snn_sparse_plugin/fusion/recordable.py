"""Which functions of torch may be recorded, and why: a table, and how a call's arguments are written down.

A recorded call runs once over all steps instead of once a step. That is allowed where the result is the same:

=============  =========================================================  =============================================
functions      what they mean at one step                                 how they run over all steps
=============  =========================================================  =============================================
arithmetic     each number, or the features of each sample, by itself     ``torch.vmap`` over the steps
``linear``     a product with one weight                                  inside the neuron's call, or one product
layers         each sample by itself                                      steps and samples as one batch, else ``vmap``
views          another view of the same numbers                           ``torch.vmap`` over the steps
``stack``      successive values of one result                            the result itself, which holds all steps
=============  =========================================================  =============================================

Everything else runs the record first: functions that write in place or into ``out``, draw random numbers, look at the
batch as a whole, or give anything but one tensor. Shapes, dtypes and the like are answered without running it, by
:mod:`snn_sparse_plugin.fusion.functions`.
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


# functions of one argument's features or of single numbers, which mean the same at every step
_ARITHMETIC = """
add sub mul div truediv true_divide radd rsub rmul rdiv rtruediv rpow neg pow abs exp log sqrt rsqrt square
sigmoid tanh sin cos clamp clip clamp_min clamp_max minimum maximum where lt le gt ge eq ne
relu relu6 leaky_relu elu celu selu gelu silu mish softplus softsign hardtanh hardsigmoid hardswish threshold softmax
log_softmax sum mean amax amin matmul rmatmul mv bmm linear bilinear prelu
"""
_LAYERS = """
conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d max_pool3d avg_pool1d
avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool2d adaptive_max_pool3d layer_norm group_norm pad cat concat concatenate stack clone
"""
_VIEWS = """
flatten unflatten reshape view permute transpose t squeeze unsqueeze movedim select narrow expand contiguous detach
getitem view_as
"""
# their forward on an input with more samples is their forward on each
BATCHED = functions(
    """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d max_pool3d
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d"""
)
VIEWS = functions(_VIEWS)
RECORDABLE = functions(_ARITHMETIC) | functions(_LAYERS) | VIEWS
LINEAR = F.linear
CONSTANTS = (int, float, bool, str, type(None), torch.dtype, torch.memory_format, type(...))


class Argument:
    """Stands for the ``index``-th tensor among the arguments of a call."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


def filled(form: Any, tensors: list[Any]) -> Any:
    """Arguments with their tensors in place."""
    if type(form) is Argument:
        return tensors[form.index]
    if type(form) in (tuple, list):
        return type(form)(filled(item, tensors) for item in form)
    return form
