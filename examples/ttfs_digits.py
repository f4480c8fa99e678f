"""Train an MLP with time-to-first-spike layers on 8x8 digits, then run the spiking network it equals.

python examples/ttfs_digits.py --epochs 30
"""

import argparse

import torch
from torch import nn

from snn_sparse_plugin.data import load_images
from snn_sparse_plugin.layers.ttfs import (
    TTFS,
    RelaxationSchedule,
    TTFSBatchNorm1d,
    TTFSEncoder,
    TTFSReadout,
    to_snn,
    ttfs_loss,
)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument(
    "--samples", type=int, default=0, help="training images, and test images in proportion; 0 is all"
)
parser.add_argument("--tb", type=float, default=0.01, help="weight of the spike regularisation")
parser.add_argument("--save", help="write the spiking network here, for `snn-sparse ttfs report FILE`")
args = parser.parse_args()

torch.manual_seed(0)
data = load_images("digits").limited(args.samples)
model = nn.Sequential(
    TTFSEncoder(window=32),
    nn.Linear(64, 128, bias=False),
    TTFSBatchNorm1d(128),
    TTFS(window=32),  # was: nn.ReLU()
    nn.Linear(128, 64, bias=False),
    TTFSBatchNorm1d(64),
    TTFS(window=32),
    TTFSReadout(64, 10),
)
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
relaxation = RelaxationSchedule(model, target=args.epochs // 2)
for epoch in range(args.epochs):
    model.train()
    for batch in torch.randperm(len(data.train_y)).split(64):
        logits = model(data.train_x[batch])
        loss = ttfs_loss(logits, data.train_y[batch], model, tr=1e-3, tb=args.tb, form="gaussian")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    relaxation.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(data.test_x).argmax(1) == data.test_y).float().mean()
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {100 * accuracy:.1f} %")

net = to_snn(model, data.test_x[:1])
print(net.verify(data.test_x))
print(net.verify(data.test_x, exact_grid=True))
print(net.report(data.test_x, labels=data.test_y))
print(net.report(data.test_x, labels=data.test_y, early_firing=16))
if args.save:
    net.save(args.save)
