"""Train a recurrent network of LIF and adaptive LIF neurons on spoken digits, by e-prop or by backward through time.

    python examples/eprop_shd.py --data FOLDER --method eprop bptt --seeds 0 1 2 --out results/

FOLDER holds shd_train.h5 and shd_test.h5 (or .h5.gz) in the layout of the Spiking Heidelberg Digits. Every epoch is
saved: the same command goes on where it stopped. The picture of all results in --out is drawn at the end.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track

from snn_sparse_plugin import SpikeTrain
from snn_sparse_plugin.data import SpikeFile
from snn_sparse_plugin.learners import eprop

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, help="folder with the two files")
parser.add_argument("--method", nargs="+", default=["eprop"], choices=["eprop", "bptt"])
parser.add_argument("--seeds", nargs="+", type=int, default=[0])
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--hidden", type=int, default=256)
parser.add_argument("--adaptive", type=float, default=1.0, help="share of adaptive neurons")
parser.add_argument("--dt", type=float, default=1.0, help="step in ms")
parser.add_argument("--steps", type=int, default=0, help="T; 0 is 1.4 s")
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--lr", type=float, default=1e-3, help="at the start; falls to 0 as a cosine")
parser.add_argument("--engine", default="chunk", choices=["chunk", "offline", "step"])
parser.add_argument("--chunk", type=int, default=64)
parser.add_argument("--feedback", default="symmetric", choices=["symmetric", "random", "adaptive"])
parser.add_argument(
    "--rate-reg", type=float, default=1e-3, help="strength of the firing-rate term; 0 is none"
)
parser.add_argument(
    "--shift", type=int, default=0, help="training recordings are moved by up to so many channels, at random"
)
parser.add_argument("--limit", type=int, default=0, help="recordings used; 0 is all")
parser.add_argument("--threads", type=int, default=0)
parser.add_argument("--out", type=Path, default=Path("eprop_shd"))

FETCH = "To fetch SHD: snn_sparse_plugin.data.load_spikes('shd', FOLDER, download=True); FOLDER/SHD has the files."


def files(args):
    def one(part):
        found = sorted(args.data.glob(f"shd_{part}.h5*"))
        if not found:
            raise SystemExit(f"no shd_{part}.h5 or shd_{part}.h5.gz in {args.data}. {FETCH}")
        return Binned(SpikeFile(found[0], limit=args.limit), args)

    return one("train"), one("test")


def cross_entropy(y, labels):
    # summed over samples, as the firing-rate term is
    return F.cross_entropy(y, labels, reduction="sum")


class Binned:
    """All recordings of a file in bins, so that a batch is only picked."""

    def __init__(self, file, args):
        self.channels, self.classes = file.channels, int(file.labels.max()) + 1
        parts = [file.batch(i, args.dt / 1000, args.steps) for i in torch.arange(len(file)).split(256)]
        self.T, self.labels = args.steps, torch.cat([labels for _, labels in parts])
        # of one recording after the other: where each step's spikes begin, and their channels
        ends, offset = [torch.zeros(1, dtype=torch.int64)], 0
        for train, _ in parts:
            ends.append(train.indptr[1:].long() + offset)
            offset += int(train.indptr[-1])
        self.ends, self.units = torch.cat(ends), torch.cat([train.indices for train, _ in parts])

    def __len__(self):
        return len(self.labels)

    def batch(self, index, shifts=None):
        """Recordings as spikes (T, B, channels), each moved by its number of channels, and their labels."""
        pieces, counts = [], []
        for k, i in enumerate(index.tolist()):
            ends = self.ends[i * self.T : (i + 1) * self.T + 1]
            units, sizes = self.units[ends[0] : ends[-1]], ends.diff()
            if shifts is not None:
                units = units + shifts[k]
                inside = (units >= 0) & (units < self.channels)
                before = F.pad(inside.cumsum(0), (1, 0))[ends - ends[0]]
                units, sizes = units[inside], before.diff()
            pieces.append(units)
            counts.append(sizes)
        indptr = F.pad(torch.cat(counts).cumsum(0), (1, 0))
        shape = (self.T, len(index), self.channels)
        return SpikeTrain(indptr.int(), torch.cat(pieces).int(), shape), self.labels[index]


def backward_through_time(net, x, labels, rate):
    """Gradients by ordinary backward -> the loss without its firing-rate term, spikes per neuron and step."""
    outputs, spikes, _ = net.unroll(x)
    loss = cross_entropy(outputs.flatten(0, 1), labels.repeat(x.T))
    total = loss
    if rate is not None:
        push, running = [], None
        for z in spikes.detach():
            running = rate.follow(running, z)
            push.append(rate.c * (running - rate.target))
        total = loss + (torch.stack(push) * spikes).sum()
    total.backward()
    return loss.item(), spikes.detach().mean().item()


def train_batch(net, learner, x, labels, rate):
    """Gradients of one batch -> loss and spike rate."""
    if learner is None:
        return backward_through_time(net, x, labels, rate)
    result = learner.run(x, cross_entropy, labels)
    return result.loss, next(iter(result.spikes.values()))


@torch.no_grad()
def accuracy(net, data):
    right = 0
    for index in torch.arange(len(data)).split(128):
        x, labels = data.batch(index)
        right += (net.unroll(x)[0].softmax(-1).sum(0).argmax(1) == labels).sum().item()
    return right / len(data)


def train(method, seed, data, test, args):
    name = f"{method}-{seed}"
    log, saved = args.out / f"{name}.json", args.out / f"{name}.pt"
    torch.manual_seed(seed)
    net = eprop.LSNNNetwork(data.channels, args.hidden, data.classes, adaptive=args.adaptive, dt=args.dt)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    rate = eprop.FiringRate(c=args.rate_reg, dt=args.dt) if args.rate_reg else None
    epochs = json.loads(log.read_text())["epochs"] if log.exists() and saved.exists() else []
    if epochs:
        checkpoint = torch.load(saved, weights_only=False)
        net.load_state_dict(checkpoint["net"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        epochs = epochs[: checkpoint["epoch"]]
    learner = None
    if method == "eprop":
        generator = torch.Generator().manual_seed(seed)
        learner = eprop.EProp(
            net,
            engine=args.engine,
            chunk=args.chunk,
            rate_reg=rate,
            feedback=args.feedback,
            generator=generator,
        )
        learner.__enter__()
        if epochs:
            learner.load_state_dict(checkpoint["learner"])  # feedback
    for epoch in range(len(epochs), args.epochs):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 + math.cos(math.pi * epoch / args.epochs)) / 2
        draw = torch.Generator().manual_seed(1000 * seed + epoch)  # the same for both methods
        order = torch.randperm(len(data), generator=draw)
        shifts = torch.randint(-args.shift, args.shift + 1, (len(data),), generator=draw)
        begin, losses, activity = time.perf_counter(), 0.0, 0.0
        batches = order.split(args.batch)
        for index in track(batches, f"{name} epoch {epoch + 1}"):
            x, labels = data.batch(index, shifts[index] if args.shift else None)
            optimizer.zero_grad()
            loss, spikes = train_batch(net, learner, x, labels, rate)
            optimizer.step()
            losses += loss / len(data) / args.steps
            activity += spikes / len(batches)
        seconds = time.perf_counter() - begin
        row = {"loss": losses, "accuracy": accuracy(net, test), "spikes": activity, "seconds": seconds}
        epochs.append(row)
        kept = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        kept["learner"] = None if learner is None else learner.state_dict()
        print(
            f"{name} epoch {epoch + 1}: loss {losses:.3f}, test accuracy {100 * row['accuracy']:.1f} %, "
            f"{100 * activity:.2f} % spikes per neuron and step, {seconds:.0f} s"
        )
        args.out.mkdir(parents=True, exist_ok=True)
        options = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str)}
        torch.save(kept, saved)
        log.write_text(json.dumps({"method": method, "seed": seed, "options": options, "epochs": epochs}))
    if learner is not None:
        learner.__exit__(None, None, None)


def draw(folder):
    """All results of a folder: accuracy and spikes over epochs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    named = set()
    for log in sorted(folder.glob("*.json")):
        run = json.loads(log.read_text())
        color = {"eprop": "tab:blue", "bptt": "tab:orange"}[run["method"]]
        label = None if run["method"] in named else run["method"]
        named.add(run["method"])
        steps = range(1, len(run["epochs"]) + 1)
        left.plot(steps, [100 * e["accuracy"] for e in run["epochs"]], color=color, label=label)
        right.plot(steps, [100 * e["spikes"] for e in run["epochs"]], color=color, label=label)
    left.set(xlabel="epoch", ylabel="test accuracy (%)")
    right.set(xlabel="epoch", ylabel="spikes per neuron and step (%)")
    left.legend()
    figure.savefig(folder / "accuracy.png", dpi=150)
    print(f"picture: {folder / 'accuracy.png'}")


if __name__ == "__main__":
    args = parser.parse_args()
    if args.data is None:
        parser.error(f"say where the recordings are: --data FOLDER. {FETCH}")
    args.steps = args.steps or round(1400 / args.dt)
    if args.threads:
        torch.set_num_threads(args.threads)
    data, test = files(args)
    for seed in args.seeds:
        for method in args.method:
            train(method, seed, data, test, args)
    draw(args.out)
