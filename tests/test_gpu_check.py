"""The check for machines with a GPU, tried without one: every part runs, at sizes that say nothing about speed."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu_check
from gpu import clock, compare, networks, parts, sizes, workers

from snn_sparse_plugin.bench.measure import Steps
from snn_sparse_plugin.core.errors import MissingDependencyError

LIMITS = dict.fromkeys(parts.PARTS, 60.0)


def small_run(seconds: float = 600.0) -> clock.Run:
    return clock.Run(sizes.SMALL, "cpu", time.monotonic() + seconds)


def rows_of(part: str, path: Path, run: clock.Run | None = None) -> list[dict]:
    """The rows of a part, those of a provider made one."""
    assert workers.measure([part], run or small_run(), path, 0, LIMITS) == 0
    found: dict[tuple[str, str], dict] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "row" in row:
            found.setdefault((row["row"], row["provider"]), {}).update(row)
    return list(found.values())


# --- the parts ---


def test_all_parts_fit_into_eight_minutes() -> None:
    assert sum(parts.PARTS.values()) + parts.COMPILE_SECONDS <= 60 * parts.MINUTES - gpu_check.RESERVE


def test_training_steps_and_missing_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("snntorch")
    pytest.importorskip("norse")
    monkeypatch.setitem(sys.modules, "spikingjelly.activation_based", None)
    rows = rows_of("network", tmp_path / "rows")
    skipped = [row for row in rows if "skipped" in row]
    assert [row["provider"] for row in skipped] == ["spikingjelly"] * 2
    assert "pip install 'spikingjelly>=2.0.0'" in skipped[0]["skipped"]
    measured = [row for row in rows if "skipped" not in row]
    assert [row["provider"] for row in measured] == ["sparse", "sparse-events", "snntorch", "norse"] * 2
    assert not [row["failed"] for row in measured if "failed" in row]
    assert all(0 < row["host_ms"]["median"] <= row["wall_ms"]["median"] for row in measured)
    ours = [row for row in measured if row["role"] == "ours"]
    assert all(row["graph_error"] == row["device_error"] == "needs a GPU" for row in ours)


@pytest.mark.slow
def test_published_protocol(tmp_path: Path) -> None:
    pytest.importorskip("snntorch")
    rows = rows_of("s3gd", tmp_path / "rows")
    assert [row["provider"] for row in rows] == ["sparse", "snntorch"] * 3
    assert [row["shape"]["layers"] for row in rows[::2]] == [[10, 10], [20, 20], [10, 10]]
    assert all(row["wall_ms"]["median"] > 0 and row["phase"] == "backward" for row in rows)


def test_bandwidth_counts_what_has_to_move(tmp_path: Path) -> None:
    rows = rows_of("scan", tmp_path / "rows")
    assert [row["provider"] for row in rows] == ["copy", "forward", "backward"] * 2
    neuron_steps = 12 * 4 * 33
    assert [row["bytes"] for row in rows[:3]] == [8 * neuron_steps, 8 * neuron_steps, 12 * neuron_steps]
    for row in rows:
        seconds = row["queued_ms"]["median"] / 1e3
        assert row["gigabytes_per_second"] == pytest.approx(row["bytes"] / seconds / 1e9)
        assert 0 < row["spike_rate"] < 0.5
    assert rows[0]["share_of_copy"] == rows[3]["share_of_copy"] == 1


@pytest.mark.slow
def test_what_users_write(tmp_path: Path) -> None:
    pytest.importorskip("snntorch")
    rows = rows_of("faces", tmp_path / "rows")
    assert not [row["failed"] for row in rows if "failed" in row]
    providers = {row["provider"] for row in rows if "wall_ms" in row}
    assert providers >= {
        "sparse_mode",
        "sparse-loop",
        "auto",
        "TTFS",
        "fake_quantise",
        "EProp.run",
        "snntorch",
    }
    assert len({row["row"] for row in rows}) == 7


@pytest.mark.slow
def test_memory(tmp_path: Path) -> None:
    pytest.importorskip("snntorch")
    rows = rows_of("memory", tmp_path / "rows")
    kept = {row["provider"]: row["kept_bytes_per_neuron_step"] for row in rows if row["row"].startswith("net")
            and "skipped" not in row}  # fmt: skip
    assert 0 < kept["sparse"] < kept["snntorch"]
    assert all(row["peak_error"] == "needs a GPU" for row in rows if "skipped" not in row)


@pytest.mark.slow
def test_compile_and_density(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("snntorch")
    # that it compiles is not our matter, and takes long
    monkeypatch.setattr(torch, "compile", lambda net: net)
    compiled = rows_of("compile", tmp_path / "compile")
    assert [row["provider"] for row in compiled] == ["sparse", "compile", "snntorch"]
    density = rows_of("density", tmp_path / "density")
    assert [row["provider"] for row in density[:3]] == ["auto", "events", "dense"]


# --- kernels that are compiled before ---


@pytest.mark.parametrize("full", [sizes.FULL, sizes.SMALL], ids=["full", "small"])
def test_short_sizes_compile_the_same_kernels(full: sizes.Sizes) -> None:
    """Triton specialises an integer that is 1 or divisible by 16; the kernels are given these."""

    def kinds(T: int, B: int) -> list[tuple[bool, bool]]:
        words = -(-T * B // 32)
        return [(n == 1, n % 16 == 0) for n in (T * B, words, -(-words // 16))]

    if full is sizes.FULL:  # the small ones are as short as they get
        short = full.short()
        assert all(
            kinds(t, full.net.batch) == kinds(short.net_steps[0], full.net.batch) for t in full.net_steps
        )
        for name in ("classifier", "convolution", "recurrent"):
            face, few = getattr(full, name), getattr(short, name)
            assert few.T < face.T
            assert few.B == face.B
            assert kinds(face.T, face.B) == kinds(few.T, few.B)
        for config, few in ((full.published, short.published), (full.layer, short.layer)):
            assert few.steps < config.steps
            assert replace(few, steps=config.steps) == config
            assert kinds(config.steps, config.batch) == kinds(few.steps, few.batch)
    assert full.chunk + full.lsnn.T % full.chunk == full.short().lsnn.T


def test_compiling_runs_every_job_and_measures_none(tmp_path: Path) -> None:
    pytest.importorskip("snntorch")
    chosen = list(parts.COMPILED_FIRST)
    for share in (0, 1):
        assert workers.compile_share(small_run(), chosen, tmp_path / "rows", share, 2) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    names = {name for part in chosen for name in parts.jobs(part, sizes.SMALL.short(), "cpu")}
    assert {row["job"] for row in rows} == names
    assert not any("failed" in row or "wall_ms" in row for row in rows)


# --- what goes wrong ---


def steps_of(value: float = 1.0) -> Steps:
    x = torch.ones(3, requires_grad=True)
    return Steps(lambda: (value * x).sum(), lambda out: out.backward(), [x], [x])


def broken() -> Steps:
    raise MissingDependencyError("spam is not installed")


def breaks_later() -> Steps:
    good, left = steps_of(), [clock._WARM]

    def forward() -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("illegal")
        return good.forward()

    return replace(good, forward=forward)


class OnGpu(clock.Run):
    """A run that believes in a device."""

    on_gpu = True

    def sync(self) -> None:
        pass

    def still_there(self) -> None:
        pass


def test_one_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(run, steps):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(compare, "device_ms", lambda run, steps, phase: 0.5)
    monkeypatch.setattr(compare, "graph_ms", captured)
    comparison = compare.Comparison(
        "row",
        {},
        {"good": steps_of, "late": breaks_later},
        {"absent": broken},
        device=("good", "late", "absent"),
        graph=("good",),
    )
    found: dict[str, dict] = {}
    for row in compare.times(OnGpu(sizes.SMALL, "cpu", time.monotonic() + 60), comparison):
        found.setdefault(row["provider"], {}).update(row)
    assert found["good"]["wall_ms"]["median"] > 0
    assert found["good"]["device_ms"] == 0.5
    assert "capturing" in found["good"]["graph_error"]
    assert found["late"]["failed"] == "RuntimeError: illegal"
    assert "device_ms" not in found["late"]
    assert found["absent"]["skipped"] == "spam is not installed"


def test_what_does_not_fit_is_left_out(tmp_path: Path) -> None:
    assert workers.measure(["scan"], small_run(seconds=-1), tmp_path / "rows", 0, LIMITS) == 0
    *_, done = map(json.loads, (tmp_path / "rows").read_text().splitlines())
    assert done["late"]


CHILD = """
import json, os, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
todo, after = options["--parts"].split(","), int(options["--after"])
with open(options["--rows"], "a") as out:
    def emit(**row):
        out.write(json.dumps(row) + chr(10))
        out.flush()
    for part in todo:
        for job in range(after if part == todo[0] else 0, 3):
            emit(begun=part, job=job, name=f"job {job}")
            if (part, job) == ("dies", 1):
                os._exit(7)
            if (part, job) == ("hangs", 1):
                time.sleep(60)
            emit(part=part, row=f"job {job}", provider="p")
        emit(done=part, seconds=1.0, late=False)
