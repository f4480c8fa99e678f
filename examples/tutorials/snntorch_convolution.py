"""snnTorch: a convolutional classifier as an nn.Sequential of neurons that keep their hidden states."""

import torch
import torch.nn.functional as F
from torch import nn
from tutorial import Clock, arguments, batches, digits, library, report, sparse

args = arguments(__doc__, epochs=16)
snn = library("snntorch", args.mode)
from snntorch import surrogate, utils  # noqa: E402

num_steps, batch_size, beta = 20, 64, 0.5
grad = surrogate.fast_sigmoid(slope=25)
neuron = {"beta": beta, "spike_grad": grad, "init_hidden": True}
net = nn.Sequential(
    nn.Conv2d(1, 12, 3, padding=1),
    nn.MaxPool2d(2),
    snn.Leaky(**neuron),
    nn.Conv2d(12, 32, 3, padding=1),
    nn.MaxPool2d(2),
    snn.Leaky(**neuron),
    nn.Flatten(),
    nn.Linear(32 * 2 * 2, 10),
    snn.Leaky(**neuron, output=True),
)


def forward_pass(net, data):
    mem_rec, spk_rec = [], []
    utils.reset(net)
    for _ in range(num_steps):
        spk_out, mem_out = net(data)
        spk_rec.append(spk_out)
        mem_rec.append(mem_out)
    return torch.stack(spk_rec), torch.stack(mem_rec)


train_x, train_y, test_x, test_y = digits()
optimizer, clock = torch.optim.Adam(net.parameters(), lr=2e-3), Clock()
with sparse(args.mode):
    for epoch in range(args.epochs):
        for batch in batches(len(train_x), batch_size):
            spk_rec, _ = forward_pass(net, train_x[batch])
            loss = sum(F.cross_entropy(spk, train_y[batch]) for spk in spk_rec)  # rate coded
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clock.tick(loss)
        print(f"epoch {epoch + 1}: loss {loss.item() / num_steps:.3f}")
    clock.stop()
    with torch.no_grad():
        spk_rec, _ = forward_pass(net, test_x)
        accuracy = 100 * (spk_rec.sum(0).argmax(1) == test_y).float().mean().item()
report(loss / num_steps, accuracy, clock)
