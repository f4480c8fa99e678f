"""Files that are damaged by chance, read in a process of their own: ``python file_fuzz.py FIRST COUNT READER…``.

A reader gives sane tensors or raises an error of this package; anything else ends the process with the seed of the
case, and a crash ends it with a signal.
"""

import copy
import gzip
import json
import math
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from snn_sparse_plugin.core.errors import SparsePluginError
from snn_sparse_plugin.data import SpikeFile, load_images, load_spikes

ODD = [
    *(None, True, 0, -1, 1, 3, 255, 256, 2**31, 2**62, -(2**63), 10**30, 1e300, math.nan, math.inf, -0.5),
    *("", "max", "avg", b"x", (), [], {}, (0, 0), (1, 10**9), (-1, 1), (3, 3), [2, 2, 2], {"a": 1}),
]


class Draw:
    """Choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, *options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def below(self, bound: int) -> int:
        return int(self.rng.integers(max(1, bound)))


# --- damage ---


def damaged_bytes(data: bytes, draw: Draw) -> bytes:
    kind, at = draw("cut", "flip", "zero", "insert", "swap", "repeat"), draw.below(len(data))
    raw, size = bytearray(data), 1 + draw.below(40)
    if kind == "cut":
        return data[:at]
    if kind == "flip":
        for _ in range(draw(1, 1, 3, 30)):
            raw[draw.below(len(raw))] ^= 1 << draw.below(8)
    elif kind == "zero":
        raw[at : at + size] = bytes(len(raw[at : at + size]))
    elif kind == "insert":
        raw[at:at] = draw.rng.bytes(size)
    elif kind == "swap":
        other = draw.below(len(data))
        raw[at : at + size], raw[other : other + size] = raw[other : other + size], raw[at : at + size]
    else:
        raw[at:at] = raw[at : at + size]
    return bytes(raw)


def damaged_tensor(x: torch.Tensor, draw: Draw) -> Any:
    kind = draw("value", "values", "dtype", "grow", "shrink", "rank", "empty", "expand", "odd")
    if kind in ("value", "values") and x.numel():
        x = x.clone()
        value = draw(math.nan, math.inf, -math.inf, 1e30, -1.0, 0.0, 255.0, 1e-38)
        if not x.is_floating_point():
            value = int(draw(0, 1, 2, 100, 255))
        if kind == "values":
            return torch.full_like(x, value)
        x.view(-1)[draw.below(x.numel())] = value
        return x
    if kind == "dtype":
        return x.to(draw(torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64))
    if kind == "grow":
        return torch.cat([x, x]) if x.dim() else x.repeat(3)
    if kind == "shrink" and x.dim():
        return x.narrow(draw.below(x.dim()), 0, 1) if x.numel() else x
    if kind == "rank":
        return draw(x.reshape(-1), x.unsqueeze(0), x.unsqueeze(-1), x.flip(0) if x.dim() else x)
    if kind == "empty":
        return x.new_zeros(0)
    if kind == "expand" and x.numel():
        return x.reshape(-1)[:1].expand(draw(5, 100_000))
    return draw(*ODD)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a tree of dicts and lists at which something can be put."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from places(tree[key])


def damaged_tree(tree: Any, draw: Draw) -> Any:
    tree = copy.deepcopy(tree)
    for _ in range(draw(1, 1, 1, 2, 4)):
        spots = list(places(tree))
        where, key = spots[draw.below(len(spots))]
        kind, value = draw("change", "change", "change", "drop", "swap", "add"), where[key]
        if kind == "drop":
            del where[key]
        elif kind == "swap":
            other, at = spots[draw.below(len(spots))]
            where[key], other[at] = copy.copy(other[at]), copy.copy(value)
        elif kind == "add" and isinstance(where, dict):
            where[draw("more", 7)] = value
        elif isinstance(value, torch.Tensor):
            where[key] = damaged_tensor(value, draw)
        elif isinstance(value, tuple | list) and value and draw(True, False):
            changed = list(value)
            changed[draw.below(len(changed))] = draw(*ODD)
            where[key] = type(value)(changed)
        else:
            where[key] = draw(*ODD)
    return tree


def damaged_file(path: Path, draw: Draw) -> None:
    path.write_bytes(damaged_bytes(path.read_bytes(), draw))


def damaged_torch_file(path: Path, draw: Draw) -> None:
    if draw(True, False, False, False):
        damaged_file(path, draw)
    else:
        tree = torch.load(path, weights_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(damaged_tree(tree, draw), path)


def damaged_arrays(path: Path, draw: Draw) -> None:
    if draw(True, False, False):
        damaged_file(path, draw)
        return
    with np.load(path) as file:
        tensors: Any = {name: torch.from_numpy(file[name]) for name in file.files}
    damaged = damaged_tree(tensors, draw)
    kept = {
        str(k): v.numpy() if isinstance(v, torch.Tensor) else np.array(v, dtype=None)
        for k, v in damaged.items()
    }
    np.savez(path, **kept)  # type: ignore[arg-type]


# --- readers: what makes whole files in a folder, what damages them, and what reads them ---


class Reader(NamedTuple):
    write: Callable[[Path], None]
    damage: Callable[[Path, Draw], None]
    read: Callable[[Path], None]


def sane(*tensors: torch.Tensor) -> None:
    for x in tensors:
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise AssertionError("values that are not finite were accepted")


@cache
def network(kind: str) -> Any:
    from torch import nn

    from snn_sparse_plugin.layers.ttfs import TTFS, TTFSEncoder, TTFSReadout, to_snn

    torch.manual_seed(0)
    encoder = TTFSEncoder(window=16)
    dense = [encoder, nn.Linear(12, 9), TTFS(window=16), TTFSReadout(9, 5)]
    image = [
        encoder,
        nn.MaxPool2d(2),
        nn.Conv2d(2, 4, 3, 2, 1, groups=2),
        TTFS(window=12),
        nn.MaxPool2d(2, 1),
    ]
    image += [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 3), TTFS(window=9), TTFSReadout(3, 2)]
    x = torch.rand(1, 12) if kind == "dense" else torch.rand(1, 2, 14, 13)
    return to_snn(nn.Sequential(*(dense if kind == "dense" else image)).eval(), x)


def run_network(path: Path) -> None:
    from snn_sparse_plugin.layers.ttfs.network import TTFSNetwork

    net = TTFSNetwork.load(path)
    if math.prod(net.input_shape) > 10**6 or sum(s.neurons for s in net.stages) > 10**6:
        return
    x = torch.rand(3, *net.input_shape, generator=torch.Generator().manual_seed(0))
    for early in (None, 3):
        runs = [net.run(x, early_firing=early, record=True) for _ in range(2)]
        sane(runs[0].output)
        for name, times in runs[0].times.items():
            if not torch.equal(times, runs[1].times[name]):
                raise AssertionError("what was read is not what was written: a kernel left its buffers")
        net.run(x, early_firing=early, simulator="clock")
    for further in (lambda: net.verify(x), lambda: net.report(x), lambda: net.on_grid().verify(x)):
        try:
            further()
        except SparsePluginError:
            continue


def write_images(folder: Path, packed: bool) -> None:
    from test_data import write_set

    write_set(folder, zipped=packed)


def read_images(folder: Path) -> None:
    data = load_images("mnist", folder)
    sane(data.train_x, data.test_x)
    load_spikes("mnist", folder, steps=10)


def write_cifar(folder: Path) -> None:
    from test_data import write_cifar

    write_cifar(folder / "cifar10.npz")


def check_set(data: Any) -> None:
    for part in (data.train, data.test):
        train, labels = part.batch(range(len(part)))
        x = train.to_dense()
        sane(x)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < data.classes:
            raise AssertionError("labels outside the classes")


def any_of(folder: Path, pattern: str, draw: Draw) -> Path:
    paths = sorted(p for p in folder.rglob(pattern) if p.is_file())
    return paths[draw.below(len(paths))]


def write_gestures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for part in ("Train", "Test"):
        for user in range(2):
            place = folder / f"ibmGesture{part}" / f"user{user}"
            place.mkdir(parents=True)
            np.save(place / "3.npy", rng.integers(0, (128, 128, 2, 90), (20, 4)) * 1.0)


def damage_gesture(folder: Path, draw: Draw) -> None:
    path = any_of(folder, "*.npy", draw)
    if draw(True, False):
        damaged_file(path, draw)
        return
    changed = damaged_tensor(torch.from_numpy(np.load(path)), draw)
    np.save(
        path, changed.numpy() if isinstance(changed, torch.Tensor) else np.array(changed), allow_pickle=True
    )


def write_spikes(folder: Path) -> None:
    from test_spike_data import write_shd

    write_shd(folder)


def damage_spikes(folder: Path, draw: Draw) -> None:
    import h5py

    path = folder / "shd_train.h5"
    if draw(True, False, False):
        damaged_file(path, draw)
        return
    with h5py.File(path, "a") as file:
        name = draw("labels", "spikes/times", "spikes/units", "spikes")
        kind = draw("drop", "value", "replace", "replace")
        if kind == "value" and name != "spikes":
            rows = file[name]
            if name == "labels":
                rows[0] = draw(20, 200, 5)
            else:
                row = np.array(rows[0])
                times = math.nan, math.inf, -math.inf, -1.0, 1e300, 5.0
                row[draw.below(len(row))] = draw(*times) if row.dtype.kind == "f" else draw(699, 700, 60_000)
                rows[0] = row
            return
        del file[name]
        if kind == "replace":
            shape = draw((), (0,), (6,), (7,), (6, 2), (2**40,))
            dtype = draw(
                "f4", "i8", "u1", "?", "S3", h5py.vlen_dtype(np.dtype("f8")), h5py.string_dtype(), "c8"
            )
            file.create_dataset(name, shape, dtype, chunks=(1024,) if shape == (2**40,) else None)


def damage_packed_spikes(folder: Path, draw: Draw) -> None:
    path = folder / "shd_train.h5"
    data = path.read_bytes()
    if draw(True, False):
        damage_spikes(folder, draw)
        data = path.read_bytes()
    path.unlink()
    kind = draw(".gz", ".zip")
    target = folder / f"shd_train.h5{kind}"
    if kind == ".gz":
        target.write_bytes(gzip.compress(data))
    else:
        with zipfile.ZipFile(target, "w", draw(0, 8)) as archive:
            archive.writestr(draw("shd_train.h5", "a.h5", "other"), data)
    if draw(True, False):
        damaged_file(target, draw)


def read_spikes(folder: Path) -> None:
    check_set(load_spikes("shd", folder, steps=20, dt=0.05))
    plain = folder / "shd_train.h5"
    if plain.is_file():
        SpikeFile(plain).batch([0], dt=0.01, T=9)


def write_nmnist(folder: Path) -> None:
    from test_recordings import write_nmnist

    write_nmnist(folder, zipped=True)


def damage_nmnist(folder: Path, draw: Draw) -> None:
    path = folder / "Train.zip"
    if draw(True, False):
        damaged_file(path, draw)
        return
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = sorted(files)[draw.below(len(files))]
    data = files.pop(name)
    name = draw(name, name, name, "Train/99/a.bin", "x.bin", "Train/3/../../a.bin")
    with zipfile.ZipFile(path, "w", draw(0, 8, 12, 14)) as archive:
        for n, content in (files | {name: damaged_bytes(data, draw)}).items():
            archive.writestr(n, content)


@cache
def small_study() -> Any:
    from snn_sparse_plugin.core.spikes import SpikeTrain
    from snn_sparse_plugin.data import SpikeData, SpikeDataset
    from snn_sparse_plugin.experiments.settings import Settings
    from snn_sparse_plugin.experiments.training import Trial

    torch.manual_seed(0)
    train = SpikeTrain.from_dense((torch.rand(12, 9, 7) < 0.3).float())
    samples = SpikeDataset.from_spikes(train, torch.arange(9) % 3)
    data = SpikeData("digits", samples, samples, 12, 7, 3, 1e-3)
    return Trial(Settings(data="digits", T=12, hidden=5, layers=2, epochs=1, batch=3), True, 0), data


def write_checkpoint(folder: Path) -> None:
    from snn_sparse_plugin.experiments.training import Training

    trial, data = small_study()
    Training(trial, data, folder).run()


def read_checkpoint(folder: Path) -> None:
    from dataclasses import replace

    from snn_sparse_plugin.experiments.training import Training

    trial, data = small_study()
    longer = replace(trial, settings=trial.settings.changed(epochs=2))
    Training(longer, data, folder).run()


def read_times(path: Path) -> None:
    from snn_sparse_plugin.layers.ttfs.interchange import decode_times, load_spike_times

    net = network("dense")
    for name, times in load_spike_times(path).items():
        assert times.dtype == torch.uint8
        if name in ("input", net.stages[0].name):
            try:
                sane(decode_times(net, name, times))
            except SparsePluginError:
                continue


def write_times(folder: Path) -> None:
    from snn_sparse_plugin.layers.ttfs.interchange import save_spike_times

    save_spike_times(network("dense"), torch.rand(4, 12), folder / "times.npz")


def damage_results(folder: Path, draw: Draw) -> None:
    path = folder / "train.json"
    try:
        text = json.dumps(damaged_tree(json.loads(path.read_text()), draw), default=str)
    except (ValueError, TypeError):  # a tree that holds itself, or keys that JSON has not
        text = ""
    if text and draw(True, False):
        path.write_text(text)
    else:
        damaged_file(path, draw)


def write_results(folder: Path) -> None:
    row = {
        "request": {"seeds": [0]},
        "conditions": {"settings": {"data": "digits"}, "title": "d"},
        "result": [1],
    }
    (folder / "train.json").write_text(json.dumps(row))


def read_results(folder: Path) -> None:
    from snn_sparse_plugin.experiments.settings import Settings
    from snn_sparse_plugin.experiments.study import Study

    study = Study(Settings(data="digits"), folder)
    found = study.results("train")
    assert found is None or isinstance(found["conditions"]["settings"]["data"], str)


READERS = {
    "network-dense": Reader(
        lambda f: network("dense").save(f / "net.pt"),
        lambda f, draw: damaged_torch_file(f / "net.pt", draw),
        lambda f: run_network(f / "net.pt"),
    ),
    "network-image": Reader(
        lambda f: network("image").save(f / "net.pt"),
        lambda f, draw: damaged_torch_file(f / "net.pt", draw),
        lambda f: run_network(f / "net.pt"),
    ),
    "spike-times": Reader(
        write_times,
        lambda f, draw: damaged_arrays(f / "times.npz", draw),
        lambda f: read_times(f / "times.npz"),
    ),
    "idx": Reader(
        lambda f: write_images(f, False),
        lambda f, draw: damaged_file(any_of(f, "*ubyte", draw), draw),
        read_images,
    ),
    "idx-gz": Reader(
        lambda f: write_images(f, True),
        lambda f, draw: damaged_file(any_of(f, "*.gz", draw), draw),
        read_images,
    ),
    "cifar": Reader(
        write_cifar,
        lambda f, draw: damaged_arrays(f / "cifar10.npz", draw),
        lambda f: sane(load_images("cifar10", f).train_x),
    ),
    "gesture": Reader(
        write_gestures, damage_gesture, lambda f: check_set(load_spikes("dvs-gesture", f, steps=5))
    ),
    "n-mnist": Reader(write_nmnist, damage_nmnist, lambda f: check_set(load_spikes("n-mnist", f, steps=5))),
    "hdf5": Reader(write_spikes, damage_spikes, read_spikes),
    "hdf5-packed": Reader(write_spikes, damage_packed_spikes, read_spikes),
    "checkpoint": Reader(
        write_checkpoint, lambda f, draw: damaged_torch_file(f / "checkpoint.pt", draw), read_checkpoint
    ),
    "results": Reader(write_results, damage_results, read_results),
}


def main(name: str, first: int, count: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    reader = READERS[name]
    accepted = 0
    with tempfile.TemporaryDirectory() as whole:
        reader.write(Path(whole))
        reader.read(Path(whole))  # undamaged
        files = {p.relative_to(whole): p.read_bytes() for p in Path(whole).rglob("*") if p.is_file()}
    for seed in range(first, first + count):
        print(f"{name} {seed}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for path, data in files.items():
                target = Path(folder) / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            reader.damage(Path(folder), Draw(seed))
            try:
                reader.read(Path(folder))
                accepted += 1
            except SparsePluginError as error:
                lines = str(error).splitlines()
                if len(lines) != 1 or not any(str(p) in lines[0] for p in (folder, "the state")):
                    raise AssertionError(f"one line that names the file, got {error}") from error
    print(f"{name}: {accepted} of {count} were accepted")


if __name__ == "__main__":
    for reader in sys.argv[3:]:
        main(reader, int(sys.argv[1]), int(sys.argv[2]))
