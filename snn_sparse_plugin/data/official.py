"""The official files: their checksums, and tonic and torchvision to fetch them."""

from __future__ import annotations

import hashlib
from importlib import import_module
from pathlib import Path

from ..core.errors import InputError, MissingDependencyError
from ..files import reading, reason

# MD5 by lower-case file name, as torchvision.datasets (images) and tonic.datasets (recordings) give them
CHECKSUMS: dict[str, dict[str, str]] = {
    "mnist": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    "n-mnist": {
        "train.zip": "20959b8e626244a1b502305a9e6e2031",
        "test.zip": "69ca8762b2fe404d9b9bad1103e97832",
    },
    "dvs-gesture": {
        "ibmgesturetrain.tar.gz": "3a8f0d4120a166bac7591f77409cb105",
        "ibmgesturetest.tar.gz": "56070e45dadaa85fff82e0fbfbc06de5",
    },
    "shd": {
        "shd_train.h5.zip": "f3252aeb598ac776c1b526422d90eecb",
        "shd_test.h5.zip": "1503a5064faa34311c398fb0a1ed0a6f",
    },
    "ssc": {
        "ssc_train.h5.zip": "d102be95e7144fcc0553d1f45ba94170",
        "ssc_valid.h5.zip": "b4eee3516a4a90dd0c71a6ac23a8ae43",
        "ssc_test.h5.zip": "a35ff1e9cffdd02a20eb850c17c37748",
    },
}

# where torchvision and tonic put the files of a set, below the folder they are given; and their classes
FOLDERS = {
    "mnist": "MNIST/raw",
    "fashion-mnist": "FashionMNIST/raw",
    "n-mnist": "NMNIST",
    "dvs-gesture": "DVSGesture",
    "shd": "SHD",
    "ssc": "SSC",
}
_TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}


def how_to_fetch(name: str) -> str:
    """The line of Python that downloads a set, for messages.

    Example:
        >>> how_to_fetch("shd")
        "snn_sparse_plugin.data.load_spikes('shd', DIR, download=True) fetches it into DIR."
    """
    if name.startswith("cifar"):
        return f"torchvision.datasets.{name.upper()}(DIR, download=True) fetches it into DIR."
    return f"snn_sparse_plugin.data.load_spikes({name!r}, DIR, download=True) fetches it into DIR."


def check_files(name: str, root: str | Path) -> dict[Path, bool]:
    """For every file of a set that has an official checksum: whether it is the official one.

    Looks at the packed files, as they are published, in ``root`` and in the folder of torchvision or tonic below it.
    """
    known = CHECKSUMS.get(name, {})
    found = {}
    root = Path(root).expanduser()
    for folder in (root, root / FOLDERS.get(name, "")):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.name.lower() in known:
                found[path] = _md5(path) == known[path.name.lower()]
    return found


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with reading(path, "a file that can be compared"), path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download_set(name: str, root: str | Path) -> None:
    """Fetch the files of a set that are not in ``root`` yet, check and unpack them: torchvision's or tonic's work.

    Raises:
        MissingDependencyError: the library that does it is not installed.
        InputError: it failed; the message says what it said.
    """
    if name not in FOLDERS:
        return
    library = "torchvision" if name in _TORCHVISION else "tonic"
    try:
        datasets = import_module(f"{library}.datasets")
    except (ImportError, RuntimeError, OSError) as error:  # a broken installation fails in its own way
        raise MissingDependencyError(
            f"{name} is downloaded by {library}, which cannot be imported: pip install {library} ({error})"
        ) from error
    kind = getattr(datasets, _TORCHVISION.get(name, FOLDERS[name]))
    try:
        if name == "ssc":
            for split in ("train", "valid", "test"):
                kind(str(root), split=split)
        elif name in _TORCHVISION:
            kind(str(root), download=True)
        else:
            for train in (True, False):
                kind(str(root), train=train)
    except Exception as error:  # of the network, the disk, or what was fetched
        raise InputError(f"{library} could not fetch {name} into {root}: {reason(error)}.") from error
