"""snnTorch: single Lapicque and Leaky neurons under a step current, one step at a time."""

import torch
from tutorial import Clock, arguments, library, report, sparse

args = arguments(__doc__, epochs=20)
snn = library("snntorch", args.mode)

STEPS = 200
current = torch.cat((torch.zeros(10, 1), torch.ones(STEPS - 10, 1) * 0.3), 0)
lapicque = snn.Lapicque(R=5.1, C=5e-3, time_step=1e-3)
leaky = snn.Leaky(beta=0.8)


def simulate(neuron, inputs):
    mem = torch.zeros(1)
    mem_rec, spk_rec = [], []
    for step in range(STEPS):
        spk, mem = neuron(inputs[step], mem)
        mem_rec.append(mem)
        spk_rec.append(spk)
    return torch.stack(mem_rec), torch.stack(spk_rec)


clock = Clock()
with sparse(args.mode):
    for _ in range(args.epochs):
        mem_a, spk_a = simulate(lapicque, current)
        mem_b, spk_b = simulate(leaky, current)
        spikes = int(spk_a.sum()) + int(spk_b.sum())
        clock.tick(mem_a.mean() + mem_b.mean())
print(f"Lapicque fired {int(spk_a.sum())} times, Leaky {int(spk_b.sum())} times in {STEPS} steps")
report(mem_a.mean() + mem_b.mean(), spikes, clock, unit="spikes")
