"""Norse: a classifier with LIFCells in a time loop over encoded images, decoded by the highest voltage."""

import torch
import torch.nn.functional as F
from torch import nn
from tutorial import Clock, arguments, batches, digits, library, report, sparse

args = arguments(__doc__, epochs=6)
norse = library("norse.torch", args.mode)
STEPS, batch_size = 32, 128


class SNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = norse.ConstantCurrentLIFEncoder(STEPS)
        self.fc1 = nn.Linear(64, 200)
        self.lif1 = norse.LIFCell(norse.LIFParameters(v_th=torch.tensor(0.25)))
        self.fc_out = nn.Linear(200, 10)
        self.readout = norse.LICell()

    def forward(self, x):
        spikes = self.encoder(8 * x.flatten(1))
        s1 = so = None
        voltages = []
        for step in spikes:
            z, s1 = self.lif1(4 * self.fc1(step), s1)
            vo, so = self.readout(self.fc_out(z), so)
            voltages += [vo]
        return torch.stack(voltages)


def decode(voltages):
    highest, _ = torch.max(voltages, 0)
    return F.log_softmax(highest, dim=1)


train_x, train_y, test_x, test_y = digits()
net, clock = SNN(), Clock()
optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
with sparse(args.mode):
    for epoch in range(args.epochs):
        for batch in batches(len(train_x), batch_size):
            loss = F.nll_loss(decode(net(train_x[batch])), train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clock.tick(loss)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    clock.stop()
    with torch.no_grad():
        accuracy = 100 * (decode(net(test_x)).argmax(1) == test_y).float().mean().item()
report(loss, accuracy, clock)
