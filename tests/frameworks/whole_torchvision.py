"""Import this before Lightning, which imports torchvision wherever it is installed.

Norse brings torchvision, whose published wheel cannot be imported beside a CPU build of torch: it describes operators
that its library, built for another torch, did not define. Here they are defined, and never called.
"""

import re
import sys
from contextlib import suppress

import torch

library = torch.library.Library("torchvision", "FRAGMENT")
while True:
    try:
        with suppress(ImportError):
            import torchvision  # noqa: F401
        break
    except RuntimeError as error:
        missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
        if missing is None:
            raise
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library.define(f"{missing[1]}(Tensor x) -> Tensor")
