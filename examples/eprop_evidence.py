"""Evidence accumulation (Bellec et al. 2020): which side showed more cues? The answer is asked for after a pause.

Adaptive neurons bridge the pause; there is a loss only in the last steps.

python examples/eprop_evidence.py --iterations 150
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track

from snn_sparse_plugin.learners import eprop

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--iterations", type=int, default=150)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--cues", type=int, default=5)
parser.add_argument("--pause", type=int, default=100, help="steps between the last cue and the question")
parser.add_argument("--method", default="eprop", choices=["eprop", "bptt"])
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--picture", type=Path, default=Path("eprop_evidence.png"))
CUE, GAP, ASK, GROUP = 20, 10, 20, 10  # steps of a cue, between cues and of the question; channels of a group
IGNORED = -100


def trials(batch, cues, pause):
    """Spikes (T, B, 4 groups: left, right, question, noise), and the answer at every step, (T, B)."""
    T = cues * (CUE + GAP) + pause + ASK
    right = torch.rand(cues, batch) < 0.5
    rate = torch.zeros(T, batch, 4, GROUP)
    for k in range(cues):
        window = slice(k * (CUE + GAP), k * (CUE + GAP) + CUE)
        rate[window, :, 0] = 0.2 * (~right[k]).float()[:, None]
        rate[window, :, 1] = 0.2 * right[k].float()[:, None]
    rate[-ASK:, :, 2] = 0.2
    rate[:, :, 3] = 0.02
    answer = torch.full((T, batch), IGNORED)
    answer[-ASK:] = (right.sum(0) > cues / 2).long()
    return torch.bernoulli(rate).flatten(2), answer


def loss_fn(y, answer):
    return F.cross_entropy(y, answer, ignore_index=IGNORED, reduction="sum") / len(y)


def backward_through_time(net, x, answers):
    state, total, late = None, 0.0, 0.0
    for now, answer in zip(x, answers, strict=True):
        y, state = net(now, state)
        total = total + loss_fn(y, answer)
        late = late + y.detach() * (answer[0] != IGNORED)
    total.backward()
    return late


def main():
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    net = eprop.LSNNNetwork(4 * GROUP, 100, 2, adaptive=0.5, tau_a=500.0, beta=0.05)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    learner, right = eprop.EProp(net), []
    for _ in track(range(args.iterations), args.method):
        x, answers = trials(args.batch, args.cues, args.pause)
        optimizer.zero_grad()
        if args.method == "eprop":
            with learner:
                outputs = learner.run(x, loss_fn, answers, per_step=True, keep_outputs=True).outputs
            late = outputs[-ASK:].sum(0)
        else:
            late = backward_through_time(net, x, answers)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        right.append((late.argmax(1) == answers[-1]).float().mean().item())
    last = sum(right[-20:]) / len(right[-20:])
    print(f"{args.method}: {100 * last:.1f} % right over the last {len(right[-20:])} batches")
    draw(args.picture, right, args.method)


def draw(path, right, method):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.plot([100 * r for r in right], label=method)
    axes.axhline(50, color="grey", linestyle=":")
    axes.set(xlabel="iteration", ylabel="right answers (%)")
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
