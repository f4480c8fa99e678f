"""Train the convolutional network of snnTorch's tutorial 7 on N-MNIST and compare accuracy, time and memory: by its own
loop, by the same loop in sparse mode, by Norse, by the same network of Norse in sparse mode, and by SpikingJelly.

    python examples/nmnist_conv.py --data FOLDER --method sparse snntorch norse spikingjelly

FOLDER, or the environment variable NMNIST, holds the Train and Test folders or their .zip files. Each method is trained
in a process of its own, so that its memory is its own; all start from the same weights and see the same batches. Sparse
mode cuts the gradient far from threshold; --exact does not.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from snn_sparse_plugin import sparse_mode
from snn_sparse_plugin.data import load_spikes, loader

METHODS = ("sparse", "snntorch", "sparse-norse", "norse", "spikingjelly")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, default=os.environ.get("NMNIST"), help="folder of the recordings")
parser.add_argument("--method", nargs="+", default=["sparse", "snntorch"], choices=METHODS)
parser.add_argument("--exact", action="store_true", help="sparse mode with the whole gradient")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--samples", type=int, default=0, help="training recordings; 0 is all")
parser.add_argument("--steps", type=int, default=100, help="T, of 3 ms each")
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--channels", nargs=2, type=int, default=[12, 32])
parser.add_argument("--beta", type=float, default=0.9)
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--threads", type=int, default=0)
parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)


def layers(args):
    """Convolutions, pools and the linear layer; larger at the start than torch's, as N-MNIST has few events."""
    torch.manual_seed(args.seed)
    first, second = args.channels
    found = [nn.Conv2d(2, first, 5), nn.Conv2d(first, second, 5), nn.Linear(second * 5 * 5, 10)]
    with torch.no_grad():
        for layer in found[:2]:
            layer.weight *= 2
    return found


class SnnTorch(nn.Module):
    """As the tutorial writes it: a loop over steps. Sparse mode runs it as it is."""

    def __init__(self, args):
        super().__init__()
        import snntorch as snn
        from snntorch import surrogate

        self.conv1, self.conv2, self.fc = layers(args)
        grad = surrogate.fast_sigmoid(slope=25)
        self.lif1, self.lif2, self.lif3 = (snn.Leaky(beta=args.beta, spike_grad=grad) for _ in range(3))

    def forward(self, x):
        mem1, mem2, mem3 = self.lif1.reset_mem(), self.lif2.reset_mem(), self.lif3.reset_mem()
        total = 0
        for t in range(len(x)):
            spk1, mem1 = self.lif1(F.max_pool2d(self.conv1(x[t]), 2), mem1)
            spk2, mem2 = self.lif2(F.max_pool2d(self.conv2(spk1), 2), mem2)
            spk3, mem3 = self.lif3(self.fc(spk2.flatten(1)), mem3)
            total = total + spk3
        return total


def norse_network(args):
    import norse.torch as norse

    conv1, conv2, fc = layers(args)
    p = norse.LIFParameters(
        tau_syn_inv=torch.tensor(1000.0),
        tau_mem_inv=torch.tensor(1000 * (1 - args.beta)),
        alpha=torch.tensor(25.0),
    )
    with torch.no_grad():  # of Norse's membrane, 1 - beta of the current
        for layer in (conv1, conv2, fc):
            layer.weight /= 1 - args.beta
            layer.bias /= 1 - args.beta
    net = norse.SequentialState(
        *(norse.Lift(nn.Sequential(conv1, nn.MaxPool2d(2))), norse.LIF(p)),
        *(norse.Lift(nn.Sequential(conv2, nn.MaxPool2d(2))), norse.LIF(p)),
        *(nn.Flatten(2), fc, norse.LIF(p)),
    )
    return net, lambda x: net(x)[0].sum(0)


