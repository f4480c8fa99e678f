"""The energies printed by Park & Yoon (arXiv 2106.02568), again from the spikes and steps printed beside them."""

import csv
from decimal import Decimal
from pathlib import Path

import pytest

from snn_sparse_plugin.layers.ttfs.report import HARDWARE, REFERENCES, EnergyReference, energy

TABLE = Path(__file__).parent / "published" / "ttfs_energy.csv"
ROWS = list(csv.DictReader(TABLE.read_text().splitlines()))
REFERENCE = {"CIFAR-10": "tsc-cifar10", "CIFAR-100": "tsc-cifar100"}
ENTRIES = [(row, hardware) for row in ROWS for hardware in HARDWARE]


def half_digit(printed):
    """How far a printed number can be from the one it was rounded from."""
    return float(Decimal(5).scaleb(Decimal(printed).as_tuple().exponent - 1))


def test_the_whole_table_is_here():
    assert len(ENTRIES) == 26


@pytest.mark.parametrize(
    ("row", "hardware"), ENTRIES, ids=[f"{row['dataset']}-{row['method']}-{name}" for row, name in ENTRIES]
)
def test_energy_from_spikes_and_steps(row, hardware):
    reference = REFERENCES[REFERENCE[row["dataset"]]]
    spikes, steps = row["spikes_millions"], float(row["steps"])

    def derived(millions, unit=0.0):
        against = EnergyReference(reference.spikes + unit, reference.steps)
        return energy(1e6 * millions, steps, against)[hardware]

    printed = row[f"energy_{hardware.lower()}"]
    # the spikes are rounded too, the reference's among them: 25 million are 24.5 to 25.5
    low = derived(float(spikes) - half_digit(spikes), +500.0)
    high = derived(float(spikes) + half_digit(spikes), -500.0)
    if float(spikes) * 1e6 == reference.spikes:  # the reference itself: both are the same number
        low = high = derived(float(spikes))
    assert low - half_digit(printed) <= float(printed) <= high + half_digit(printed)
    # and from the rounded numbers as they stand it is the printed one but for its last digit and three per mille
    assert derived(float(spikes)) == pytest.approx(
        float(printed), abs=half_digit(printed) + 3e-3 * float(printed)
    )
