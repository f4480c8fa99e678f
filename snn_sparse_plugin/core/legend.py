"""What the words of a report mean, and what to do about a module that does not run fused."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .tally import STEPPED, WAYS

MODES = {
    "fused": "its steps can run as one call over all of them, in a loop or by unroll",
    "masked": "upstream's own steps, with a gradient near threshold alone",
    "exact": "left as upstream made it: there is no gradient to mask",
}
"""What a neuron can do in sparse mode."""


def legend(modes: Collection[str], ways: Collection[str]) -> list[tuple[str, str]]:
    """``(word, meaning)`` of the modes, and of the ways of running, that a report shows."""
    words = [(word, meaning) for word, meaning in MODES.items() if word in modes]
    return [*words, *((f"ran {way}", meaning) for way, meaning in WAYS.items() if way in ways)]


def next_step(mode: str, reason: str, ran: Mapping[str, int], *, last: bool) -> str:
    """What a user can do for this module; empty where nothing is left to do, or nothing is known yet.

    Args:
        mode: one of :data:`MODES`.
        reason: why it is not fused, or why its last steps were not.
        ran: its calls by way of running.
        last: whether it is the last layer, which keeps the exact gradient in ``unroll`` on purpose.
    """
    fused, stepped = ran.get("fused", 0), sum(ran.get(way, 0) for way in STEPPED)
    if mode == "masked" and "is none of" in reason:
        return (
            "if its spike function depends on nothing but x, declare it: "
            'spike_grad=Surrogate("custom", function=f)'
        )
    if mode == "masked" and ("it overrides" in reason or "in no fused family" in reason):
        return "its own code runs every step; write its equations (snn_sparse_plugin.Equations) to fuse it"
    if mode == "masked":
        return "time is upstream's here; `snn-sparse supported` lists which options fuse"
    if mode == "fused" and stepped and not fused:
        return _STEPS.get(reason, f"its steps did not fuse: {reason}")
    if not last and ran.get("guard", 0) > (fused + stepped) / 2:
        return "too few neurons were near threshold for the window: a larger backprop_threshold, or None"
    return ""


_STEPS = {
    "called step by step": "collect what each step returns and read it after the loop, or use unroll",
    "only unroll runs it fused": "run the network with unroll(net, x)",
    "fuse_time=False": "leave fuse_time at True",
}
