"""E-prop's scan back over a chunk of steps, one launch for all steps of a layer, generated for its derivatives.

``rule.py`` of the learner holds the equations. A thread walks one neuron of one sample back in time, with the adjoints
of its states and of the readout's memory in registers: those of the loss, and of every trace that goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from textwrap import indent

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sources import module_of

_SOURCE = '''"""E-prop's scan over {states} states and {memory} of the readout. Generated; a change to it is lost."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize={free})
def scan(
    {given},  # each over (T, B, N), with strides of its own over T and B
    decay_ptr,  # (m, m): A of the readout's memory
    gain_ptr,  # (m,): its b
    nu_ptr,  # out (targets, T, B, N): what the currents do to the targets
    start_ptr,  # out (targets, components, B, N): what the state before the first step does to them
    T,
    B,
    N,
    BLOCK: tl.constexpr,
):
    """Grid (B, blocks of N)."""
    b = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < N
    rows = B.to(tl.int64)
    span = T.to(tl.int64) * rows
    zero = tl.zeros([BLOCK], nu_ptr.dtype.element_ty)
{begin}
    for back in tl.range(0, T, num_stages=4):
        t = (T - 1 - back).to(tl.int64)
{step}
{end}
'''


@cache
def source_of(
    varying: tuple[tuple[int, int], ...],
    which: tuple[int, ...],
    numbers: tuple[tuple[tuple[int, int], float], ...],
    states: int,
    memory: int,
    out: int,
    lanes: tuple[int, ...],
) -> str:
    """The kernel ``scan``.

    Args:
        varying, which: places (row, column) of entries that vary, and the tensor that each is.
        numbers: places of those that are one number, and it.
        states, memory: components of the neuron's state and of the readout's memory, ``out`` being its output.
        lanes: the component that each target after the first, the loss, is.
    """
    factors = {place: f"e{k} * " for place, k in zip(varying, which, strict=True)}
    constants = sorted({value for _, value in numbers if value not in (0.0, 1.0)})
    for place, value in numbers:
        if value != 0.0:
            factors[place] = "" if value == 1.0 else f"c{constants.index(value)} * "

    components, targets = states + memory, range(1 + len(lanes))
    given = [*(f"e{k}" for k in sorted(set(which))), "filtered", "direct"]
    begin = [f"c{k} = tl.full([BLOCK], {value!r}, zero.dtype)" for k, value in enumerate(constants)]
    begin += [
        f"A{p}_{q} = tl.load(decay_ptr + {p * memory + q})" for p in range(memory) for q in range(memory)
    ]
    begin += [f"b{p} = tl.load(gain_ptr + {p})" for p in range(memory)]
    step = [f"{x} = tl.load({x}_ptr + t * {x}_t + b * {x}_b + cols, mask=mask, other=0.0)" for x in given]
    end = []
    for k in targets:
        own = [f"a{k}_{c}" for c in range(components)]
        begin += [f"{name} = zero" + " + 1" * (k > 0 and lanes[k - 1] == c) for c, name in enumerate(own)]
        signals = ["direct"] if memory else ["direct", "filtered"]
        if memory and k == 0:
            step.append(f"{own[states + out]} += filtered")
        z = [f"b{p} * {own[states + p]}" for p in range(memory)]
        step.append(f"z = {_sum([*z, *(signals if k == 0 else ())])}")
        rows = ["z", *own[:states]]
        for column in range(1 + states):
            parts = [factors[r, column] + row for r, row in enumerate(rows) if (r, column) in factors]
            step.append(f"n{column} = {_sum(parts)}")
        for q in range(memory):
            step.append(f"m{q} = {_sum([f'A{p}_{q} * {own[states + p]}' for p in range(memory)])}")
        step.append(f"tl.store(nu_ptr + ({k} * span + t * rows + b) * N + cols, n0, mask=mask)")
        after = [*(f"n{1 + c}" for c in range(states)), *(f"m{q}" for q in range(memory))]
        step += [f"{name} = {new}" for name, new in zip(own, after, strict=True)]
        end += [
            f"tl.store(start_ptr + ({k * components + c} * rows + b) * N + cols, {name}, mask=mask)"
            for c, name in enumerate(own)
        ]
    return _SOURCE.format(
        states=states,
        memory=memory,
        free=["T", "B", *(f"{x}_{axis}" for x in given for axis in "tb")],
        given=",\n    ".join(f"{x}_ptr,\n    {x}_t,\n    {x}_b" for x in given),
        begin=indent("\n".join(begin), "    "),
        step=indent("\n".join(step), "        "),
        end=indent("\n".join(end), "    "),
    )


def _sum(terms: Sequence[str]) -> str:
    return " + ".join(terms) or "zero"


def scan(
    local: Mapping[tuple[int, int], Tensor | float],
    states: int,
    decay: Tensor,
    gain: Tensor,
    out: int,
    filtered: Tensor,
    direct: Tensor,
    lanes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """nu (targets, K, B, N) and start (targets, components, B, N); see ``scan`` of the learner.

    Args:
        local: entries (K, B, N), where one tensor may stand at several places, or numbers.
        decay, gain: A (m, m) and b (m,) of the readout's memory.
    """
    K, B, N = filtered.shape
    entries = {id(x): x for x in local.values() if isinstance(x, Tensor)}
    index = {key: k for k, key in enumerate(entries)}
    varying = {place: index[id(x)] for place, x in local.items() if isinstance(x, Tensor)}
    numbers = tuple((place, float(x)) for place, x in local.items() if not isinstance(x, Tensor))
    m, targets = len(gain), 1 + len(lanes)
    source = source_of(tuple(varying), tuple(varying.values()), numbers, states, m, out, tuple(lanes))
    nu, start = filtered.new_empty(targets, K, B, N), filtered.new_empty(targets, states + m, B, N)
    given = []
    for x in (*entries.values(), filtered, direct):
        x = x if x.stride(-1) == 1 else x.contiguous()
        given += [x, x.stride(0), x.stride(1)]
    block = min(128, max(32, triton.next_power_of_2(N)))
    with torch.cuda.device_of(filtered):
        module_of(source, "eprop_scan").scan[(B, triton.cdiv(N, block))](
            *given,
            decay.contiguous(),
            gain.contiguous(),
            nu,
            start,
            K,
            B,
            N,
            BLOCK=block,
            num_warps=block // 32,
        )
    return nu, start


@triton.jit(do_not_specialize=["K", "size"])
def leaky(x_ptr, before_ptr, K, size, DECAY: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """``x_t += DECAY x_{t-1}`` in place over (K, size), from ``before`` on; backwards in time if ``REVERSE``."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    span = size.to(tl.int64)
    decay = tl.full([BLOCK], DECAY, x_ptr.dtype.element_ty)
    now = tl.load(before_ptr + at, mask=mask, other=0.0)
    for k in tl.range(0, K, num_stages=4):
        t = K - 1 - k if REVERSE else k
        now = tl.load(x_ptr + t * span + at, mask=mask, other=0.0) + decay * now
        tl.store(x_ptr + t * span + at, now, mask=mask)


def leak(x: Tensor, before: Tensor, decay: float, reverse: bool = False) -> None:
    """``x_t += decay x_{t-1}`` in place over contiguous (K, …), from ``before`` on; or backwards in time."""
    size = before.numel()
    if size:
        with torch.cuda.device_of(x):
            leaky[(triton.cdiv(size, 128),)](
                x, before.contiguous(), len(x), size, DECAY=decay, REVERSE=reverse, BLOCK=128, num_warps=4
            )
