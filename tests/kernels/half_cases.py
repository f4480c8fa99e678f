"""float16 and bfloat16 as a device reads and writes them: no float32 copy of what comes and leaves."""

import pytest
import torch

from snn_sparse_plugin import SpikeTrain
from snn_sparse_plugin.core.dynamics import NeuronParams, NeuronSpec
from snn_sparse_plugin.core.surrogates import Surrogate
from snn_sparse_plugin.ops import spiking_layer

T, B, M, N = 37, 3, 40, 33
SPECS = {
    "leaky": NeuronSpec(),
    "synapse": NeuronSpec(synapse=True, reset="zero"),
    "euler": NeuronSpec("euler", synapse=True, reset="value", timing="immediate"),
    "readout": NeuronSpec(spiking=False, reset="none"),
}


def close(found, expected, half, name):
    assert found.dtype == half
    scale = expected.abs().max().clamp(min=1e-3)
    assert (found.float() - expected).abs().max() <= 2 * torch.finfo(half).eps * scale, name


BOTH = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
HALVES = pytest.mark.parametrize(
    "half", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["fp16", "bf16"]
)


class HalfTests:
    device = "cpu"

    def both(self, half, spec, form="dense", recurrent=False, current=False, window=0.4, **options):
        """Spikes, membranes, states and gradients in half, and of the same numbers in float32 on the CPU's backend."""
        generator = torch.Generator().manual_seed(0)
        x = (torch.rand(T, B, N if current else M, generator=generator) < 0.2).float()
        if form == "graded" or current:
            x = x * torch.randint(1, 3, x.shape, generator=generator) / 2
        weight = torch.randint(-8, 9, (N, M), generator=generator) / 8
        bias = torch.randint(-2, 3, (N,), generator=generator) / 8
        own = torch.randint(-2, 3, (N, N), generator=generator) / 16
        params = NeuronParams(mem=0.5, syn=0.5, threshold=1.0)
        arriving = torch.randint(-8, 9, (2, T, B, N), generator=generator) / 8
        found = []
        for backend, device, dtype in (("triton", self.device, half), ("cpu", "cpu", torch.float32)):
            leaves = {"x": x, "weight": weight, "bias": bias, "own": own}
            leaves = {k: v.to(device, dtype).requires_grad_() for k, v in leaves.items()}
            given = leaves["x"]
            if form in ("events", "graded"):
                given = SpikeTrain.from_dense(given, binary=form == "events")
            synapses = () if current else (leaves["weight"], leaves["bias"])
            out = spiking_layer(
                given,
                *synapses,
                spec=spec,
                params=params,
                surrogate=Surrogate("fast_sigmoid", (2.0,)),
                recurrent_weight=leaves["own"] if recurrent else None,
                return_mem=True,
                backend=backend,
                backprop_threshold=window,
                min_active=0,
                **options,
            )
            g_spikes, g_mem = arriving.to(device, out.mem.dtype).unbind()
            outs = [out.mem] if not spec.spiking else [out.spikes, out.mem]
            gs = [g_mem] if not spec.spiking else [g_spikes.to(out.spikes.dtype), g_mem]
            wanted = [leaves["x"], *synapses, *([leaves["own"]] if recurrent else [])]
            grads = torch.autograd.grad(outs, wanted, gs)
            found.append([t.detach().cpu() for t in (out.spikes, out.mem, out.state.v, *grads)])
        return found

    def compare(self, half, found, expected):
        if half is torch.bfloat16 and self.device == "cpu":  # the interpreter cuts bfloat16 off
            assert ((found[1].float() - expected[1]).abs() <= torch.finfo(half).eps * expected[1].abs()).all()
        else:
            assert torch.equal(found[1], expected[1].to(half))
        if not torch.equal(found[0], found[1]):  # a readout's output is its membrane
            assert torch.equal(found[0], expected[0].to(half))
        assert found[2].dtype == torch.float32
        assert torch.equal(found[2], expected[2])
        for k, (a, b) in enumerate(zip(found[3:], expected[3:], strict=True)):
            close(a, b, half, k)

    @HALVES
    @pytest.mark.parametrize("window", [0.4, None], ids=["window", "exact"])
    @pytest.mark.parametrize("name", SPECS)
    def test_every_update(self, half, name, window):
        self.compare(half, *self.both(half, SPECS[name], window=window))

    @HALVES
    @pytest.mark.parametrize("form", ["events", "graded"])
    def test_events(self, half, form):
        self.compare(half, *self.both(half, SPECS["leaky"], form))

    @BOTH
    def test_a_current(self, half):
        self.compare(half, *self.both(half, SPECS["synapse"], current=True))

    @HALVES
    @pytest.mark.parametrize("window", [0.4, None], ids=["window", "exact"])
    def test_a_recurrence(self, half, window):
        self.compare(half, *self.both(half, SPECS["leaky"], recurrent=True, window=window))

    @HALVES
    def test_the_backend_gets_no_copies(self, half):
        from snn_sparse_plugin.backends.triton import TritonBackend

        seen = []
        forward = TritonBackend.spiking_layer
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                TritonBackend, "spiking_layer", lambda self, call: seen.append(call) or forward(self, call)
            )
            self.both(half, SPECS["leaky"])
        (call,) = seen
        assert call.dense.dtype == call.weight.dtype == call.out_dtype == half
        assert call.v0.dtype == call.params.dtype == torch.float32