def spikingjelly_network(args):
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    conv1, conv2, fc = layers(args)

    def lif():
        return neuron.LIFNode(
            tau=1 / (1 - args.beta),
            decay_input=False,
            v_reset=None,
            detach_reset=True,
            surrogate_function=surrogate.SoftSign(alpha=25.0),
            step_mode="m",
        )

    net = nn.Sequential(
        *(layer.SeqToANNContainer(conv1, nn.MaxPool2d(2)), lif()),
        *(layer.SeqToANNContainer(conv2, nn.MaxPool2d(2)), lif()),
        *(nn.Flatten(2), fc, lif()),
    )

    def counts(x):
        functional.reset_net(net)
        return net(x).sum(0)

    return net, counts


def network(method, args):
    """-> the parameters' owner, and the spike counts (B, 10) of an input (T, B, 2, 34, 34)."""
    if method == "spikingjelly":
        return spikingjelly_network(args)
    if "norse" in method:
        net, counts = norse_network(args)
    else:
        net = counts = SnnTorch(args)
    if not method.startswith("sparse"):
        return net, counts

    def sparse(x):
        with sparse_mode(**({"backprop_threshold": None} if args.exact else {})):
            return counts(x)

    return net, sparse


def memory_in_use():
    """In MiB; what was in use before no longer counts for the high-water mark."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as control:
        control.write("5")
    return status("VmRSS")


def status(field):
    """In MiB, from Linux; elsewhere not a number."""
    with suppress(OSError), open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
    return float("nan")


def train(method, args):
    """Everything of one method, in this process."""
    if args.threads:
        torch.set_num_threads(args.threads)
    data = load_spikes(
        "n-mnist", args.data, steps=args.steps, dt=3e-3, merge_polarity=False, limit=args.samples or None
    )
    net, counts = network(method, args)
    adam = torch.optim.Adam(net.parameters(), lr=args.lr, betas=(0.9, 0.999))
    order = torch.Generator().manual_seed(args.seed)
    size = min(args.batch, len(data.train))

    def dense(x):
        return x.to_dense().view(args.steps, -1, 2, 34, 34)

    x, _ = data.train.batch([0, 1])
    counts(dense(x)).sum().backward()  # compiles kernels and loads libraries
    before, seconds, accuracy = memory_in_use(), [], 0.0
    for epoch in range(args.epochs):
        losses = []
        for x, y in loader(data.train, size, shuffle=True, generator=order, drop_last=True):
            x = dense(x)
            start = time.perf_counter()
            loss = F.cross_entropy(counts(x), y)
            adam.zero_grad()
            loss.backward()
            adam.step()
            seconds.append(time.perf_counter() - start)
            losses.append(float(loss.detach()))
        with torch.no_grad():
            hits = sum(int((counts(dense(x)).argmax(1) == y).sum()) for x, y in loader(data.test, size))
        accuracy = hits / len(data.test)
        print(
            f"{method} epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}, test {100 * accuracy:.1f} %",
            file=sys.stderr,
        )
    ms = 1e3 * sorted(seconds)[len(seconds) // 2]
    return {"accuracy": accuracy, "ms": ms, "mib": status("VmHWM") - before}


def main():
    args = parser.parse_args()
    if args.data is None:
        parser.error(
            "say where the recordings are: --data FOLDER, or NMNIST in the environment. To fetch them: "
            "snn_sparse_plugin.data.load_spikes('n-mnist', FOLDER, download=True)"
        )
    if args.alone:
        print(json.dumps(train(args.method[0], args)))
        return
    print(f"{'method':14}{'test accuracy':>15}{'step, ms':>12}{'memory, MiB':>14}")
    for method in args.method:
        words = [w for w in sys.argv[1:] if w not in METHODS and w != "--method"]
        command = [sys.executable, __file__, *words, "--alone", "--method", method]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(f"{method:14}{100 * found['accuracy']:13.1f} %{found['ms']:12.1f}{found['mib']:14.0f}")


if __name__ == "__main__":
    main()
