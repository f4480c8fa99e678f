"""Norse: SequentialState with convolutions, called once a step with the state it returned."""

import torch
import torch.nn.functional as F
from torch import nn
from tutorial import Clock, arguments, batches, digits, library, report, sparse

args = arguments(__doc__, epochs=5)
norse = library("norse.torch", args.mode)
STEPS, batch_size = 20, 64
cell = norse.LIFParameters(v_th=torch.tensor(0.2), tau_mem_inv=torch.tensor(300.0))
net = norse.SequentialState(
    nn.Conv2d(1, 8, 3, padding=1),
    norse.LIFCell(cell),
    nn.MaxPool2d(2),
    nn.Conv2d(8, 16, 3, padding=1),
    norse.LIFCell(cell),
    nn.Flatten(),
    nn.Linear(16 * 4 * 4, 10),
    norse.LICell(),
)


def forward(x):
    state, voltages = None, []
    for _ in range(STEPS):
        v, state = net(4 * x, state)
        voltages.append(v)
    return torch.stack(voltages).mean(0)


train_x, train_y, test_x, test_y = digits()
optimizer, clock = torch.optim.Adam(net.parameters(), lr=4e-3), Clock()
with sparse(args.mode):
    for epoch in range(args.epochs):
        for batch in batches(len(train_x), batch_size):
            loss = F.cross_entropy(4 * forward(train_x[batch]), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clock.tick(loss)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    clock.stop()
    with torch.no_grad():
        accuracy = 100 * (forward(test_x).argmax(1) == test_y).float().mean().item()
report(loss, accuracy, clock)
