"""snnTorch: event-camera recordings (N-MNIST) as frames, a convolutional network with hidden states.

``--root`` is the folder of the data set's Train.zip and Test.zip, or of Train/ and Test/ with one folder a digit.
"""

import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tutorial import Clock, arguments, batches, library, report, sparse

args = arguments(__doc__, epochs=8)
if args.root is None:
    sys.exit("this tutorial needs the N-MNIST recordings: --root FOLDER")
snn = library("snntorch", args.mode)
from snntorch import surrogate, utils  # noqa: E402

num_steps, batch_size, window = 20, 50, 15_000  # microseconds a frame


def recordings(part):
    """-> frames (samples, T, 2, 34, 34) of 0 and 1, and labels."""
    folder, archive = Path(args.root) / part, Path(args.root) / f"{part}.zip"
    if folder.is_dir():
        files = [(int(p.parent.name), p.read_bytes()) for p in sorted(folder.rglob("*.bin"))]
    else:
        with zipfile.ZipFile(archive) as found:
            names = sorted(n for n in found.namelist() if n.endswith(".bin"))
            files = [(int(Path(n).parent.name), found.read(n)) for n in names]
    frames = torch.zeros(len(files), num_steps, 2, 34, 34)
    for index, (_, data) in enumerate(files):
        raw = np.frombuffer(data, np.uint8).reshape(-1, 5).astype(np.int64)
        time = ((raw[:, 2] & 127) << 16) | (raw[:, 3] << 8) | raw[:, 4]
        step = time // window
        keep = (step < num_steps) & (raw[:, 0] < 34) & (raw[:, 1] < 34)
        x, y, polarity = raw[keep, 0], raw[keep, 1], raw[keep, 2] >> 7
        frames[index, step[keep], polarity, y, x] = 1
    return frames, torch.tensor([label for label, _ in files])


grad = surrogate.atan()
neuron = {"spike_grad": grad, "init_hidden": True}
net = nn.Sequential(
    nn.Conv2d(2, 12, 5),
    snn.Leaky(beta=0.5, **neuron),
    nn.MaxPool2d(2),
    nn.Conv2d(12, 32, 5),
    snn.Leaky(beta=0.5, **neuron),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(32 * 5 * 5, 10),
    snn.Leaky(beta=0.5, output=True, **neuron),
)


def forward_pass(net, data):  # data: (T, B, 2, 34, 34)
    spk_rec = []
    utils.reset(net)
    for step in range(data.size(0)):
        spk_out, _ = net(data[step])
        spk_rec.append(spk_out)
    return torch.stack(spk_rec)


(train_x, train_y), (test_x, test_y) = recordings("Train"), recordings("Test")
optimizer, clock = torch.optim.Adam(net.parameters(), lr=2e-3), Clock()
with sparse(args.mode):
    for epoch in range(args.epochs):
        for batch in batches(len(train_x), batch_size):
            spk_rec = forward_pass(net, train_x[batch].transpose(0, 1))
            loss = F.cross_entropy(spk_rec.mean(0) * 10, train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clock.tick(loss)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    clock.stop()
    with torch.no_grad():
        spk_rec = forward_pass(net, test_x.transpose(0, 1))
        accuracy = 100 * (spk_rec.sum(0).argmax(1) == test_y).float().mean().item()
report(loss, accuracy, clock)
