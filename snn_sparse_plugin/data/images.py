"""Image sets as tensors in memory. Nothing is downloaded."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, InputError, MissingDependencyError

NAMES = ("digits", "mnist", "fashion-mnist")

_FOLDERS = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw"}
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
    in torchvision's layout below it (``MNIST/raw``, ``FashionMNIST/raw``).

    Raises:
        ConfigError: an unknown name, or no ``root`` where one is needed.
        InputError: a file that is missing, truncated, or something else.
        MissingDependencyError: scikit-learn is not installed.

    Example:
        >>> load_images("digits").train_x.shape
        torch.Size([1437, 64])
    """
    if name == "digits":
        return _digits()
    if name not in _FOLDERS:
        raise ConfigError(f"no image set {name!r}; known: {', '.join(NAMES)}.")
    if root is None:
        raise ConfigError(f"{name} is read from disk: say where with --root DIR (root=...).")
    folder = _find_folder(name, Path(root))
    train_x, train_y = _pair(folder, "train")
    test_x, test_y = _pair(folder, "t10k")
    if train_x.shape[1] != test_x.shape[1]:
        raise InputError(
            f"{folder}: training images have {train_x.shape[1]} pixels, test images {test_x.shape[1]}."
        )
    return ImageData(name, train_x, train_y, test_x, test_y)


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


def _find_folder(name: str, root: Path) -> Path:
    if not root.is_dir():
        raise InputError(
            f"{root} is not a folder; --root names the folder that holds the idx files of {name}."
        )
    candidates = (root, root / _FOLDERS[name])
    for folder in candidates:
        if any(folder.glob("train-images-idx3-ubyte*")):
            return folder
    raise InputError(
        f"no {name} files in {root}: expected train-images-idx3-ubyte[.gz] and its three companions in "
        f"{' or '.join(str(c) for c in candidates)}."
    )


def _pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images = _read_idx(folder, f"{part}-images-idx3-ubyte", _IMAGES)
    labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", _LABELS)
    if len(images) != len(labels):
        raise InputError(f"{folder}: {len(images)} {part} images but {len(labels)} labels.")
    if len(labels) == 0:
        raise InputError(f"{folder}: the {part} files hold no image.")
    if labels.max() > 9:
        raise InputError(f"{folder}: {part} labels go up to {labels.max()}, expected classes 0 to 9.")
    x = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32) / 255)
    return x, torch.from_numpy(labels.astype(np.int64))


def _read_idx(folder: Path, stem: str, magic: int) -> np.ndarray:
    """An idx file: magic, one big-endian int32 per dimension, then bytes."""
    path = next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)
    if path is None:
        raise InputError(f"{folder / stem}[.gz] is missing.")
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} is not a complete gzip file ({error}); fetch it again.") from error
    dims = magic & 0xFF
    header = np.frombuffer(data[: 4 * (dims + 1)], dtype=">i4") if len(data) >= 4 * (dims + 1) else None
    if header is None or header[0] != magic or (header[1:] < 0).any():
        raise InputError(
            f"{path} is not an idx file of {'images' if magic == _IMAGES else 'labels'}: it starts with "
            f"0x{data[:4].hex() or '(nothing)'}, expected 0x{magic:08x}."
        )
    shape = tuple(int(n) for n in header[1:])
    body, expected = len(data) - header.nbytes, int(np.prod(shape, dtype=np.int64))
    if body != expected:
        raise InputError(
            f"{path} holds {body} bytes of data, its header promises {expected}, shape {shape}; "
            f"fetch it again."
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header.nbytes).reshape(shape)
