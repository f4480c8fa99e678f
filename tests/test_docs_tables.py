"""Tables of the documentation are those of the rows that were measured."""

import json
import runpy
from pathlib import Path

EXPECT = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "expect.py"))


def test_what_to_expect_is_current():
    page, rows = EXPECT["PAGE"].read_text(), json.loads(EXPECT["ROWS"].read_text())
    assert page == EXPECT["with_table"](page, rows), "run: python benchmarks/expect.py --table"


def test_the_first_sentence_of_what_to_expect_is_the_tables():
    """How many times faster, with the default surrogate; the README says the same."""
    rows = {
        (str(row["shape"]), row["layer_rates"][0], row["provider"]): row["step_ms"]["median"]
        for row in json.loads(EXPECT["ROWS"].read_text())
        if row["surrogate"] == "atan(2)"
    }
    page, readme = EXPECT["PAGE"].read_text(), (EXPECT["PAGE"].parents[1] / "README.md").read_text()
    for provider in ("sparse-loop", "sparse"):
        ratios = [
            rows[shape, rate, "snntorch"] / time
            for (shape, rate, name), time in rows.items()
            if name == provider
        ]
        said = f"{min(ratios):.1f} to {max(ratios):.1f} times"
        assert said in page
        assert said in readme


def test_every_way_and_surrogate_has_a_figure():
    rows = json.loads(EXPECT["ROWS"].read_text())
    assert {row["provider"] for row in rows} == set(EXPECT["WAYS"])
    assert {row["surrogate"] for row in rows} == {
        f"{kind}({slope:g})" for kind, slope in EXPECT["SURROGATES"]
    }
    assert all(row["skipped"] is None for row in rows)
