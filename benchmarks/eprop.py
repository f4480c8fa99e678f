"""E-prop against backward through time: time per step, memory over T, and the gradient's error.

    python benchmarks/eprop.py --threads 2 --rounds 5 --steps 1000 --json results/eprop.json
    python benchmarks/eprop.py --models --rounds 3 --json results/eprop_models.json

256 neurons, half of them adaptive, recurrent, 700 inputs at 2 %, B = 32, cross entropy at every step. All providers
run in one process in alternating rounds; memory is that of fresh processes. Use a quiet machine.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import norse.torch as norse
import numpy as np
import snntorch
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import snn_sparse_plugin
from snn_sparse_plugin import SpikeTrain
from snn_sparse_plugin.bench.peak import _reset_high_water_mark, _return_free_memory, _status
from snn_sparse_plugin.learners import eprop

M, N, C = 700, 256, 20
BPTT = "backward through time, step loop"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=1000, help="T of the timed rounds")
parser.add_argument("--memory", type=int, nargs="*", default=[100, 1000, 5000], help="T of the memory rows")
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--density", type=float, default=0.02)
parser.add_argument("--chunk", type=int, default=64)
parser.add_argument(
    "--models",
    nargs="*",
    metavar="NAME",
    help="instead: the step loop of unmodified snnTorch and Norse models, these or all",
)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument(
    "--cpu-time", action="store_true", help="time of the processor, for a machine that is not quiet"
)
parser.add_argument("--device", default="cpu", help="cuda: the timed rounds alone, and the gradient's error")
parser.add_argument("--json", help="also write the rows to this file")
parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)


def loss_fn(y, labels):
    return F.cross_entropy(y, labels)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return eprop.LSNNNetwork(M, N, C, adaptive=0.5).to(dtype)


def block(T, args, dtype=torch.float32):
    return (torch.rand(T, args.batch, M) < args.density).to(dtype)


def blocks(T, args):
    """Input that is made as it is used, so that it takes no memory."""
    for start in range(0, T, args.chunk):
        yield block(min(args.chunk, T - start), args)


def backward_through_time(net, x, labels):
    state, total = None, 0.0
    for part in x:
        for now in part.unbind(0):
            y, state = net(now, state)
            total = total + loss_fn(y, labels)
    total.backward()


def step_loop(learner, net, x, labels):
    learner.reset()
    state = None
    for now in x.unbind(0):
        y, state = net(now, state)
        learner.step(loss_fn(y, labels))
    learner.flush()


@torch.no_grad()
def textbook(net, x, labels):
    """The rule as it is written, for this network alone and in place: every trace of every synapse at every step."""
    layer, readout = net.layers[0], net.readout
    B, low = x.shape[1], N - layer.adaptive
    pre_trace = x.new_zeros(B, M + N)
    eps, e, e_bar = x.new_zeros(B, layer.adaptive, M + N), x.new_zeros(B, N, M + N), x.new_zeros(B, N, M + N)
    grad, out_trace = x.new_zeros(N, M + N), x.new_zeros(B, N)
    out_grad, bias_trace, bias_grad = x.new_zeros(C, N), 0.0, x.new_zeros(C)
    betas, wanted = layer.betas[low:, None], F.one_hot(labels, C)
    state = (*layer.initial_state(x[0]),)
    y = x.new_zeros(B, C)
    for now in x.unbind(0):
        z, v, a, left = state
        pre_trace.mul_(layer.alpha).add_(torch.cat([now, z], 1))
        v = layer.alpha * v + F.linear(now, layer.input_weights) + F.linear(z, layer.recurrent_weights)
        v -= layer.v_th * z
        distance = (v - layer.v_th - layer.betas * a) / layer.v_th
        psi = layer.surrogate.grad(distance) / layer.v_th * (left == 0)
        z = (distance > 0) * (left == 0).to(x.dtype)
        state = z, v, layer.rho * a + z, torch.where(z > 0, float(layer.refractory), (left - 1).clamp(min=0))
        e.copy_(pre_trace.unsqueeze(1).expand_as(e))
        e[:, low:].addcmul_(eps, betas, value=-1)
        e.mul_(psi.unsqueeze(-1))
        eps.mul_(layer.rho).add_(e[:, low:])
        e_bar.mul_(readout.kappa).add_(e)
        out_trace.mul_(readout.kappa).add_(z)
        bias_trace = readout.kappa * bias_trace + 1
        y = readout.kappa * y + readout.linear(z)
        error = (y.softmax(-1) - wanted) / B
        signal = error @ readout.linear.weight
        grad += torch.einsum("bn,bnm->nm", signal, e_bar)
        out_grad += error.T @ out_trace
        bias_grad += bias_trace * error.sum(0)
    grads = grad[:, :M], grad[:, M:].clone().fill_diagonal_(0), out_grad, bias_grad
    for p, g in zip(net.parameters(), grads, strict=True):
        p.grad = g.clone() if p.grad is None else p.grad + g


def providers(args):
    """Name -> a training step without the optimizer, for a dense input (T, B, M) and its events."""
    labels = torch.randint(0, C, (args.batch,))

    def ran():
        net = network()
        learner = eprop.EProp(net, chunk=args.chunk)

        def run(x):
            with learner:
                learner.run(x, loss_fn, labels)

        return net, run

    events, dense = ran(), ran()
    hooked, bptt, plain = network(), network(), network()

    watching = eprop.EProp(hooked, chunk=args.chunk)

    def loop(x):
        with watching:
            step_loop(watching, hooked, x, labels)

    return {
        "e-prop, run() of events": (events[0], lambda x, train: events[1](train), 1),
        "e-prop, run() of dense input": (dense[0], lambda x, train: dense[1](x), 1),
        "e-prop, step loop with hooks": (hooked, lambda x, train: loop(x), 10),
        BPTT: (
            bptt,
            lambda x, train: backward_through_time(bptt, [x], labels),
            1,
        ),
        "e-prop, textbook rule": (plain, lambda x, train: textbook(plain, x, labels), 10),
    }  # the last number: how many times fewer steps it is timed over


class TwoLayers(torch.nn.Module):
    """Linear, a neuron of snnTorch, Linear, a leaky integrator."""

    def __init__(self, hidden):
        super().__init__()
        self.fc1, self.hidden, self.fc2 = torch.nn.Linear(M, N), hidden, torch.nn.Linear(N, C)
        self.out = snntorch.Leaky(beta=0.95, reset_mechanism="none")

    def forward(self, x, state=None):
        if state is None:
            self.hidden.reset_mem(), self.out.reset_mem()
        first, second = ((), ()) if state is None else state
        given = self.hidden(self.fc1(x), *first)
        first = given if hasattr(self.hidden, "recurrent") else given[1:]
        _, mem = self.out(self.fc2(given[0]), *second)
        return mem, (first, (mem,))


def unmodified(args):
    """Two providers for every model: e-prop by hooks, and ordinary backward through time."""
    lif, lsnn = (p(v_th=torch.tensor(0.3)) for p in (norse.LIFParameters, norse.LSNNParameters))

    def norse_net(*layers):
        return norse.SequentialState(*layers, torch.nn.Linear(N, C), norse.LICell())

    models = {
        "eprop.LSNNNetwork": network,
        "snntorch.Leaky": lambda: TwoLayers(snntorch.Leaky(beta=0.95)),
        "snntorch.Synaptic": lambda: TwoLayers(snntorch.Synaptic(alpha=0.9, beta=0.95)),
        "snntorch.RLeaky": lambda: TwoLayers(snntorch.RLeaky(beta=0.95, linear_features=N)),
        "snntorch.RSynaptic": lambda: TwoLayers(snntorch.RSynaptic(alpha=0.9, beta=0.95, linear_features=N)),
        "norse.LIFCell": lambda: norse_net(torch.nn.Linear(M, N), norse.LIFCell(p=lif)),
        "norse.LIFRecurrentCell": lambda: norse_net(norse.LIFRecurrentCell(M, N, p=lif)),
        "norse.LSNNRecurrentCell": lambda: norse_net(norse.LSNNRecurrentCell(M, N, p=lsnn)),
    }
    labels = torch.randint(0, C, (args.batch,))
    cases = {}
    for name, make in models.items():
        if args.models and name not in args.models:
            continue
        torch.manual_seed(0)
        net = make()
        learner = eprop.EProp(net, chunk=args.chunk)

        def loop(x, _, net=net, learner=learner):
            with learner:
                step_loop(learner, net, x, labels)

        cases[f"{name}, e-prop"] = net, loop, 1
        cases[f"{name}, backward"] = net, lambda x, _, net=net: backward_through_time(net, [x], labels), 1
    return cases


def finished(args):
    if args.device != "cpu":
        torch.cuda.synchronize()


def timed(args, make=providers):
    x = block(args.steps, args)
    cases = make(args)
    seconds = {name: [] for name in cases}
    inputs = {}
    for name, (_, _, fewer) in cases.items():
        part = x[: max(args.chunk, args.steps // fewer)]
        inputs[name] = part, SpikeTrain.from_dense(part, binary=True)
    clock = time.process_time if args.cpu_time else time.perf_counter
    for r in range(args.rounds + 1):  # the first compiles kernels
        names = list(cases)
        for name in names[r % len(names) :] + names[: r % len(names)]:
            net, step, _ = cases[name]
            net.zero_grad()
            finished(args)
            begin = clock()
            step(*inputs[name])
            finished(args)
            if r:
                seconds[name].append((clock() - begin) / len(inputs[name][0]))
    rows = []
    for name in cases:
        p20, median, p80 = np.percentile(np.array(seconds[name]) * 1e3, [20, 50, 80])
        rows.append({"provider": name, "ms_per_step": median, "p20": p20, "p80": p80})
    spent = {row["provider"]: row["ms_per_step"] for row in rows}
    for row in rows:
        own = f"{row['provider'].partition(',')[0]}, backward"  # of the same model, where there are several
        row["of_bptt"] = row["ms_per_step"] / spent.get(own, spent.get(BPTT, float("nan")))
    return rows


def peak(provider, T, args):
    """Bytes beyond what was there before, in this process."""
    net, labels = network(), torch.randint(0, C, (args.batch,))

    def train(T):
        if provider == "bptt":
            backward_through_time(net, blocks(T, args), labels)
        else:
            with eprop.EProp(net, chunk=args.chunk) as learner:
                learner.run(blocks(T, args), loss_fn, labels)

    train(3)  # compiles kernels, loads libraries
    _return_free_memory()
    if not _reset_high_water_mark():
        return None
    before = _status("VmRSS")
    train(T)
    return _status("VmHWM") - before


def memory(args):
    rows = []
    for T in args.memory:
        for provider in ("eprop", "bptt"):
            own = [
                "--batch",
                args.batch,
                "--density",
                args.density,
                "--chunk",
                args.chunk,
                "--threads",
                args.threads,
            ]
            command = [sys.executable, __file__, *map(str, own), "--child", provider, str(T)]
            # else malloc would keep some of what is freed, more in one process than in another
            env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
            out = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
            found = json.loads(out.stdout.splitlines()[-1])
            rows.append({"provider": provider, "T": T, "peak_bytes": found})
    return rows


def errors(args, T=100):
    """Relative norm of the difference to ordinary backward of the detached network."""
    rows = []
    for dtype in (torch.float32, torch.float64):
        net, x, labels = network(dtype), block(T, args, dtype), torch.randint(0, C, (args.batch,))
        with eprop.detached(net):
            backward_through_time(net, [x], labels)
        expected = torch.cat([p.grad.flatten() for p in net.parameters()])
        net.zero_grad()
        with eprop.EProp(net, chunk=args.chunk) as learner:
            learner.run(x, loss_fn, labels)
        found = torch.cat([p.grad.flatten() for p in net.parameters()])
        net.zero_grad()
        textbook(net, x, labels)
        other = torch.cat([p.grad.flatten() for p in net.parameters()])
        size = expected.norm()
        row = {"dtype": str(dtype), "T": T, "run()": float((found - expected).norm() / size)}
        rows.append(row | {"textbook": float((other - expected).norm() / size)})
    return rows


def show(rows, title):
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


def main():
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device != "cpu":
        torch.set_default_device(args.device)
        args.memory = []
    if args.child:
        print(json.dumps(peak(args.child[0], int(args.child[1]), args)))
        return
    result = {
        "options": {k: v for k, v in vars(args).items() if k not in ("child", "json", "models", "memory")},
        "versions": {"torch": torch.__version__, "snn_sparse_plugin": snn_sparse_plugin.__version__},
    }
    if args.models is not None:
        rows = timed(args, unmodified)
        show(rows, f"step loops, T = {args.steps}, B = {args.batch}, {args.threads} threads")
        if args.json:
            write(args.json, result | {"time": kept(args.json, result, rows) + rows})
        return
    result |= {
        "time": timed(args),
        "memory": memory(args),
        "error": errors(args),
    }
    show(
        result["time"], f"{M} inputs, {N} neurons, T = {args.steps}, B = {args.batch}, {args.threads} threads"
    )
    if result["memory"]:
        show(result["memory"], "peak memory")
    show(result["error"], "gradient against detached backward")
    if args.json:
        write(args.json, result)


def kept(path, result, rows):
    """Rows of other models that a file holds, measured in the same way."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        before = json.load(file)
    if any(before[key] != result[key] for key in ("options", "versions")):
        return []
    now = {row["provider"] for row in rows}
    return [row for row in before["time"] if row["provider"] not in now]


def write(path, result):
    with open(path, "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
