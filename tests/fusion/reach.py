"""Everything that could be called on a recorded step, called on one and on an ordinary tensor.

``python reach.py FIRST LAST STEP`` makes a part of these calls. Each is announced before it is made, so that
whoever started this process knows which one ended it.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import snntorch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snn_sparse_plugin as ssp
from snn_sparse_plugin.core.errors import SparsePluginError

# what changes the process for all that follows, waits for others, or answers with an address or a place in memory
_LEFT_OUT = {
    *("set_default_dtype", "set_default_device", "set_default_tensor_type", "set_num_threads", "set_warn_always"),
    *("set_num_interop_threads", "set_flush_denormal", "set_printoptions", "set_deterministic_debug_mode"),
    *("set_float32_matmul_precision", "use_deterministic_algorithms", "seed", "manual_seed", "set_rng_state"),
    *("initial_seed", "import_ir_module", "import_ir_module_from_buffer", "parse_ir", "parse_schema"),
    *("compile", "save", "load", "hub", "classproperty", "fork", "wait", "data_ptr", "storage", "typed_storage"),
    *("untyped_storage", "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"),
    *("new", "resize_", "resize_as_", "resize", "resize_as", "share_memory_", "is_shared", "pin_memory", "is_pinned"),
    *("as_tensor", "parse_type_comment", "init_num_threads", "__new__", "__init__", "__dir__"),
    *("set_grad_enabled", "set_autocast_enabled", "set_autocast_cache_enabled", "set_autocast_dtype"),
    *("set_autocast_cpu_dtype", "set_autocast_cpu_enabled", "set_autocast_gpu_dtype", "set_autocast_ipu_dtype"),
    "clear_autocast_cache",
    *("set_autocast_ipu_enabled", "set_autocast_xla_dtype", "set_autocast_xla_enabled", "set_anomaly_enabled"),
    *("autocast_increment_nesting", "autocast_decrement_nesting", "cond", "while_loop", "unify_type_list", "set_vital"),
    *("read_vitals", "get_file_path", "prepare_multiprocessing_environment", "thread_safe_generator"),
    *("_make_subclass", "_make_wrapper_subclass", "module_load", "stft", "istft", "register_hook", "dtype", "imag"),
    # torch's own versions of a tensor
    *("const_data_ptr", "mutable_data_ptr", "fbgemm_pack_gemm_matrix_fp16"),
    # what a recorded step is until it has been computed
    *("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"),
    *("__annotations__", "__dict__", "__doc__", "__getstate__", "__module__", "__class__"),
    *("__hash__", "__reduce__", "__reduce_ex__", "__sizeof__", "__init_subclass__", "__subclasshook__", "__delattr__"),
}  # fmt: skip
_HOMES: dict[str, Any] = {
    "torch": torch, "nn.functional": F, "torch.linalg": torch.linalg, "torch.special": torch.special,
    "torch.fft": torch.fft, "snntorch.functional": getattr(snntorch, "functional", None),
    "snntorch.surrogate": getattr(snntorch, "surrogate", None),
    "snntorch.spikegen": getattr(snntorch, "spikegen", None),
}  # fmt: skip


@torch.jit.script
def _scripted(x: Tensor) -> Tensor:
    return (1.0 - x) * x + x.to(x.device)


@torch.jit.script
def _scripted_list(xs: list[Tensor]) -> Tensor:
    return torch.stack(xs).sum(0)


def _assigned(name: str) -> Callable[[Tensor, Tensor], Any]:
    def call(x: Tensor, y: Tensor) -> Any:
        holder = nn.Parameter(torch.ones_like(y.detach()) if isinstance(y, Tensor) else torch.ones(3, 4))
        setattr(holder, name, x if name == "data" else x.detach())
        return getattr(holder, name) * 2

    return call


_BY_HAND: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "numpy.asarray": lambda x, y: np.asarray(x.detach()),
    "numpy.array": lambda x, y: np.array(x.detach()),
    "numpy.from_dlpack": lambda x, y: np.from_dlpack(x.detach()),
    "numpy.sum": lambda x, y: np.sum(x.detach().numpy()),
    "to_dlpack": lambda x, y: torch.from_dlpack(torch.utils.dlpack.to_dlpack(x.detach())),
    "to_dlpack of a step": lambda x, y: 0 if x.requires_grad else torch.from_dlpack(torch.utils.dlpack.to_dlpack(x)),
    "from_dlpack": lambda x, y: torch.from_dlpack(x.detach()),
    "set data": _assigned("data"),
    "set grad": _assigned("grad"),
    "Parameter": lambda x, y: nn.Parameter(x),
    "Buffer": lambda x, y: nn.Buffer(x) if hasattr(nn, "Buffer") else x,
    "tensor": lambda x, y: torch.tensor(x),
    "as_tensor": lambda x, y: torch.as_tensor(x),
    "asarray": lambda x, y: torch.asarray(x),
    "asarray_without_gradient": lambda x, y: torch.asarray(x, requires_grad=False),
    "Tensor": lambda x, y: torch.Tensor(x),
    "FloatTensor": lambda x, y: torch.FloatTensor(x),
    "as_subclass": lambda x, y: x.as_subclass(Tensor) * 2,
    "scripted": lambda x, y: _scripted(x),
    "scripted list": lambda x, y: _scripted_list([x, y]),
    "vmap": lambda x, y: torch.vmap(lambda a: a.sum() * 2)(x),
    "vmap of two": lambda x, y: torch.vmap(torch.mul)(x, y),
    "vmap over a closure": lambda x, y: torch.vmap(lambda a: a * x[0])(y),
    "func.grad": lambda x, y: torch.func.grad(lambda a: (a**2).sum())(x),
    "func.grad of a closure": lambda x, y: torch.func.grad(lambda a: (a * x).sum())(y.detach()),
    "func.vjp": lambda x, y: torch.func.vjp(lambda a: a * 3, x)[0],
    "func.jvp": lambda x, y: torch.func.jvp(lambda a: a * a, (x,), (y,)),
    "func.jacrev": lambda x, y: torch.func.jacrev(lambda a: a.sum(0) ** 2)(x),
    "func.jacfwd": lambda x, y: torch.func.jacfwd(lambda a: a.sum(0) ** 2)(x),
    "func.hessian": lambda x, y: torch.func.hessian(lambda a: (a**3).sum())(x[0]),
    "func.functional_call": lambda x, y: torch.func.functional_call(nn.Linear(4, 2, bias=False), {"weight": x[:2]}, y),
    "nested_tensor": lambda x, y: torch.nested.nested_tensor([x, y]).to_padded_tensor(0.0),
    "as_nested_tensor": lambda x, y: torch.nested.as_nested_tensor([x, y]).to_padded_tensor(0.0),
    "foreach": lambda x, y: torch._foreach_add([x, y], [y, x]),
    "foreach in place": lambda x, y: torch._foreach_add_([x.clone(), y.clone()], 1.0),
    "pytree": lambda x, y: torch.utils._pytree.tree_map(lambda a: a + 1, {"a": (x, [y])}),
    "autograd.grad": lambda x, y: torch.autograd.grad((x * x).sum(), x)[0] if x.requires_grad else 0,
    "autograd.backward": lambda x, y: torch.autograd.backward([x.sum(), y.sum()]) if x.requires_grad else 0,
    "grad of a leaf by it": lambda x, y: _leaf_grad(x),
    "jacobian": lambda x, y: torch.autograd.functional.jacobian(lambda a: a.sum(0), x.detach()),
    "checkpoint": lambda x, y: torch.utils.checkpoint.checkpoint(lambda a: a * 2, x, use_reentrant=False),
    "clip_grad": lambda x, y: nn.utils.clip_grad_norm_([nn.Parameter(x.detach())], 1.0),
    "parameters_to_vector": lambda x, y: nn.utils.parameters_to_vector([x, y]),
    "vector_to_parameters": lambda x, y: _vector_to_parameters(x),
    "pad_sequence": lambda x, y: nn.utils.rnn.pad_sequence([x, y]),
    "pack_sequence": lambda x, y: nn.utils.rnn.pack_sequence([x, y]).data,
    "LSTM": lambda x, y: _made(nn.LSTM, 4, 2)(x)[0],
    "GRUCell": lambda x, y: _made(nn.GRUCell, 4, 2)(x),
    "MultiheadAttention": lambda x, y: _made(nn.MultiheadAttention, 4, 1)(x, x, x)[0],
    "TensorDataset": lambda x, y: torch.utils.data.TensorDataset(x, y)[1],
    "collate": lambda x, y: torch.utils.data.default_collate([x, y]),
    "deepcopy": lambda x, y: __import__("copy").deepcopy(x.detach()),
    "pickle": lambda x, y: __import__("pickle").loads(__import__("pickle").dumps(x.detach())),
    "save": lambda x, y: _saved(x),
    "format": lambda x, y: (str(x), repr(y), f"{x.sum():.3f}"),
    "in a set": lambda x, y: len({x, y}),
    "bool": lambda x, y: bool(x.sum() > 0),
    "int, float, complex": lambda x, y: (int(x.sum()), float(y.sum()), complex(x.sum())),
    "index": lambda x, y: [10, 20, 30][x.sum().long() % 3],
    "range": lambda x, y: list(range(int(x.sum().long() % 5))),
    "iter": lambda x, y: [row.sum().item() for row in x],
    "unpack": lambda x, y: (lambda a, b, c: a + b + c)(*x),
    "contains": lambda x, y: 1.0 in x,
    "indexed by it": lambda x, y: torch.arange(12.0).view(3, 4)[x > 0],
    "put into a list's place": lambda x, y: _put(x),
    "min of Python": lambda x, y: min(x.sum(), y.sum()),
    "sum of Python": lambda x, y: sum([x, y]),
    "sorted": lambda x, y: sorted(x.sum(0)),
    "statistics": lambda x, y: x.std() + y.var(),
    "sparse": lambda x, y: x.to_sparse().to_dense(),
    "csr": lambda x, y: x.detach().to_sparse_csr().to_dense(),
    "sparse.mm": lambda x, y: torch.sparse.mm(x.detach().to_sparse(), y.T),
    "out=": lambda x, y: torch.add(x.detach(), y.detach(), out=torch.empty(3, 4)),
    "out= a step": lambda x, y: torch.add(torch.ones(3, 4), 1, out=x) if not x.requires_grad else 0,
    "copy_ into": lambda x, y: torch.zeros(3, 4).copy_(x),
    "row set": lambda x, y: _row_set(x),
    "masked_scatter_": lambda x, y: torch.zeros(3, 4).masked_scatter_(x > 0, y.detach()),
    "quantile": lambda x, y: torch.quantile(x, 0.5),
    "histogram": lambda x, y: torch.histogram(x.detach(), 4).hist,
    "bincount": lambda x, y: torch.bincount(x.detach().long().clamp(0).flatten()),
    "einsum": lambda x, y: torch.einsum("bi,bj->ij", x, y),
    "unfold": lambda x, y: x.unfold(1, 2, 1),
    "view_as_complex": lambda x, y: torch.view_as_complex(x.view(3, 2, 2)).abs(),
    "multiprocessing": lambda x, y: torch.multiprocessing.reductions.reduce_tensor(x.detach().clone())[0].__name__,
    "profiler": lambda x, y: _profiled(x),
    "module attribute": lambda x, y: _registered(x),
    "state_dict": lambda x, y: _registered(x).state_dict() if isinstance(_registered(x), nn.Module) else 0,
}  # fmt: skip


def _made(cls: Any, *args: Any) -> Any:
    torch.manual_seed(1)
    return cls(*args)


def _leaf_grad(x: Tensor) -> Any:
    leaf = torch.ones(3, 4, requires_grad=True)
    (leaf * 2).backward(x.detach())
    return leaf.grad


def _vector_to_parameters(x: Tensor) -> Any:
    layer = nn.Linear(4, 3, bias=False)
    nn.utils.vector_to_parameters(x.detach().flatten(), layer.parameters())
    return layer(torch.ones(1, 4))


def _saved(x: Tensor) -> Any:
    import io

    file = io.BytesIO()
    torch.save({"x": x.detach()}, file)
    file.seek(0)
    return torch.load(file)


def _put(x: Tensor) -> Any:
    rows = torch.zeros(2, 3, 4)
    rows[1] = x
    return rows


def _row_set(x: Tensor) -> Any:
    x = x.clone()
    x[0] = 5.0
    return x


def _profiled(x: Tensor) -> Any:
    with torch.profiler.profile(record_shapes=True):
        return x + 1


def _registered(x: Tensor) -> Any:
    module = nn.Module()
    module.register_buffer("x", x)
    return module.x


def _names(home: Any) -> list[str]:
    return sorted(n for n in dir(home) if not n.startswith("_") and n not in _LEFT_OUT)


def calls() -> list[tuple[str, Callable[[Tensor, Tensor], Any]]]:
    """Every call by name, in an order that is always the same."""
    found: list[tuple[str, Callable[[Tensor, Tensor], Any]]] = list(_BY_HAND.items())
    for label, home in _HOMES.items():
        for name in _names(home) if home is not None else ():
            func = getattr(home, name)
            if callable(func) and not isinstance(func, type):
                found += [
                    (f"{label}.{name}{form}", call)
                    for form, call in {
                        "(x)": lambda x, y, f=func: f(x),
                        "(x, y)": lambda x, y, f=func: f(x, y),
                        "(x, 1)": lambda x, y, f=func: f(x, 1),
                        "([x, y])": lambda x, y, f=func: f([x, y]),
                        "(w, x)": lambda x, y, f=func: f(torch.full((3, 4), 0.5), x),
                    }.items()
                ]
    dunder = sorted(n for n in dir(Tensor) if n.startswith("__") and n not in _LEFT_OUT)
    for name in [*_names(Tensor), *dunder]:
        found.append((f"x.{name}", lambda x, y, n=name: _attribute(getattr(x, n))))
        if callable(getattr(Tensor, name, None)):
            found += [
                (f"x.{name}()", lambda x, y, n=name: getattr(x, n)()),
                (f"x.{name}(y)", lambda x, y, n=name: getattr(x, n)(y)),
                (f"x.{name}(1)", lambda x, y, n=name: getattr(x, n)(1)),
            ]
    return found


def _attribute(value: Any) -> Any:
    return None if callable(value) else value


def _tensors(block: Any, grad: bool) -> tuple[Tensor, Tensor]:
    """A membrane and the spikes of the third step of a small loop: recorded, if the block is sparse mode."""
    torch.manual_seed(0)
    layer, neuron = nn.Linear(5, 4), snntorch.Leaky(beta=0.9, threshold=0.3)
    steps = (torch.rand(3, 3, 5) < 0.6).float()
    mem = torch.zeros(3, 4)
    with torch.set_grad_enabled(grad):
        for step in steps:
            spikes, mem = neuron(layer(step), mem)
    return mem, spikes


def outcome(call: Callable[[Tensor, Tensor], Any], sparse: bool, grad: bool) -> tuple[str, Any]:
    """("value", what it returns) or ("error", the exception)."""
    block = ssp.sparse_mode(backprop_threshold=None, min_active=0) if sparse else nullcontext()
    with block, torch.set_grad_enabled(grad):
        x, y = _tensors(block, grad)
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002, which snntorch draws from
        try:
            return "value", _settled(call(x, y))
        except Exception as error:
            return "error", error


def _settled(value: Any) -> Any:
    """Copies of tensors, and whether they want a gradient, taken inside the block."""
    if isinstance(value, Tensor):
        plain = value.to_dense() if value.layout is not torch.strided else value
        return plain.detach().clone(), value.requires_grad
    if isinstance(value, Iterator):
        value = list(value)
    if isinstance(value, tuple | list):
        return [_settled(item) for item in value]
    if isinstance(value, dict):
        return {name: _settled(item) for name, item in value.items()}
    if isinstance(value, str):  # the node of the graph is named by whoever made it
        return re.sub(r"grad_fn=<\w+>", "grad_fn", value)
    return value if isinstance(value, int | float | str | bool | complex | np.ndarray | torch.dtype) else None


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, 1e-4, 1e-5, equal_nan=True)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.allclose(a, b, 1e-4, 1e-5, equal_nan=True)
    if isinstance(a, tuple | list):
        return isinstance(b, tuple | list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, float):
        return isinstance(b, float) and (a == b or abs(a - b) <= 1e-4 * max(1, abs(a)) or (a != a and b != b))
    return bool(a == b)


def main(first: int, last: int, step: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    todo = calls()[first:last:step]
    for grad in (False, True):
        for name, call in todo:
            print("CALL", name, "with a gradient" if grad else "", flush=True)
            want, got = outcome(call, False, grad), outcome(call, True, grad)
            if want[0] == "error":
                continue  # what upstream refuses may be refused in other words
            if got[0] == "error":
                kind = "CLEAR" if isinstance(got[1], SparsePluginError) else "BAD"
                print(
                    kind,
                    name,
                    "grad" if grad else "",
                    type(got[1]).__name__,
                    str(got[1])[:150].replace("\n", " "),
                )
            elif not same(want[1], got[1]):
                print(
                    "BAD",
                    name,
                    "grad" if grad else "",
                    "upstream",
                    str(want[1])[:200],
                    "sparse",
                    str(got[1])[:200],
                )
    print("END", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
