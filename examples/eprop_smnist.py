"""Read digits pixel by pixel: scikit-learn's 8x8 digits, or MNIST from idx files, as sequences of spikes.

    python examples/eprop_smnist.py --epochs 20
    python examples/eprop_smnist.py --data mnist --root FOLDER --epochs 5

A pixel is one step and one spike, on the channel of its brightness; the class is asked for after the last pixel.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track

from snn_sparse_plugin.data import load_images
from snn_sparse_plugin.learners import eprop

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="digits", choices=["digits", "mnist", "fashion-mnist"])
parser.add_argument("--root", type=Path, help="folder of the idx files")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--hidden", type=int, default=128)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--samples", type=int, default=0, help="training images; 0 is all")
parser.add_argument("--method", default="eprop", choices=["eprop", "bptt"])
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--picture", type=Path, default=Path("eprop_smnist.png"))
LEVELS, ASK, IGNORED = 16, 10, -100


def sequence(images, labels):
    """Spikes (T, B, 17): the channel of each pixel's brightness, the last channel while the class is asked for."""
    level = (images * (LEVELS - 1)).round().long().T
    spikes = F.one_hot(level, LEVELS + 1).float()
    question = F.one_hot(torch.full((ASK, len(images)), LEVELS), LEVELS + 1).float()
    asked = torch.full((len(level), len(images)), IGNORED)
    return torch.cat([spikes, question]), torch.cat([asked, labels.expand(ASK, -1)])


def loss_fn(y, labels):
    return F.cross_entropy(y, labels, ignore_index=IGNORED, reduction="sum") / len(y)


def outputs(net, x):
    state, found = None, []
    for now in x:
        y, state = net(now, state)
        found.append(y)
    return torch.stack(found)


@torch.no_grad()
def accuracy(net, images, labels):
    right = 0
    for index in torch.arange(len(labels)).split(256):
        x, _ = sequence(images[index], labels[index])
        right += (outputs(net, x)[-ASK:].sum(0).argmax(1) == labels[index]).sum().item()
    return right / len(labels)


def main():
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    data = load_images(args.data, args.root).limited(args.samples)
    net = eprop.LSNNNetwork(
        LEVELS + 1, args.hidden, data.classes, adaptive=0.5, tau_a=float(data.pixels), beta=0.1
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    learner, right = eprop.EProp(net), []
    for epoch in range(args.epochs):
        losses, spikes = 0.0, 0.0
        batches = torch.randperm(len(data.train_y)).split(args.batch)
        for index in track(batches, f"epoch {epoch + 1}"):
            x, labels = sequence(data.train_x[index], data.train_y[index])
            optimizer.zero_grad()
            if args.method == "eprop":
                with learner:
                    result = learner.run(x, loss_fn, labels, per_step=True)
                losses += result.loss / len(batches)
                spikes += sum(result.spikes.values()) / len(batches)
            else:
                total = sum(loss_fn(y, now) for y, now in zip(outputs(net, x), labels, strict=True))
                total.backward()
                losses += total.item() / len(batches)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        right.append(accuracy(net, data.test_x, data.test_y))
        activity = f", {100 * spikes:.1f} % spikes per neuron and step" if spikes else ""
        print(f"epoch {epoch + 1}: loss {losses:.3f}, test accuracy {100 * right[-1]:.1f} %{activity}")
    draw(args.picture, right)


def draw(path, right):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.plot(range(1, len(right) + 1), [100 * r for r in right])
    axes.set(xlabel="epoch", ylabel="test accuracy (%)")
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