"""


def test_a_part_that_dies_or_hangs_costs_one_job_or_its_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setattr(workers, "DOOR", tmp_path / "child.py")
    monkeypatch.setattr(workers, "GRACE", 0.5)
    kept: list[str] = []
    todo = ["dies", "hangs", "good"]
    measuring = workers.Measuring(
        todo, dict.fromkeys(todo, 1.0), lambda part, rows: kept.extend(f"{part} {row['row']}" for row in rows)
    )
    measuring.run([], tmp_path, time.monotonic() + 60)
    assert kept == ["dies job 0", "dies job 2", "hangs job 0", "good job 0", "good job 1", "good job 2"]
    assert measuring.skipped == {"dies": "job 1: exit status 7", "hangs": "out of time: stopped"}
    assert measuring.todo == []


def test_a_child_that_never_begins_is_not_started_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "child.py").write_text("raise SystemExit(9)")
    monkeypatch.setattr(workers, "DOOR", tmp_path / "child.py")
    measuring = workers.Measuring(["scan", "memory"], LIMITS, lambda *_: None)
    measuring.run([], tmp_path, time.monotonic() + 60)
    assert measuring.skipped == {"scan": "job 0: exit status 9; no time left", "memory": "no time left"}


# --- the command ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture) -> None:
    assert gpu_check.main([]) == 2
    assert "--device cpu --small" in capsys.readouterr().err


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--parts", "spam"])
    assert "no part spam" in capsys.readouterr().err


def test_rows_of_the_network_part_say_their_shape() -> None:
    comparison = next(networks.training(sizes.FULL, "cpu"))
    assert comparison.row == "net 700–200–200–20, T=100, B=64"
    assert comparison.shape["density"] == 0.02
