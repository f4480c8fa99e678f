"""snnTorch: population coding: fifty output neurons for each class, one step decides."""

import torch
from torch import nn
from tutorial import Clock, arguments, batches, digits, library, report, sparse

args = arguments(__doc__, epochs=5)
snn = library("snntorch", args.mode)
from snntorch import functional as SF  # noqa: E402
from snntorch import surrogate, utils  # noqa: E402

population, num_hidden, num_steps, batch_size = 500, 128, 5, 128
grad = surrogate.fast_sigmoid()
net = nn.Sequential(
    nn.Flatten(),
    nn.Linear(64, num_hidden),
    snn.Leaky(beta=0.9, spike_grad=grad, init_hidden=True),
    nn.Linear(num_hidden, population),
    snn.Leaky(beta=0.9, spike_grad=grad, init_hidden=True, output=True),
)


def forward_pass(net, data):
    utils.reset(net)
    return torch.stack([net(data)[0] for _ in range(num_steps)])


train_x, train_y, test_x, test_y = digits()
loss_fn = SF.mse_count_loss(correct_rate=1.0, incorrect_rate=0.0, population_code=True, num_classes=10)
optimizer, clock = torch.optim.Adam(net.parameters(), lr=2e-3), Clock()
with sparse(args.mode):
    for epoch in range(args.epochs):
        for batch in batches(len(train_x), batch_size):
            loss = loss_fn(forward_pass(net, train_x[batch]), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clock.tick(loss)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    clock.stop()
    with torch.no_grad():
        spk = forward_pass(net, test_x)
        accuracy = 100 * SF.accuracy_rate(spk, test_y, population_code=True, num_classes=10).item()
report(loss, accuracy, clock)
