"""Image sets as tensors in memory. Nothing is downloaded."""

from __future__ import annotations

import gzip
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError, InputError, MissingDependencyError
from ..files import reading, unpack
from .official import FOLDERS, how_to_fetch

NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100")

_IMAGES, _LABELS = 0x00000803, 0x00000801  # idx magic: unsigned bytes in three dimensions, in one


@dataclass(frozen=True)
class ImageData:
    """Images in [0, 1], flattened to float32 (samples, pixels), and their labels, int64 (samples,)."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int = 10

    @property
    def pixels(self) -> int:
        return self.train_x.shape[1]

    def limited(self, samples: int | None) -> ImageData:
        """At most ``samples`` training images, and test images in proportion; None or 0 keeps all."""
        if not samples or samples >= len(self.train_y):
            return self
        test = max(1, len(self.test_y) * samples // len(self.train_y))
        return ImageData(
            self.name,
            self.train_x[:samples],
            self.train_y[:samples],
            self.test_x[:test],
            self.test_y[:test],
            self.classes,
        )


def load_images(name: str = "digits", root: str | Path | None = None) -> ImageData:
    """An image set by name.

    ``"digits"`` is scikit-learn's 1797 handwritten 8x8 digits, 1437 for training and 360 for testing.
    ``"mnist"`` and ``"fashion-mnist"`` are the published idx files, plain or gzipped, in ``root`` itself or
    in torchvision's layout below it (``MNIST/raw``, ``FashionMNIST/raw``). ``"cifar10"`` and ``"cifar100"`` are a file
    ``cifar10.npz`` in ``root`` with ``train_x``, ``test_x``, uint8 (N, 3, 32, 32) or (N, 32, 32, 3), and ``train_y``,
    ``test_y``, or torchvision's files, which torchvision reads; pixels are ordered channel, row, column.

    Raises:
        ConfigError: an unknown name, or no ``root`` where one is needed.
        InputError: a file that is missing, truncated, or something else.
        MissingDependencyError: scikit-learn, or torchvision where it is needed, is not installed.

    Example:
        >>> load_images("digits").train_x.shape
        torch.Size([1437, 64])
    """
    if name == "digits":
        return _digits()
    if name not in NAMES:
        raise ConfigError(f"no image set {name!r}; known: {', '.join(NAMES)}.")
    if root is None:
        raise ConfigError(
            f"{name} is read from disk: say where with --root DIR (root=...). {how_to_fetch(name)}"
        )
    root = Path(root).expanduser()
    if name.startswith("cifar"):
        return _cifar(name, root)
    train, test = read_levels(name, root)[0].values()
    train_x, test_x = (torch.from_numpy(levels.astype(np.float32) / 255) for levels, _ in (train, test))
    return ImageData(name, train_x, torch.from_numpy(train[1]), test_x, torch.from_numpy(test[1]))


def read_levels(name: str, root: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], Tensor]:
    """Digits or an idx set as it is stored: ``"train"`` and ``"test"``, levels (samples, pixels) and int64 labels.

    Second comes the intensity of each level, float32.
    """
    if name == "digits":
        data = _digits()
        levels = ((data.train_x * 16).numpy().astype(np.uint8), (data.test_x * 16).numpy().astype(np.uint8))
        parts = {"train": (levels[0], data.train_y.numpy()), "test": (levels[1], data.test_y.numpy())}
        return parts, torch.arange(17) / 16
    folder = _find_folder(name, root)
    parts = {"train": _pair(folder, "train"), "test": _pair(folder, "t10k")}
    train, test = parts["train"][0], parts["test"][0]
    if train.shape[1] != test.shape[1]:
        raise InputError(
            f"{folder}: training images have {train.shape[1]} pixels, test images {test.shape[1]}."
        )
    return parts, torch.arange(256) / 255


def _digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError("the digits come with scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    # neighbours in the file are by one writer: shuffle before the split, always in the same way
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(digits.target)))
    x = torch.from_numpy(digits.data / 16).float()[order]
    y = torch.from_numpy(digits.target).long()[order]
    split = len(y) * 4 // 5
    return ImageData("digits", x[:split], y[:split], x[split:], y[split:])


def _cifar(name: str, root: Path) -> ImageData:
    classes, file = int(name.removeprefix("cifar")), root / f"{name}.npz"
    if file.is_file():
        names = ("train_x", "train_y", "test_x", "test_y")
        missing = "It does not hold train_x, train_y, test_x and test_y as they are: make it again."
        with reading(file, "an .npz file", missing):
            found = unpack.arrays(file, names.__contains__)
            arrays = [found[key] for key in names]
    else:
        try:
            from torchvision import datasets
        except (ImportError, RuntimeError, OSError) as error:  # a broken installation fails in its own way
            raise MissingDependencyError(
                f"there is no {file}, and the original files are read by torchvision, which cannot be imported: "
                f"pip install torchvision ({error})"
            ) from error
        kind = getattr(datasets, name.upper())
        try:
            parts = [kind(str(root), train=train) for train in (True, False)]
        except (
            Exception
        ) as error:  # pickles, which torchvision opens where their checksums are the official ones
            raise InputError(
                f"no {name} files in {root}, neither {file.name} nor torchvision's: {error}"
            ) from error
        arrays = [array for part in parts for array in (part.data, np.array(part.targets))]
    tensors = []
    for images, labels in (arrays[:2], arrays[2:]):
        if images.dtype != np.uint8 or images.shape[1:] not in ((3, 32, 32), (32, 32, 3)):
            raise InputError(
                f"{root}: {name} images are uint8 (N, 3, 32, 32), got {images.dtype} {images.shape}."
            )
        labels = labels.reshape(-1) if labels.shape == (len(images), 1) else labels
        whole = labels.shape == (len(images),) and labels.dtype.kind in "iu"
        if not whole or not len(labels) or labels.min() < 0 or labels.max() >= classes:
            raise InputError(
                f"{root}: {len(images)} {name} images need as many whole labels, 0 to {classes - 1}."
            )
        images = images if images.shape[1] == 3 else images.transpose(0, 3, 1, 2)
        tensors.append(torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 255))
        tensors.append(torch.from_numpy(labels.astype(np.int64)))
    train_x, train_y, test_x, test_y = tensors
    return ImageData(name, train_x, train_y, test_x, test_y, classes)


def _find_folder(name: str, root: Path) -> Path:
    if not root.is_dir():
        raise InputError(
            f"{root} is not a folder; --root names the folder that holds the idx files of {name}. "
            f"{how_to_fetch(name)}"
        )
    candidates = (root, root / FOLDERS[name])
    for folder in candidates:
        if any(folder.glob("train-images-idx3-ubyte*")):
            return folder
    raise InputError(
        f"no {name} files in {root}: expected train-images-idx3-ubyte[.gz] and its three companions in "
        f"{' or '.join(str(c) for c in candidates)}. {how_to_fetch(name)}"
    )


def _pair(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images = _read_idx(folder, f"{part}-images-idx3-ubyte", _IMAGES)
    labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", _LABELS)
    if len(images) != len(labels):
        raise InputError(f"{folder}: {len(images)} {part} images but {len(labels)} labels.")
    if len(labels) == 0:
        raise InputError(f"{folder}: the {part} files hold no image.")
    if labels.max() > 9:
        raise InputError(f"{folder}: {part} labels go up to {labels.max()}, expected classes 0 to 9.")
    return images.reshape(len(images), -1), labels.astype(np.int64)


def _read_idx(folder: Path, stem: str, magic: int) -> np.ndarray:
    """An idx file: magic, one big-endian int32 per dimension, then bytes."""
    path = next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)
    if path is None:
        raise InputError(f"{folder / stem}[.gz] is missing.")
    with (
        reading(path, "a complete gzip file" if path.suffix == ".gz" else "an idx file", "Fetch it again."),
        gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file,
    ):
        return _idx(path, file, magic)


def _idx(path: Path, file: Any, magic: int) -> np.ndarray:
    packed = path.stat().st_size
    dims = magic & 0xFF
    head = file.read(4 * (dims + 1))
    header = np.frombuffer(head, dtype=">i4") if len(head) == 4 * (dims + 1) else None
    if header is None or header[0] != magic or (header[1:] < 0).any():
        raise InputError(
            f"{path} is not an idx file of {'images' if magic == _IMAGES else 'labels'}: it starts with "
            f"0x{head[:4].hex() or '(nothing)'}, expected 0x{magic:08x}."
        )
    shape = tuple(int(n) for n in header[1:])
    expected = math.prod(shape)
    unpack.check_bound(expected, packed)
    body = unpack.read_bounded(file, packed, expected + 1)
    if len(body) != expected:
        found = f"more than {expected}" if len(body) > expected else f"{len(body)}"
        raise InputError(
            f"{path} holds {found} bytes of data, its header promises {expected}, shape {shape}; "
            f"fetch it again."
        )
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)
