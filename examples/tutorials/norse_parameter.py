"""Norse: the time constant of a single LIF neuron, below its threshold, learned from a voltage trace."""

import torch
import torch.nn.functional as F
from tutorial import Clock, arguments, library, report, sparse

args = arguments(__doc__, epochs=60)
norse = library("norse.torch", args.mode)
STEPS = 100


def trace(tau_mem_inv, current):
    """The membrane (T, 1, 1) of a neuron with this inverse time constant."""
    cell = norse.LIFCell(norse.LIFParameters(tau_mem_inv=tau_mem_inv, v_th=torch.tensor(2.0)))
    state, voltages = None, []
    for step in current:
        _, state = cell(step, state)
        voltages.append(state.v)
    return torch.stack(voltages)


current = (torch.rand(STEPS, 1, 1) < 0.2).float()
with torch.no_grad():
    wanted = trace(torch.tensor(220.0), current)
log_tau, clock = torch.tensor(120.0).log().requires_grad_(), Clock()
optimizer = torch.optim.Adam([log_tau], lr=0.05)
with sparse(args.mode):
    for _ in range(args.epochs):
        loss = 1000 * F.mse_loss(trace(log_tau.exp(), current), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clock.tick(loss)
found = log_tau.exp().item()
print(f"1 / tau_mem = {found:.1f} (wanted 220)")
report(loss, found, clock, unit="1 / tau_mem in 1/s")
