"""snnTorch: a fully connected classifier, 25 steps of a static image, the loss on the membrane of every step."""

import torch
from torch import nn
from tutorial import Clock, arguments, batches, digits, library, report, sparse

args = arguments(__doc__, epochs=6)
snn = library("snntorch", args.mode)
num_inputs, num_hidden, num_outputs, num_steps, batch_size, beta = 64, 1000, 10, 25, 128, 0.95


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(num_inputs, num_hidden)
        self.lif1 = snn.Leaky(beta=beta)
        self.fc2 = nn.Linear(num_hidden, num_outputs)
        self.lif2 = snn.Leaky(beta=beta)

    def forward(self, x):
        mem1 = self.lif1.init_leaky()
        mem2 = self.lif2.init_leaky()
        spk2_rec, mem2_rec = [], []
        for _ in range(num_steps):
            cur1 = self.fc1(x)
            spk1, mem1 = self.lif1(cur1, mem1)
            cur2 = self.fc2(spk1)
            spk2, mem2 = self.lif2(cur2, mem2)
            spk2_rec.append(spk2)
            mem2_rec.append(mem2)
        return torch.stack(spk2_rec, dim=0), torch.stack(mem2_rec, dim=0)


train_x, train_y, test_x, test_y = digits()
net, loss_fn, clock = Net(), nn.CrossEntropyLoss(), Clock()
optimizer = torch.optim.Adam(net.parameters(), lr=5e-4, betas=(0.9, 0.999))
with sparse(args.mode):
    for epoch in range(args.epochs):
        for batch in batches(len(train_x), batch_size):
            spk_rec, mem_rec = net(train_x[batch].view(batch_size, -1))
            loss_val = torch.zeros(1)
            for step in range(num_steps):
                loss_val += loss_fn(mem_rec[step], train_y[batch])
            optimizer.zero_grad()
            loss_val.backward()
            optimizer.step()
            clock.tick(loss_val)
        print(f"epoch {epoch + 1}: loss {loss_val.item() / num_steps:.3f}")
    clock.stop()
    with torch.no_grad():
        test_spk, _ = net(test_x.view(test_x.size(0), -1))
        _, predicted = test_spk.sum(dim=0).max(1)
        accuracy = 100 * (predicted == test_y).float().mean().item()
report(loss_val / num_steps, accuracy, clock)
