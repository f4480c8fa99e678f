"""Train a small convolutional TTFS network on Fashion-MNIST and compare it with its spiking network.

python examples/ttfs_fashion_mnist.py --root DIR --epochs 40

DIR holds the four idx files, plain or gzipped, or torchvision's layout below it. An epoch takes about 40 seconds
on one core.
"""

import argparse
from pathlib import Path

import torch

from snn_sparse_plugin.data import load_images
from snn_sparse_plugin.layers.ttfs import to_snn
from snn_sparse_plugin.layers.ttfs.networks import small_conv
from snn_sparse_plugin.layers.ttfs.recipes import Recipe, TrainOptions, accuracy, build, train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--root", type=Path, help="folder of the idx files")
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument(
    "--samples", type=int, default=0, help="training images, and test images in proportion; 0 is all"
)
parser.add_argument("--width", type=int, default=32, help="channels of the first convolution")
parser.add_argument("--shift", type=int, default=2, help="pixels that a training image is moved by at most")
parser.add_argument("--weight-decay", type=float, default=0.05)
parser.add_argument("--label-smoothing", type=float, default=0.1)
parser.add_argument("--tb", type=float, default=0.0, help="weight of the spike regularisation")
parser.add_argument("--device", default="cpu")
parser.add_argument("--save", help="write the spiking network here, for `snn-sparse ttfs report FILE`")
args = parser.parse_args()
if args.root is None:
    parser.error(
        "say where the images are: --root FOLDER. To fetch them: "
        "snn_sparse_plugin.data.load_spikes('fashion-mnist', FOLDER, download=True)"
    )

torch.manual_seed(0)
data = load_images("fashion-mnist", args.root).limited(args.samples)
recipe = Recipe("fashion", relax=0.3, tr=1e-3, tb=args.tb, form="gaussian")
options = TrainOptions(
    epochs=args.epochs,
    batch=100,
    flip=True,
    shift=args.shift,
    weight_decay=args.weight_decay,
    label_smoothing=args.label_smoothing,
)


def show(epoch: int, model: torch.nn.Module) -> None:
    print(f"epoch {epoch}: test accuracy {100 * accuracy(model.eval(), data.test_x, data.test_y):.2f} %")


model = build(small_conv(args.width), recipe, options).to(args.device, memory_format=torch.channels_last)
model = train(model, data, recipe, options, epoch_done=show).cpu()
net = to_snn(model, data.test_x[:1])
print(net.verify(data.test_x))
print(net.verify(data.test_x, exact_grid=True))
print(net.report(data.test_x[:1000], labels=data.test_y[:1000]))
if args.save:
    net.save(args.save)
