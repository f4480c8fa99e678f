"""Train VGG-9, VGG-11 or VGG-16 with TTFS layers on CIFAR-10 or CIFAR-100, and count the spikes of its spiking network.

python examples/ttfs_cifar.py --root DIR --classes 10 --depth 16 --epochs 200 --device cuda

DIR holds cifar10.npz or cifar100.npz (train_x, test_x: uint8 (N, 3, 32, 32) or (N, 32, 32, 3); train_y, test_y), or
torchvision's files, which needs torchvision. Coding as published by Park & Yoon (arXiv 2106.02568): T = 32, tau = 10,
t_d = 0, relaxation, kernel and spike regularisation. Images stay in [0, 1]; they are shifted and mirrored at random.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from snn_sparse_plugin.layers.ttfs import RelaxationSchedule, to_snn, to_ttfs, ttfs_loss
from snn_sparse_plugin.layers.ttfs.ablation import accuracy

PLANS = {  # channels of the convolutions; 0 is a pooling
    9: (64, 64, 0, 128, 128, 0, 256, 256, 0),
    11: (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0),
    16: (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0),
}
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--root", type=Path, required=True)
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


def vgg(plan: tuple[int, ...], classes: int, width: float) -> nn.Module:
    layers: list[nn.Module] = []
    channels, hidden = 3, max(8, round(512 * width))
    for wanted in plan:
        if wanted:
            out = max(4, round(wanted * width))
            layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        else:
            layers.append(nn.MaxPool2d(2))
    side = 32 >> plan.count(0)
    layers.append(nn.Flatten())
    features = channels * side * side
    for _ in range(2):
        layers += [
            nn.Linear(features, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(0.2),
        ]
        features = hidden
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


def load(root: Path, classes: int) -> list[torch.Tensor]:
    """Images (N, 3, 32, 32) float32 in [0, 1] and labels, for training and test."""
    file = root / f"cifar{classes}.npz"
    if file.is_file():
        with np.load(file, allow_pickle=False) as data:
            arrays = [data[name] for name in ("train_x", "train_y", "test_x", "test_y")]
    else:
        try:
            from torchvision import datasets
        except ImportError:
            raise SystemExit(
                f"there is no {file}, and torchvision, which reads the original files, is not installed"
            ) from None
        kind = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
        parts = [kind(str(root), train=train) for train in (True, False)]
        arrays = [array for part in parts for array in (part.data, np.array(part.targets))]
    found = []
    for array in arrays:
        tensor = torch.from_numpy(array)
        if tensor.dim() == 4:
            tensor = tensor if tensor.shape[1] == 3 else tensor.permute(0, 3, 1, 2)
            tensor = tensor.float().contiguous() / 255
        found.append(tensor if tensor.dim() == 4 else tensor.long())
    return found


def augmented(x: torch.Tensor) -> torch.Tensor:
    """Shifted by up to four pixels, half of them mirrored."""
    padded = F.pad(x, (4, 4, 4, 4))
    rows, columns = torch.randint(9, (2, len(x), 1), device=x.device)
    at = torch.arange(32, device=x.device)
    columns = torch.where(torch.rand(len(x), 1, device=x.device) < 0.5, columns + 31 - at, columns + at)
    sample = torch.arange(len(x), device=x.device).view(-1, 1, 1, 1)
    channel = torch.arange(3, device=x.device).view(1, -1, 1, 1)
    return padded[sample, channel, (rows + at)[:, None, :, None], columns[:, None, None, :]]


torch.manual_seed(args.seed)
train_x, train_y, test_x, test_y = load(args.root, args.classes)
if args.samples:
    train_x, train_y = train_x[: args.samples], train_y[: args.samples]
model = vgg(PLANS[args.depth], args.classes, args.width)
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
        x, y = augmented(train_x[batch].to(args.device)), train_y[batch].to(args.device)
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
