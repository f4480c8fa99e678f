# ruff: noqa: RUF059, users name what they do not use
"""Small programs as users write them: each a loop over steps that returns a loss and what it saw.

``program(lib, net, x, y)`` gets the library to build from (upstream's or a face), its own freshly built network,
the input (T, B, M) and labels, and returns ``(outputs, loss)``; a loss of None means that the program ran backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T, B, M, H, N = 7, 4, 12, 10, 5

Program = Callable[[nn.Module, Tensor, Tensor], tuple[list[Tensor], Tensor | None]]


class Entry:
    def __init__(self, build: Callable[[Any], nn.Module], program: Program, needs: str) -> None:
        self.build, self.program, self.needs = build, program, needs


ZOO: dict[str, Entry] = {}


def entry(build: Callable[[Any], nn.Module], needs: str = "snntorch") -> Callable[[Program], Program]:
    def add(program: Program) -> Program:
        ZOO[program.__name__] = Entry(build, program, needs)
        return program

    return add


def modules(**made: Any) -> nn.Module:
    net = nn.Module()
    for name, module in made.items():
        net.add_module(name, module)
    return net


def two(snn: Any, **options: Any) -> nn.Module:
    return modules(
        fc1=nn.Linear(M, H),
        lif1=snn.Leaky(0.875, **options),
        fc2=nn.Linear(H, N),
        lif2=snn.Leaky(0.75, **options),
    )


def hidden(snn: Any) -> nn.Module:
    options = {"beta": 0.875, "init_hidden": True}
    return nn.Sequential(
        nn.Linear(M, H), snn.Leaky(**options), nn.Linear(H, N), snn.Leaky(**options, output=True)
    )


def ce(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y)


# --- snnTorch, explicit states ---


@entry(two)
def tutorial_5(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2 = net.lif1.reset_mem(), net.lif2.reset_mem()
    spk_rec, mem_rec = [], []
    for _ in range(T):
        cur1 = net.fc1(x[0])
        spk1, mem1 = net.lif1(cur1, mem1)
        cur2 = net.fc2(spk1)
        spk2, mem2 = net.lif2(cur2, mem2)
        spk_rec.append(spk2)
        mem_rec.append(mem2)
    spikes, mem = torch.stack(spk_rec, dim=0), torch.stack(mem_rec, dim=0)
    loss = torch.zeros(1)
    for t in range(T):
        loss += ce(mem[t], y)
    return [spikes, mem], loss


@entry(two)
def inputs_of_each_step(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for t in range(T):
        spk1, mem1 = net.lif1(net.fc1(x[t]), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        out.append(spk2)
    return [torch.stack(out)], ce(torch.stack(out).sum(0), y)


@entry(two)
def loss_of_the_last_membrane(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2 = net.lif1.reset_mem(), net.lif2.reset_mem()
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        _, mem2 = net.lif2(net.fc2(spk1), mem2)
    return [mem2], ce(mem2, y)


@entry(two)
def loss_inside_the_loop(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, loss = net.lif1.reset_mem(), net.lif2.reset_mem(), torch.zeros(())
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        _, mem2 = net.lif2(net.fc2(spk1), mem2)
        loss = loss + ce(mem2, y)
    return [mem2], loss


@entry(two)
def count_added_up(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, count = net.lif1.reset_mem(), net.lif2.reset_mem(), 0
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        count = count + spk2
    return [count], ce(count, y)


@entry(two)
def count_added_in_place(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, count = net.lif1.reset_mem(), net.lif2.reset_mem(), torch.zeros(B, N)
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        count += spk2
    return [count], ce(count, y)


@entry(two)
def recorded_count_in_place(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, count = net.lif1.reset_mem(), net.lif2.reset_mem(), 0
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        count = count + 0 * spk2
        count += spk2
    return [count, spk2], ce(count, y)


@entry(two)
def python_sum(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        out.append(spk2)
    return out, ce(sum(out), y)


@entry(two)
def prints_every_step(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, seen = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        seen.append(float(spk2.sum()))
        assert "tensor" in f"{spk1}"
    return [torch.tensor(seen), mem2], ce(mem2, y)


@entry(two)
def early_exit(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for t, step in enumerate(x):
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        out.append(mem2)
        if t == 3 and spk1.sum() > 0:
            break
    return [torch.stack(out)], ce(torch.stack(out).mean(0), y)


@entry(two)
def skip_connection(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for step in x:
        cur1 = net.fc1(step)
        spk1, mem1 = net.lif1(cur1, mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1 + 0.5 * cur1), mem2)
        out.append(spk2)
    return [torch.stack(out)], ce(torch.stack(out).sum(0) + mem2, y)


@entry(lambda snn: modules(**dict(two(snn).named_children()), side=nn.Linear(M, H), join=nn.Linear(2 * H, N)))
def branches(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        both = torch.cat([spk1, torch.relu(net.side(step))], dim=1)
        spk2, mem2 = net.lif2(net.join(both), mem2)
        out.append(mem2)
    return [torch.stack(out)], ce(torch.stack(out).mean(0), y)


@entry(lambda snn: modules(a=two(snn), b=two(snn)))
def two_networks(net: Any, x: Tensor, y: Tensor) -> Any:
    states = [n.reset_mem() for n in (net.a.lif1, net.a.lif2, net.b.lif1, net.b.lif2)]
    out_a, out_b = [], []
    for t, step in enumerate(x):
        spk, states[0] = net.a.lif1(net.a.fc1(step), states[0])
        spk, states[1] = net.a.lif2(net.a.fc2(spk), states[1])
        out_a.append(states[1])
        if t % 2:
            other, states[2] = net.b.lif1(net.b.fc1(step), states[2])
            other, states[3] = net.b.lif2(net.b.fc2(other), states[3])
            out_b.append(other)
    return [torch.stack(out_a), torch.stack(out_b)], ce(
        torch.stack(out_a).sum(0) + torch.stack(out_b).sum(0), y
    )


@entry(lambda snn: modules(**dict(two(snn).named_children()), back=nn.Linear(N, H)))
def feedback(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out, spk2 = net.lif1.reset_mem(), net.lif2.reset_mem(), [], torch.zeros(B, N)
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step) + net.back(spk2), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        out.append(spk2)
    return [torch.stack(out)], ce(torch.stack(out).sum(0) + mem2, y)


@entry(lambda snn: modules(**dict(two(snn).named_children()), back=nn.Linear(H, H), lif3=snn.Leaky(0.5)))
def feedback_in_one_part(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, mem3 = (n.reset_mem() for n in (net.lif1, net.lif2, net.lif3))
    out, spk1 = [], torch.zeros(B, H)
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step) + net.back(spk1), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        spk3, mem3 = net.lif3(2 * spk2, mem3)
        out.append(spk3)
    return [torch.stack(out)], ce(torch.stack(out).sum(0) + mem3, y)


@entry(two)
def states_over_batches(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out, loss = net.lif1.reset_mem(), net.lif2.reset_mem(), [], torch.zeros(())
    for _ in range(3):
        for step in x:
            spk1, mem1 = net.lif1(net.fc1(step), mem1)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        loss = loss + ce(mem2, y)
        out.append(mem2)
        mem1, mem2 = mem1.detach(), mem2.detach()
    return out, loss


@entry(two)
def truncated_backward(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for t, step in enumerate(torch.cat([x, x])):
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        if t % 4 == 3:
            ce(mem2, y).backward()
            out.append(mem2.detach().clone())
            mem1.detach_()
            mem2.detach_()
    return out, None


@entry(two)
def optimizer_in_the_loop(net: Any, x: Tensor, y: Tensor) -> Any:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.25)
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for t, step in enumerate(torch.cat([x, x])):
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        out.append(mem2.detach())
        if t % 5 == 4:
            optimizer.zero_grad()
            ce(mem2, y).backward()
            late, _ = net.lif2(net.fc2(spk1.detach()), mem2.detach())
            optimizer.step()
            out.append(late)
            mem1, mem2 = mem1.detach(), mem2.detach()
    return out, None


@entry(two)
def no_grad_in_the_middle(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for t, step in enumerate(x):
        with torch.set_grad_enabled(t >= 3):
            spk1, mem1 = net.lif1(net.fc1(step), mem1)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        out.append(mem2)
    assert [m.requires_grad for m in out] == [t >= 3 for t in range(T)]
    return out, ce(mem2, y)


@entry(two)
def evaluation(net: Any, x: Tensor, y: Tensor) -> Any:
    correct = torch.zeros(())
    with torch.no_grad():
        mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
        for step in x:
            spk1, mem1 = net.lif1(net.fc1(step), mem1)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            out.append(spk2)
        _, predicted = torch.stack(out).sum(dim=0).max(1)
        correct += (predicted == y).sum().item()
    assert not torch.stack(out).requires_grad
    return [correct, torch.stack(out)], None


@entry(two)
def inference_mode(net: Any, x: Tensor, y: Tensor) -> Any:
    with torch.inference_mode():
        mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
        for step in x:
            spk1, mem1 = net.lif1(net.fc1(step), mem1)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            out.append(spk2)
        found = torch.stack(out)
    return [found.clone()], None


@entry(two)
def in_place_on_spikes(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    with torch.no_grad():
        for step in x:
            spk1, mem1 = net.lif1(net.fc1(step), mem1)
            spk1[:, 0] = 1
            mem1.clamp_(min=-0.5)
            spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
            out.append(spk2)
    return [torch.stack(out), mem1], None


@entry(two)
def in_place_on_a_view(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, out = net.lif1.reset_mem(), []
    with torch.no_grad():
        for step in x:
            spk1, mem1 = net.lif1(net.fc1(step), mem1)
            flat = spk1.view(-1)
            flat.mul_(0.5)
            out += [spk1, flat]
    return out, None


@entry(two)
def in_place_on_the_stack(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, out = net.lif1.reset_mem(), []
    with torch.no_grad():
        for step in x:
            spk1, mem1 = net.lif1(net.fc1(step), mem1)
            out.append(mem1)
        stacked = torch.stack(out)
        other = torch.stack(out)
        stacked[stacked < 0] = 0
        stacked[-1] += 1
    return [stacked, other, mem1, *out], None


@entry(two)
def in_place_on_one_step_of_the_stack(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, out = net.lif1.reset_mem(), []
    with torch.no_grad():
        for step in x:
            spk1, mem1 = net.lif1(net.fc1(step), mem1)
            out.append(mem1)
        stacked = torch.stack(out)
        one = stacked[2]
        one += 1
    return [one, stacked, *out], None


@entry(two)
def membrane_arithmetic(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        soft = torch.sigmoid(4 * (mem1 - 1)) * (1 - spk1) + spk1 / 2
        spk2, mem2 = net.lif2(net.fc2(soft), mem2)
        out.append(mem2 * (spk2 > 0).float() - mem2.abs().clamp(max=2))
    return [torch.stack(out)], ce(torch.stack(out).mean(0), y)


@entry(two)
def decayed_membrane(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1 * 0.5)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        out.append(mem2)
    return [torch.stack(out)], ce(torch.stack(out).mean(0), y)


@entry(two)
def neuron_used_twice_a_step(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, other, out = net.lif1.reset_mem(), net.lif2.reset_mem(), torch.zeros(B, H), []
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        again, other = net.lif1(net.fc1(step.flip(0)), other)
        spk2, mem2 = net.lif2(net.fc2(spk1 - again), mem2)
        out.append(mem2)
    return [torch.stack(out), other], ce(torch.stack(out).mean(0), y)


@entry(lambda snn: modules(**dict(two(snn).named_children()), drop=nn.Dropout(0.5)))
def dropout(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(net.drop(step)), mem1)
        spk2, mem2 = net.lif2(net.fc2(net.drop(spk1)), mem2)
        out.append(mem2 + torch.rand_like(mem2))
    net.eval()
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(net.drop(step)), mem1)
        spk2, mem2 = net.lif2(net.fc2(net.drop(spk1)), mem2)
        out.append(mem2)
    return [torch.stack(out)], ce(torch.stack(out).mean(0), y)


@entry(lambda snn: modules(**dict(two(snn).named_children()), norm=nn.BatchNorm1d(H)))
def batch_norm_trains_and_evaluates(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for t, step in enumerate(torch.cat([x, x])):
        net.train(t < T)
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk2, mem2 = net.lif2(net.fc2(net.norm(spk1)), mem2)
        out.append(mem2)
    return [torch.stack(out), net.norm.running_mean.clone()], ce(torch.stack(out).mean(0), y)


@entry(two)
def hooks_see_values(net: Any, x: Tensor, y: Tensor) -> Any:
    seen: list[Tensor] = []
    net.lif1.register_forward_hook(lambda m, args, out: seen.append(out[0].detach()))
    net.fc2.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        out.append(mem2)
    return [torch.stack(out), torch.stack(seen)], ce(torch.stack(out).mean(0), y)


@entry(two)
def backward_hooks(net: Any, x: Tensor, y: Tensor) -> Any:
    seen: list[Tensor] = []
    net.lif1.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append(grad_in[0]))
    mem1, mem2 = net.lif1.reset_mem(), net.lif2.reset_mem()
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
    ce(mem2, y).backward()
    return [mem2, *seen], None


@entry(two)
def tensor_hooks(net: Any, x: Tensor, y: Tensor) -> Any:
    seen: list[Tensor] = []
    mem1, mem2 = net.lif1.reset_mem(), net.lif2.reset_mem()
    for t, step in enumerate(x):
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        if t == 2:
            spk1.register_hook(seen.append)
            mem1.retain_grad()
            kept = mem1
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
    ce(mem2, y).backward()
    return [mem2, kept.grad, *seen], None


class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / 2


@entry(two)
def custom_autograd_function(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk2, mem2 = net.lif2(net.fc2(Half.apply(spk1)), mem2)
        out.append(Half.apply(mem2))
    return [torch.stack(out)], ce(torch.stack(out).mean(0), y)


@entry(two)
def numpy_and_lists(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        out.append(spk2)
    rates = [s.detach().numpy().mean() for s in out]
    return [torch.tensor(rates), torch.tensor(out[-1].tolist())], ce(mem2, y)


@entry(two)
def a_view_of_each_step(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for _ in range(T):
        flat = x[0].view(B, 3, 4).flatten(1)
        spk1, mem1 = net.lif1(net.fc1(flat), mem1)
        wide = spk1.reshape(B, 2, -1).permute(0, 2, 1).flatten(1).unsqueeze(1).squeeze(1)
        spk2, mem2 = net.lif2(net.fc2(wide), mem2)
        out.append(mem2[:, : N - 1])
    return [torch.stack(out)], ce(torch.stack(out).mean(0), y.clamp(max=N - 2))


@entry(two)
def shape_questions(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        assert spk1.shape == (B, H)
        assert (len(spk1), spk1.size(-1), spk1.dim(), spk1.dtype) == (B, H, 2, torch.float32)
        assert isinstance(spk1, Tensor)
        assert not mem1 == None  # noqa: E711, SIM201
        spk2, mem2 = net.lif2(net.fc2(spk1.view(spk1.size(0), -1)), mem2)
        out.append(mem2 + torch.zeros_like(mem2))
    return [torch.stack(out, dim=1)], ce(torch.stack(out, dim=1).mean(1), y)


@entry(two)
def cat_of_steps(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        out.append(mem2)
    return [torch.cat(out), torch.stack(out[1:5]), torch.stack(out[::-1])], ce(torch.cat(out), y.repeat(T))


@entry(two)
def rate_penalty(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, penalty = net.lif1.reset_mem(), net.lif2.reset_mem(), 0.0
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        penalty = penalty + 0.125 * spk1.mean() + mem1.pow(2).sum(-1).mean()
    return [mem2], ce(mem2, y) + penalty


@entry(two)
def two_losses_from_one_record(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        out.append(mem2)
    ce(out[3], y).backward(retain_graph=True)
    ce(out[-1], y).backward()
    return out, None


@entry(lambda snn: two(snn, learn_beta=True, learn_threshold=True))
def learned_decay_and_threshold(net: Any, x: Tensor, y: Tensor) -> Any:
    return inputs_of_each_step(net, x, y)


@entry(two)
def threshold_replaced_in_the_loop(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    for t, step in enumerate(x):
        if t == 3:
            net.lif1.threshold = torch.tensor(0.5)
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk2, mem2 = net.lif2(net.fc2(spk1), mem2)
        out.append(mem2)
    return [torch.stack(out)], ce(torch.stack(out).mean(0), y)


# --- snnTorch, hidden states and other neurons ---


@entry(hidden)
def sequential_with_hidden_states(net: Any, x: Tensor, y: Tensor) -> Any:
    out = [net(step) for step in x]
    spikes, mem = (torch.stack(part) for part in zip(*out, strict=True))
    return [spikes, mem, net[1].mem], ce(spikes.sum(0) + mem[-1], y)


@entry(hidden)
def hidden_states_over_batches(net: Any, x: Tensor, y: Tensor) -> Any:
    from snntorch import utils

    out = []
    for round in range(3):
        for step in x:
            spikes, mem = net(step)
        ce(mem, y).backward()
        out += [spikes, mem.clone(), net[1].mem.clone()]
        if round:
            utils.reset(net)
        else:
            net[1].detach_hidden()
    return out, None


@entry(
    lambda snn: nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.MaxPool2d(2),
        snn.Leaky(0.875, init_hidden=True),
        nn.Conv2d(3, 4, 2),
        snn.Leaky(0.875, init_hidden=True),
        nn.Flatten(),
        nn.Linear(8, N),
        snn.Leaky(0.875, init_hidden=True, output=True),
    )
)
def convolutions(net: Any, x: Tensor, y: Tensor) -> Any:
    images = x.repeat(1, 1, 2).view(T, B, 1, 4, 6)
    out = [net(image)[1] for image in images]
    return [torch.stack(out)], ce(torch.stack(out).mean(0), y)


@entry(lambda snn: modules(fc=nn.Linear(M, H), lif=snn.Synaptic(0.5, 0.875)))
def synaptic(net: Any, x: Tensor, y: Tensor) -> Any:
    (syn, mem), out = net.lif.reset_mem(), []
    for step in x:
        spk, syn, mem = net.lif(net.fc(step), syn, mem)
        out.append(spk)
    return [torch.stack(out), syn, mem], ce(torch.stack(out).sum(0) + mem, y)


@entry(lambda snn: modules(fc=nn.Linear(M, H), lif=snn.Synaptic(0.5, 0.875)))
def synaptic_currents_kept(net: Any, x: Tensor, y: Tensor) -> Any:
    (syn, mem), out = net.lif.reset_mem(), []
    for step in x:
        _, syn, mem = net.lif(net.fc(step), syn, mem)
        out.append(syn)
    return [torch.stack(out), mem], ce(torch.stack(out).sum(0) + mem, y)


@entry(lambda snn: modules(fc=nn.Linear(M, H), lif=snn.Alpha(0.875, 0.5)))
def alpha(net: Any, x: Tensor, y: Tensor) -> Any:
    (exc, inh, mem), out = net.lif.reset_mem(), []
    for step in x:
        spk, exc, inh, mem = net.lif(4 * net.fc(step), exc, inh, mem)
        out.append(mem)
    return [torch.stack(out), exc, inh], ce(torch.stack(out).sum(0), y)


@entry(lambda snn: modules(fc=nn.Linear(M, H), lif=snn.RLeaky(0.875, linear_features=H)))
def recurrent(net: Any, x: Tensor, y: Tensor) -> Any:
    (spk, mem), out = net.lif.reset_mem(), []
    for step in x:
        spk, mem = net.lif(net.fc(step), spk, mem)
        out.append(spk)
    return [torch.stack(out), mem], ce(torch.stack(out).sum(0) + mem, y)


@entry(lambda snn: modules(fc=nn.Linear(M, H), lif=snn.RSynaptic(0.5, 0.875, all_to_all=False)))
def recurrent_one_to_one(net: Any, x: Tensor, y: Tensor) -> Any:
    (spk, syn, mem), out = net.lif.reset_mem(), []
    for step in x:
        spk, syn, mem = net.lif(net.fc(step), spk, syn, mem)
        out.append(mem)
    return [torch.stack(out)], ce(torch.stack(out).sum(0), y)


@entry(lambda snn: modules(lif=snn.Lapicque(R=5.0, C=0.5, time_step=0.25)))
def single_neuron(net: Any, x: Tensor, y: Tensor) -> Any:
    mem, out, current = torch.zeros(1), [], x[:, 0, :1]
    for step in current:
        spk, mem = net.lif(step, mem)
        out += [spk, mem]
    return [torch.stack(out[::2]), torch.stack(out[1::2])], None


@entry(lambda snn: modules(**dict(two(snn).named_children()), odd=snn.SLSTM(H, H)))
def a_neuron_that_is_not_fused(net: Any, x: Tensor, y: Tensor) -> Any:
    mem1, mem2, out = net.lif1.reset_mem(), net.lif2.reset_mem(), []
    syn, mem = net.odd.reset_mem()
    for step in x:
        spk1, mem1 = net.lif1(net.fc1(step), mem1)
        spk, syn, mem = net.odd(spk1, syn, mem)
        spk2, mem2 = net.lif2(net.fc2(spk + spk1), mem2)
        out.append(mem2)
    return [torch.stack(out)], ce(torch.stack(out).mean(0), y)


@entry(lambda snn: two(snn, reset_mechanism="zero", reset_delay=False))
def reset_without_delay(net: Any, x: Tensor, y: Tensor) -> Any:
    return inputs_of_each_step(net, x, y)


# --- Norse ---


@entry(
    lambda norse: modules(
        fc1=nn.Linear(M, H), lif=norse.LIFCell(dt=0.125), fc2=nn.Linear(H, N), li=norse.LICell(dt=0.125)
    ),
    "norse",
)
def norse_cells(net: Any, x: Tensor, y: Tensor) -> Any:
    state, readout, out = None, None, []
    for step in x:
        z, state = net.lif(4 * net.fc1(step), state)
        v, readout = net.li(net.fc2(z), readout)
        out.append(v)
    voltages = torch.stack(out)
    best, _ = torch.max(voltages, 0)
    return [voltages, state.v, state.i], ce(best, y)


@entry(
    lambda norse: modules(
        fc1=nn.Linear(M, H), lif=norse.LIFCell(dt=0.125), fc2=nn.Linear(H, N), li=norse.LICell(dt=0.125)
    ),
    "norse",
)
def norse_states_kept(net: Any, x: Tensor, y: Tensor) -> Any:
    state, states = None, []
    for step in x:
        z, state = net.lif(4 * net.fc1(step), state)
        states.append(state)
    v = torch.stack([s.v for s in states])
    return [v, states[2].i, z], ce(v.mean(0), y)


@entry(
    lambda norse: norse.SequentialState(
        nn.Linear(M, H), norse.LIFCell(dt=0.125), nn.Linear(H, N), norse.LICell(dt=0.125)
    ),
    "norse",
)
def norse_sequential(net: Any, x: Tensor, y: Tensor) -> Any:
    state, out = None, []
    for step in x:
        v, state = net(8 * step, state)
        out.append(v)
    return [torch.stack(out), state[1].v], ce(torch.stack(out).mean(0), y)


@entry(
    lambda norse: modules(
        rec=norse.LIFRecurrentCell(M, H, dt=0.125),
        lsnn=norse.LSNNRecurrentCell(H, H, dt=0.125),
        out=nn.Linear(H, N),
    ),
    "norse",
)
def norse_recurrent(net: Any, x: Tensor, y: Tensor) -> Any:
    one, two_, out = None, None, []
    for step in x:
        z, one = net.rec(step, one)
        z, two_ = net.lsnn(2 * z, two_)
        out.append(net.out(z))
    return [torch.stack(out), one.v, two_.b], ce(torch.stack(out).mean(0), y)


@entry(
    lambda norse: modules(
        fc=nn.Linear(M, H),
        adex=norse.LIFAdExCell(dt=0.0625),
        refrac=norse.LIFRefracCell(dt=0.125),
        box=norse.LIFBoxCell(dt=0.125),
        iaf=norse.IAFCell(),
    ),
    "norse",
)
def norse_other_cells(net: Any, x: Tensor, y: Tensor) -> Any:
    a = b = c = d = None
    out = []
    for step in x:
        z, a = net.box(16 * net.fc(step), a)
        z, b = net.iaf(z, b)
        z, c = net.refrac(16 * z, c)
        z, d = net.adex(4 * z, d)
        out.append(z + d.v)
    return [torch.stack(out), c.rho], ce(torch.stack(out).mean(0), y)


@entry(lambda norse: modules(lin=norse.LILinearCell(M, N, dt=0.125)), "norse")
def norse_linear_readout(net: Any, x: Tensor, y: Tensor) -> Any:
    state, out = None, []
    for step in x:
        v, state = net.lin(step, state)
        out.append(v)
    return [torch.stack(out)], ce(torch.stack(out).mean(0), y)


@entry(lambda norse: modules(fc1=nn.Linear(M, H), lif=norse.LIFCell(dt=0.125)), "norse")
def norse_truncated(net: Any, x: Tensor, y: Tensor) -> Any:
    state, out = None, []
    for t, step in enumerate(torch.cat([x, x])):
        z, state = net.lif(4 * net.fc1(step), state)
        out.append(z)
        if t % 4 == 3:
            ce(state.v + z, y).backward()
            state = type(state)(*(part.detach() for part in state))
    return out, None
