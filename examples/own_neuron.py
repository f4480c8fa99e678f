"""A neuron of your own, by its equations: an adaptive threshold that every spike raises, trained on a toy task.

Run: python examples/own_neuron.py
"""

import torch

from snn_sparse_plugin import Equations, Surrogate
from snn_sparse_plugin.ops import spiking_layer

ADAPTIVE = Equations(
    """
    v = beta * v + x - above(v - threshold - b) * threshold
    s = spike(v - threshold - b)
    b = rho * b + jump * detach(s)
    """,
    states=("v", "b"),
)


def main() -> None:
    torch.manual_seed(0)
    T, B, inputs, hidden = 100, 64, 80, 50
    # two classes: the first or the second half of the inputs is the busier one
    target = torch.randint(2, (B,))
    rate = torch.full((B, inputs), 0.03)
    rate[target == 0, : inputs // 2] = 0.06
    rate[target == 1, inputs // 2 :] = 0.06
    x = (torch.rand(T, B, inputs) < rate).float()

    weight = (torch.randn(hidden, inputs) * 0.3).requires_grad_()
    readout = (torch.randn(2, hidden) * 0.1).requires_grad_()
    rho = torch.full((hidden,), 0.95, requires_grad=True)  # learned, as every parameter may be
    optimizer = torch.optim.Adam([weight, readout, rho], lr=1e-2)
    for epoch in range(30):
        params = {"beta": 0.9, "threshold": 1.0, "rho": rho.clamp(0, 1), "jump": 0.1}
        out = spiking_layer(
            x, weight, spec=ADAPTIVE, params=params, surrogate=Surrogate("fast_sigmoid", (25.0,))
        )
        logits = out.spikes.mean(0) @ readout.t() * 10
        loss = torch.nn.functional.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch % 10 == 9:
            accuracy = (logits.argmax(1) == target).float().mean()
            print(
                f"epoch {epoch + 1}: loss {loss:.3f}, accuracy {accuracy:.2f}, spikes {out.spikes.mean():.3f}, "
                f"neuron-steps with a gradient {out.active_fraction:.2f}, rho {rho.mean():.3f}"
            )


if __name__ == "__main__":
    main()
