"""Train VGG-9, VGG-11 or VGG-16 with TTFS layers on CIFAR-10 or CIFAR-100, and count the spikes of its spiking network.

python examples/ttfs_cifar.py --root DIR --classes 10 --depth 16 --epochs 200 --device cuda

DIR holds cifar10.npz or cifar100.npz (train_x, test_x: uint8 (N, 3, 32, 32) or (N, 32, 32, 3); train_y, test_y), or
torchvision's files, which needs torchvision. Coding as published by Park & Yoon (arXiv 2106.02568): T = 32, tau = 10,
t_d = 0, relaxation, kernel and spike regularisation. Images stay in [0, 1]; they are shifted and mirrored at random.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from snn_sparse_plugin.data import load_images
from snn_sparse_plugin.layers.ttfs import RelaxationSchedule, to_snn, to_ttfs, ttfs_loss
from snn_sparse_plugin.layers.ttfs.networks import PLANS, vgg
from snn_sparse_plugin.layers.ttfs.recipes import accuracy, augmented

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--root", type=Path, help="folder of the files")
parser.add_argument("--classes", type=int, choices=(10, 100), default=10)
parser.add_argument("--depth", type=int, choices=sorted(PLANS), default=16)
parser.add_argument("--width", type=float, default=1.0, help="factor on all channels")
parser.add_argument("--epochs", type=int, default=200)
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--window", type=int, default=32)
parser.add_argument("--relax", type=float, default=0.5, help="share of the epochs with stochastic relaxation")
parser.add_argument("--tr", type=float, default=1e-3)
parser.add_argument("--tb", type=float, default=0.0)
parser.add_argument(
    "--form", choices=("paper", "gaussian"), default="gaussian", help="of the spike regularisation"
)
parser.add_argument("--relu", action="store_true", help="train the ReLU network instead")
parser.add_argument("--samples", type=int, default=0, help="training images; 0 is all")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cpu")
parser.add_argument("--save", help="write the spiking network here")
args = parser.parse_args()
if args.root is None:
    parser.error(
        "say where the images are: --root FOLDER. torchvision fetches them: torchvision.datasets."
        f"CIFAR{args.classes}(FOLDER, download=True)"
    )

torch.manual_seed(args.seed)
data = load_images(f"cifar{args.classes}", args.root)
train_x, train_y, test_x, test_y = data.train_x, data.train_y, data.test_x, data.test_y
if args.samples:
    train_x, train_y = train_x[: args.samples], train_y[: args.samples]
model = vgg(args.depth, args.classes, args.width)
if not args.relu:
    model = to_ttfs(model, window=args.window)
model = model.to(args.device)
kernels = [p for n, p in model.named_parameters() if n.endswith(("tau_raw", "t_d"))]
weights = [p for n, p in model.named_parameters() if not n.endswith(("tau_raw", "t_d"))]
groups = [
    {"params": weights, "weight_decay": 5e-4},
    {"params": kernels, "weight_decay": 0.0, "lr": 0.1 * args.lr},
]
optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=args.lr, momentum=0.9, nesterov=True)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
relaxation = None if args.relu else RelaxationSchedule(model, round(args.relax * args.epochs))
for epoch in range(args.epochs):
    model.train()
    for batch in torch.randperm(len(train_y)).split(args.batch):
        x, y = augmented(train_x[batch].to(args.device), flip=True, shift=4), train_y[batch].to(args.device)
        regularised = {} if args.relu else {"tr": args.tr, "tb": args.tb, "form": args.form}
        loss = ttfs_loss(model(x), y, model, **regularised)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    schedule.step()
    if relaxation is not None:
        relaxation.step()
    model.eval()
    right = accuracy(model, test_x, test_y, batch=args.batch)
    print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {100 * right:.2f} %")
if not args.relu:
    net = to_snn(model.cpu(), test_x[:1])
    print(net.verify(test_x[:200], batch_size=50))
    print(net.report(test_x[:200], labels=test_y[:200], reference=f"tsc-cifar{args.classes}", batch_size=50))
    if args.save:
        net.save(args.save)
