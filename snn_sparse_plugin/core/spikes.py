"""SpikeTrain: spikes as events, with a gradient that lives only where the emitting neuron is active."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import bits, registry
from .csr import (
    MAX_EVENTS,
    Active,
    at_active,
    cells,
    check_csr,
    check_float,
    coordinates,
    entries,
    events_from_coo,
    events_from_dense,
    int32,
)
from .errors import InputError, MissingDependencyError, NonFiniteError
from .host import waits
from .spike_grads import Counts, Step, ToDense

__all__ = [
    "MAX_EVENTS",
    "Active",
    "SpikeTrain",
    "as_spike_train",
    "at_active",
    "check_csr",
    "check_float",
    "coordinates",
    "is_sparse_input",
]


class _Forms:
    """Events as CSR and as bits: each is made of the other when it is first asked for, once for all trains of them."""

    def __init__(self, features: int, csr: tuple[Tensor, Tensor] | None, words: Tensor | None) -> None:
        self.features, self.csr, self.bits = features, csr, words

    def events(self) -> tuple[Tensor, Tensor]:
        if self.csr is None:
            assert self.bits is not None
            self.csr = bits.unpack_events(self.bits, self.features)
        return self.csr

    def words(self, T: int, B: int) -> Tensor:
        if self.bits is None:
            assert self.csr is not None
            self.bits = bits.pack_events(*self.csr, (T, B, self.features))
        return self.bits


class SpikeTrain:
    """Spike events of shape (T, B, N...), CSR over rows ``b * T + t`` (one sample's steps are contiguous).

    Args:
        indptr: int32, (B * T + 1,).
        indices: int32, (events,), flat feature index, increasing within a row.
        shape: (T, B, N...).
        values: graded spike values (events,), or None where every spike is 1.
        check: look at every row and index; False trusts the caller, and wrong indices are then out-of-bounds accesses.
        dtype: dtype of the dense form; taken from ``values`` where given.

    Raises:
        InputError: shapes or dtypes that do not fit, or rows and indices that are no events of this shape.

    ``carrier`` and ``active`` tie the train to autograd: the gradient of a train is one number per active
    neuron-step (``active`` given), or dense (``active`` None and ``carrier`` of the full shape).

    A GPU makes trains of bits (:meth:`from_words`, :attr:`words`): the dense forms, views and copies of one are made
    without a look at its numbers. Its ``indptr`` and ``indices``, ``events`` and ``density`` wait for the device when
    they are first asked for.

    Example:
        >>> x = torch.zeros(5, 2, 3); x[1, 0, 2] = 1
        >>> train = SpikeTrain.from_dense(x)
        >>> train
        SpikeTrain(T=5, B=2, N=(3,), events=1, density=3.33%, dtype=torch.float32, device=cpu)
        >>> bool((train.to_dense() == x).all())
        True
    """

    def __init__(
        self,
        indptr: Tensor,
        indices: Tensor,
        shape: Sequence[int],
        values: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        carrier: Tensor | None = None,
        active: Active | None = None,
        check: bool = True,
    ) -> None:
        self.shape = torch.Size(shape)
        if len(self.shape) < 3:
            raise InputError(f"a SpikeTrain has shape (T, B, N...), got {tuple(self.shape)}.")
        rows = self.shape[0] * self.shape[1]
        if indptr.dtype != torch.int32 or indices.dtype != torch.int32:
            raise InputError(f"indptr and indices must be int32, got {indptr.dtype} and {indices.dtype}.")
        if indptr.shape != (rows + 1,):
            raise InputError(
                f"indptr must have B * T + 1 = {rows + 1} entries for shape {tuple(self.shape)}, "
                f"got {tuple(indptr.shape)}."
            )
        if values is not None and values.shape != indices.shape:
            raise InputError(
                f"values {tuple(values.shape)} and indices {tuple(indices.shape)} differ in shape."
            )
        if check:
            check_csr(indptr, indices, math.prod(self.shape[2:]))
        self.indptr, self.indices, self.values = indptr, indices, values
        self.dtype = values.dtype if values is not None else dtype
        self.carrier, self.active = carrier, active
        self._forms = _Forms(self.features, (indptr, indices), None)

    @classmethod
    def from_words(
        cls,
        words: Tensor,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        carrier: Tensor | None = None,
        active: Active | None = None,
    ) -> SpikeTrain:
        """From bits (T, B, ceil(N / 32)) int32: neuron n is bit n % 32 of word n // 32, bits beyond N are 0.

        Example:
            >>> train = SpikeTrain.from_words(torch.tensor([[[5]]], dtype=torch.int32), (1, 1, 3))
            >>> train.to_dense().tolist(), train.indices.tolist()
            ([[[1.0, 0.0, 1.0]]], [0, 2])
        """
        T, B, *features = shape
        N = math.prod(features)
        if not features or words.dtype != torch.int32 or words.shape != (T, B, -(-N // 32)):
            raise InputError(
                f"words of a SpikeTrain of shape {tuple(shape)} are int32 of shape (T, B, ceil(N / 32)), "
                f"got {words.dtype} of shape {tuple(words.shape)}."
            )
        return cls._of(_Forms(N, None, words), shape, None, dtype, carrier, active)

    @classmethod
    def _of_events(
        cls,
        events: tuple[Tensor, Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        carrier: Tensor | None = None,
        active: Active | None = None,
        values: Tensor | None = None,
    ) -> SpikeTrain:
        """From ``indptr`` and ``indices`` that are known to be events of this shape: nothing is looked at."""
        forms = _Forms(math.prod(shape[2:]), events, None)
        return cls._of(forms, shape, values, dtype, carrier, active)

    @classmethod
    def _of(
        cls,
        forms: _Forms,
        shape: Sequence[int],
        values: Tensor | None,
        dtype: torch.dtype,
        carrier: Tensor | None,
        active: Active | None,
    ) -> SpikeTrain:
        train = cls.__new__(cls)
        train.shape, train.values, train.dtype = torch.Size(shape), values, dtype
        train.carrier, train.active, train._forms = carrier, active, forms
        if forms.csr is not None:
            train.indptr, train.indices = forms.csr
        return train

    # --- what it is ---

    # attributes of a train that was made of them; else found here, once
    @cached_property
    def indptr(self) -> Tensor:
        return self._forms.events()[0]

    @cached_property
    def indices(self) -> Tensor:
        return self._forms.events()[1]

    @property
    def words(self) -> Tensor:
        """The events as bits (T, B, ceil(N / 32)) int32, as :meth:`from_words` takes them; of a graded train, where
        its events are."""
        return self._forms.words(self.T, self.B)

    def tensors(self) -> list[Tensor]:
        """Those that the events stand in: CSR, or bits."""
        csr, words = self._forms.csr, self._forms.bits
        held = list(csr) if csr is not None else [words] if words is not None else []
        return held if self.values is None else [*held, self.values]

    def _bits(self) -> Tensor | None:
        """The words, where they say all and dense forms are best made of them; else None."""
        if self.values is not None or (self._forms.csr is not None and not waits(self.indices)):
            return None
        return self.words

    @property
    def device(self) -> torch.device:
        held = self._forms.csr
        return self._forms.bits.device if held is None else held[1].device  # type: ignore[union-attr]

    @property
    def T(self) -> int:
        return self.shape[0]

    @property
    def B(self) -> int:
        return self.shape[1]

    @property
    def features(self) -> int:
        """N, the number of neurons, features flattened."""
        return math.prod(self.shape[2:])

    @property
    def events(self) -> int:
        return self.indices.numel()

    @property
    def density(self) -> float:
        """Spikes per neuron-step."""
        return self.events / max(1, math.prod(self.shape))

    def _share(self) -> float | Tensor:
        """The density; a 0-dim tensor where a number would have to be waited for."""
        size = max(1, math.prod(self.shape))
        return self.density if self._forms.csr is not None else bits.count(self.words).double() / size

    @property
    def requires_grad(self) -> bool:
        return self.carrier is not None and self.carrier.requires_grad

    def __len__(self) -> int:
        return self.shape[0]

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    def __repr__(self) -> str:
        graded = ", graded" if self.values is not None else ""
        return (
            f"SpikeTrain(T={self.T}, B={self.B}, N={tuple(self.shape[2:])}, events={self.events}, "
            f"density={100 * self.density:.3g}%, dtype={self.dtype}, device={self.device}{graded})"
        )

    # --- forms ---

    def _dense_data(self) -> Tensor:
        words = self._bits()
        if words is not None:
            return bits.unpack(words, self.features).to(self.dtype).view(self.shape)
        out = torch.zeros(self.T, self.B, self.features, dtype=self.dtype, device=self.device)
        rows, columns = coordinates(self.indptr, self.indices)
        values = torch.ones((), dtype=self.dtype, device=self.device) if self.values is None else self.values
        out[rows % max(self.T, 1), rows // max(self.T, 1), columns] = values.detach()
        return out.view(self.shape)

    def to_dense(self) -> Tensor:
        """The dense tensor (T, B, N...), differentiable: its gradient reaches the active neuron-steps."""
        if not self.requires_grad:
            return self._dense_data()
        return ToDense.apply(self.carrier, self)

    def step(self, t: int) -> Tensor:
        """Step ``t`` as a dense tensor (B, N...), differentiable; no other step is made dense."""
        t = range(self.T)[t]
        if self.requires_grad:
            return Step.apply(self.carrier, self, t)
        step = self.values_at(t)
        step._snn_step = (self, t)  # type: ignore[attr-defined]  # a loop over all steps is run on the events
        return step

    def values_at(self, t: int) -> Tensor:
        """The numbers of step ``t``, 0 <= t < T, (B, N...), without a gradient."""
        kernels = self._kernels()
        if kernels is not None:
            return self._summed(kernels, range(t, t + 1))
        words = self._bits()
        if words is not None:
            return bits.unpack(words[t], self.features).to(self.dtype).view(self.shape[1:])
        if waits(self.indices):  # how many events a step has is known on the device alone
            return self._dense_data()[t]
        picked = entries(self.indptr, torch.arange(self.B, device=self.device) * self.T + t)
        out = torch.zeros(self.B, self.features, dtype=self.dtype, device=self.device)
        values = torch.ones((), dtype=self.dtype, device=self.device) if self.values is None else self.values
        columns = self.indices.long()[picked.positions]
        out[picked.row, columns] = values if self.values is None else values[picked.positions]
        return out.view(self.shape[1:])

    def counts(self) -> Tensor:
        """Spikes of each neuron over all steps, (B, N...), differentiable; of a graded train, the sum of values.

        Example:
            >>> SpikeTrain.from_dense(torch.ones(5, 1, 2)).counts().tolist()
            [[5.0, 5.0]]
        """
        if not self.requires_grad:
            return self._counts()
        return Counts.apply(self.carrier, self)

    def _counts(self) -> Tensor:
        kernels = self._kernels()
        if kernels is not None:
            return self._summed(kernels, range(self.T))
        words = self._bits()
        if words is not None:
            return bits.unpack(words, self.features).sum(0).to(self.dtype).view(self.shape[1:])
        values = None if self.values is None else self.values.detach()
        places = cells(self.indptr, self.indices, self.shape)
        if values is not None and waits(places):  # bincount looks for the largest
            counts = values.new_zeros(self.B * self.features).index_add_(0, places, values)
            return counts.view(self.shape[1:])
        counts = torch.bincount(places, values, minlength=self.B * self.features)
        return counts.to(self.dtype).view(self.shape[1:])

    def _summed(self, kernels: Any, steps: range) -> Tensor:
        values = None if self.values is None else self.values.detach()
        flat = (*self.shape[:2], self._forms.features)
        summed: Tensor = kernels.count_events(self.indptr, self.indices, values, flat, self.dtype, steps)
        return summed if len(self.shape) == 3 else summed.view(self.shape[1:])

    def _kernels(self) -> Any:
        """The compiled conversions, for a train that has CSR events at hand; else None."""
        held = self._forms.csr is not None and self.B * self.features
        return _kernels(self.device, self.dtype) if held else None

    @classmethod
    def from_dense(cls, x: Tensor, *, binary: bool = False) -> SpikeTrain:
        """Events of a dense (T, B, N...) tensor; values other than 0 and 1 make a graded train.

        Args:
            binary: promise that every value is 0 or 1; anything else raises, but on a device, which is not asked: what
                is not 0 is a spike there.

        Raises:
            InputError: fewer than three dimensions, an integer dtype, a NaN or infinity, or a broken promise.
        """
        check_float(x, "a spike tensor")
        if x.layout != torch.strided:
            raise InputError(
                f"from_dense takes a dense tensor, got {x.layout}; see as_spike_train for sparse ones."
            )
        if x.dim() < 3:
            raise InputError(f"a SpikeTrain is made from (T, B, N...), got shape {tuple(x.shape)}.")
        carrier = x.flatten(2) if x.requires_grad and torch.is_grad_enabled() else None
        if binary and waits(x):
            return cls.from_words(bits.pack(x.detach().flatten(2)), x.shape, dtype=x.dtype, carrier=carrier)
        kernels = _kernels(x.device, x.dtype) if x.numel() else None
        if kernels is not None:
            # a step loop may have had them looked for while it was recorded
            begun = getattr(x, "_snn_begun", None)
            found = kernels.events_from_dense(x.detach(), begun)
        else:
            found = events_from_dense(x.detach())
        train = cls._of_dense(found, x, carrier)
        if binary and train.values is not None:
            raise InputError(f"spikes must be 0 or 1, found {train.values[train.values != 1][0].item():g}.")
        return train

    @classmethod
    def _of_dense(
        cls, found: tuple[Tensor, Tensor, Tensor | None], x: Tensor, carrier: Tensor | None = None
    ) -> SpikeTrain:
        """From what was found in a dense tensor: ``indptr``, ``indices`` and values, None where all are 1."""
        indptr, indices, values = found
        if values is not None and not torch.isfinite(values).all():
            raise NonFiniteError("input has NaN or infinite values; spikes must be finite.")
        return cls._of_events((indptr, indices), x.shape, x.dtype, carrier, values=values)

    def to_sparse_csr(self) -> Tensor:
        """A torch CSR matrix (B * T, N), row ``b * T + t``."""
        values = torch.ones(self.events, dtype=self.dtype, device=self.device)
        values = values if self.values is None else self.values
        return torch.sparse_csr_tensor(
            self.indptr, self.indices, values, size=(self.T * self.B, self.features), check_invariants=False
        )

    @classmethod
    def from_sparse_csr(cls, x: Tensor, batch_size: int) -> SpikeTrain:
        """From a torch CSR matrix (B * T, N) with rows ``b * T + t``."""
        if x.layout != torch.sparse_csr or x.dim() != 2:
            raise InputError(
                f"expected a 2-D CSR matrix (B * T, N), got {x.layout} of shape {tuple(x.shape)}."
            )
        if batch_size < 1 or x.shape[0] % batch_size:
            raise InputError(f"{x.shape[0]} rows do not divide into a batch of {batch_size}.")
        check_float(x, "a spike matrix")
        values = _leaf_values(x, x.values())
        return cls(
            int32(x.crow_indices()),
            int32(x.col_indices()),
            (x.shape[0] // batch_size, batch_size, x.shape[1]),
            None if bool((values == 1).all()) else values.contiguous(),
            dtype=values.dtype,
        )

    @classmethod
    def from_sparse_coo(cls, x: Tensor) -> SpikeTrain:
        """From a torch COO tensor (T, B, N...)."""
        if x.dim() < 3 or x.dense_dim():
            raise InputError(f"expected a COO tensor (T, B, N...), got shape {tuple(x.shape)}.")
        check_float(x, "a spike tensor")
        _leaf_values(x, x._values())
        x = x.detach().coalesce()
        indptr, indices, values = events_from_coo(x)
        return cls(indptr, indices, x.shape, values, dtype=x.dtype)

    def to_torch_sparse(self) -> Any:
        """A ``torch_sparse.SparseTensor`` (B * T, N), row ``b * T + t``."""
        SparseTensor = _torch_sparse()
        return SparseTensor(
            rowptr=self.indptr.long(),
            col=self.indices.long(),
            value=self.values,
            sparse_sizes=(self.T * self.B, self.features),
            is_sorted=True,
        )

    @classmethod
    def from_torch_sparse(cls, x: Any, batch_size: int) -> SpikeTrain:
        """From a ``torch_sparse.SparseTensor`` (B * T, N) with rows ``b * T + t``."""
        indptr, indices, values = x.csr()
        values = torch.ones(indices.numel(), device=indices.device) if values is None else values
        csr = torch.sparse_csr_tensor(indptr, indices, values, size=x.sizes())
        return cls.from_sparse_csr(csr, batch_size)

    # --- small operations that keep events events ---

    def view(self, *features: int) -> SpikeTrain:
        """The same events with other feature dimensions, (T, B, *features); one may be -1."""
        if features == self.shape[2:]:
            return self
        probe = torch.empty(self.features, device="meta").view(*features)
        return self._replace(shape=(self.T, self.B, *probe.shape))

    def flatten(self) -> SpikeTrain:
        """The same events as (T, B, N)."""
        if len(self.shape) == 3:
            return self
        return self._replace(shape=(self.T, self.B, self.features))

    def detach(self) -> SpikeTrain:
        return self._replace(carrier=None, active=None)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SpikeTrain:
        """The train on another device; only a detached train can move."""
        if self.device == torch.device(device):
            return self
        return self._detached_copy(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SpikeTrain:
        """The train in page-locked memory, from which ``to("cuda", non_blocking=True)`` overlaps with work."""
        return self._detached_copy(Tensor.pin_memory)

    def _detached_copy(self, moved: Callable[[Tensor], Tensor]) -> SpikeTrain:
        if self.requires_grad:
            raise InputError("a SpikeTrain that carries a gradient stays where it is; detach() it first.")
        values = None if self.values is None else moved(self.values)
        held = self._forms
        if held.csr is not None:
            indptr, indices = map(moved, held.csr)
            return SpikeTrain(indptr, indices, self.shape, values, dtype=self.dtype, check=False)
        return SpikeTrain.from_words(moved(self.words), self.shape, dtype=self.dtype)

    def _replace(self, **changes: Any) -> SpikeTrain:
        fields: dict[str, Any] = {"shape": self.shape, "values": self.values, "dtype": self.dtype}
        fields |= {"carrier": self.carrier, "active": self.active} | changes
        return SpikeTrain._of(self._forms, **fields)


def _leaf_values(x: Tensor, values: Tensor) -> Tensor:
    """The values of a sparse input, finite and without a gradient to lose."""
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError("a sparse input passes no gradient on: detach() it, or give a dense tensor.")
    values = values.detach()
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError("input has NaN or infinite values; spikes must be finite.")
    return values


def _kernels(device: torch.device, dtype: torch.dtype) -> Any:
    """The compiled conversions of a device, of which there are some for float32 and float64; else None."""
    return registry.conversions(device.type) if dtype in (torch.float32, torch.float64) else None


def as_spike_train(x: Any, batch_size: int | None = None) -> SpikeTrain:
    """Any sparse form of spikes as a :class:`SpikeTrain`.

    Accepts a SpikeTrain, a torch COO tensor (T, B, N...), a torch CSR tensor (batched (T, B, N), or (B * T, N) with
    ``batch_size``) and a ``torch_sparse.SparseTensor`` (B * T, N) with ``batch_size``.

    Raises:
        InputError: something else, or a two-dimensional matrix without ``batch_size``.
    """
    if isinstance(x, SpikeTrain):
        return x
    if isinstance(x, Tensor) and x.layout == torch.sparse_coo:
        return SpikeTrain.from_sparse_coo(x)
    two_dimensional = (
        "a two-dimensional sparse matrix (B * T, N) does not say what T and B are: make it a SpikeTrain with "
        "as_spike_train(x, batch_size=B), or pass batch_size= to unroll."
    )
    if isinstance(x, Tensor) and x.layout == torch.sparse_csr:
        if x.dim() == 3:
            return SpikeTrain.from_sparse_coo(x.to_sparse_coo())
        if batch_size is None:
            raise InputError(two_dimensional)
        return SpikeTrain.from_sparse_csr(x, batch_size)
    if type(x).__name__ == "SparseTensor" and hasattr(x, "csr"):
        if batch_size is None:
            raise InputError(two_dimensional)
        return SpikeTrain.from_torch_sparse(x, batch_size)
    raise InputError(
        f"expected a SpikeTrain, torch COO or CSR tensor or torch_sparse.SparseTensor, "
        f"got {x.layout if isinstance(x, Tensor) else type(x).__name__}."
    )


def is_sparse_input(x: Any) -> bool:
    """Whether ``x`` is one of the sparse forms :func:`as_spike_train` takes."""
    if isinstance(x, Tensor):
        return x.layout != torch.strided
    return isinstance(x, SpikeTrain) or type(x).__name__ == "SparseTensor"


def _torch_sparse() -> Any:
    try:
        from torch_sparse import SparseTensor
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            "torch_sparse is not installed: pip install --no-build-isolation torch-scatter torch-sparse"
        ) from error
    return SparseTensor
