"""How large everything is: as published, small enough for a CPU, or with few steps to compile kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from snn_sparse_plugin.bench.problem import Config


class Face(NamedTuple):
    """A model as a user writes it. ``inputs``: features, or the side of an image; ``hidden``: neurons or channels."""

    T: int
    B: int
    inputs: int
    hidden: tuple[int, ...]
    classes: int


@dataclass(frozen=True)
class Sizes:
    """``scan`` is one (T, B) for all its widths; ``rounds`` and ``seconds`` bound the timed steps of a provider."""

    net: Config
    net_steps: tuple[int, ...]
    published: Config
    widths: tuple[int, ...]
    layer: Config
    densities: tuple[float, ...]
    compiled: tuple[int, ...]
    scan: tuple[int, int]
    scan_widths: tuple[int, ...]
    classifier: Face
    convolution: Face
    recurrent: Face
    lsnn: Face
    chunk: int
    elements: int
    rounds: int
    seconds: float
    threads: int

    def short(self) -> Sizes:
        """The same widths and batches over few steps: what is compiled for these runs the full sizes.

        Triton compiles a kernel anew where an integer becomes divisible by 16, and some count rows (T x B) and words
        of 32 of them. So the batch stays, and T keeps its power of two.
        """

        def few(face: Face) -> Face:
            return face._replace(T=_few(face.T))

        return replace(
            self,
            net_steps=tuple(dict.fromkeys(map(_few, self.net_steps))),
            published=replace(self.published, steps=_few(self.published.steps)),
            layer=replace(self.layer, steps=_few(self.layer.steps)),
            scan=(_few(self.scan[0]), self.scan[1]),
            classifier=few(self.classifier),
            convolution=few(self.convolution),
            recurrent=few(self.recurrent),
            # a whole chunk and the rest that is left over
            lsnn=self.lsnn._replace(T=self.chunk + self.lsnn.T % self.chunk),
        )


def _few(T: int) -> int:
    return min(T, 5 * (T & -T))


FULL = Sizes(
    net=Config(),
    net_steps=(100, 500),
    published=Config(op="s3gd", layers=(200, 200), steps=500, batch=256, window=0.2, rate=0.003),
    widths=(200, 800, 400),
    layer=Config(op="layer", layers=(200,)),
    densities=(0.02, 0.1, 0.5, 0.005),
    compiled=(10, 25),
    scan=(500, 256),
    scan_widths=(1000, 200, 4000),
    classifier=Face(25, 128, 784, (1000,), 10),
    convolution=Face(50, 128, 28, (12, 64), 10),
    recurrent=Face(250, 256, 700, (512,), 512),
    lsnn=Face(1000, 512, 700, (256,), 20),
    chunk=64,
    elements=10_000_000,
    rounds=20,
    seconds=1.0,
    threads=2,
)
_net = Config(inputs=30, layers=(20, 15, 5), batch=4, density=0.1, rate=0.06)
SMALL = Sizes(
    net=_net,
    net_steps=(8, 12),
    published=replace(_net, op="s3gd", layers=(10, 10), steps=12, window=0.2),
    widths=(10, 20),
    layer=replace(_net, op="layer", layers=(20,), steps=8),
    densities=(0.1, 0.5),
    compiled=(3,),
    scan=(12, 4),
    scan_widths=(33, 20),
    classifier=Face(5, 4, 30, (20,), 5),
    convolution=Face(4, 2, 16, (2, 3), 5),
    recurrent=Face(6, 3, 20, (12,), 12),
    lsnn=Face(10, 3, 20, (12,), 4),
    chunk=4,
    elements=1000,
    rounds=2,
    seconds=0.2,
    threads=1,
)
