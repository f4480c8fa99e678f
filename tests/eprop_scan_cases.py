"""E-prop's scan as a kernel against the loop in torch, the same cases under the interpreter and on a device."""

import pytest
import torch
from helpers import relative

from snn_sparse_plugin.learners.eprop import scan


def problem(states, memory, dtype, device, K=5, B=2, N=9):
    torch.manual_seed(states + 10 * memory)
    local = 0.5 * torch.randn(K, 1 + states, 1 + states, B, N, dtype=dtype, device=device)
    signals = torch.randn(2, K, B, N, dtype=dtype, device=device)
    A = 0.5 * torch.randn(memory, memory, dtype=dtype, device=device)
    b = torch.randn(memory, dtype=dtype, device=device)
    entries = {(r, c): local[:, r, c] for r in range(1 + states) for c in range(1 + states)}
    if states:
        entries[1, 1] = 0.9  # one decay for all neurons
    return scan.Steps(entries, states, *signals), scan.Filter(A, b, memory - 1 if memory else 0)


class ScanTests:
    device: str

    @staticmethod
    def kernel(steps, readout, lanes):
        return scan._on_triton(steps, readout, lanes)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("states", "memory"), [(0, 0), (1, 0), (1, 1), (2, 1), (3, 2)])
    def test_equals_the_loop(self, states, memory, dtype):
        steps, readout = problem(states, memory, dtype, self.device)
        lanes = list(range(states + memory))[:3]
        found = self.kernel(steps, readout, lanes)
        expected = scan.reference(steps, readout, lanes)
        for own, reference in zip(found, expected, strict=True):
            assert own.shape == reference.shape
            assert relative(own, reference) < (1e-6 if dtype == torch.float32 else 1e-14)

    def test_a_step_out_of_order_would_show(self):
        steps, readout = problem(2, 1, torch.float64, self.device)
        found, _ = self.kernel(steps, readout, [])
        late = steps._replace(filtered=steps.filtered.roll(1, 0))
        assert relative(self.kernel(late, readout, [])[0], found) > 1e-2
