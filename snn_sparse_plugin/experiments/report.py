"""``report.md``: every table and figure that the finished parts give, the published numbers beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean, stdev
from typing import Any

from rich.console import Console

from ..bench.report import human_bytes
from ..core.errors import MissingDependencyError
from ..files import reading, write_text
from .files import write_csv
from .settings import ConvSettings
from .study import Study

# active neuron-steps of both hidden layers in percent, N = 200, mean over training [Perez-Nieves & Goodman 2021]
PUBLISHED_ACTIVITY = {"fashion-mnist": (1.06, 0.87), "n-mnist": (1.12, 0.77), "shd": (1.70, 1.09)}
PUBLISHED_DATA = {
    "fashion-mnist": "Fashion-MNIST",
    "n-mnist": "N-MNIST, 60,000 recordings",
    "shd": "SHD, the official files",
}
PUBLISHED_SPEED = "up to 150 times faster backward, up to 85 % less memory, on a GPU"


def write_report(study: Study, console: Console) -> Any:
    """Write the report, its pictures and ``epochs.csv`` from the results on disk; returns the report's path."""
    results = {part: study.results(part) for part in SECTIONS}
    found = {part: r for part, r in results.items() if r is not None}
    for part, r in found.items():
        with reading(study.path(part), "a part's results", "Delete it."):
            r["conditions"]["title"] = study.title or r["conditions"]["title"]
    figures: dict[str, list[str]] = {}
    try:
        from .figures import draw

        figures = draw(study, {part: r["result"] for part, r in found.items()})
    except MissingDependencyError as error:
        console.print(f"no pictures: {error}")
    of = " of a convolutional network" if isinstance(study.settings, ConvSettings) else ""
    lines = [f"# Sparse gradient descent{of} on {_title(study, found)}", ""]
    for part, r in found.items():
        with reading(study.path(part), "a part's results", "Delete it."):
            lines += SECTIONS[part](study, r)
            conditions = _conditions(part, r["conditions"])
        for name in figures.get(part, []):
            lines += [f"![{part}]({name})", ""]
        lines += [f"_{conditions}_", ""]
    if "train" in found:
        with reading(study.path("train"), "a part's results", "Delete it."):
            rows = list(_epoch_rows(found["train"]["result"]))
        write_csv(study.out / "epochs.csv", rows)
    path = study.out / "report.md"
    write_text(path, "\n".join(lines).rstrip() + "\n")
    return path


def _title(study: Study, found: dict[str, Any]) -> str:
    return next((r["conditions"]["title"] for r in found.values()), study.settings.data)


def _conditions(part: str, c: dict[str, Any]) -> str:
    """What a section holds under; all parts but the training look at the first seed and say their own epochs."""
    s, (train, test) = c["settings"], c["samples"]
    trained = f", {_epochs_of(s['epochs'])}" if part == "train" else ""
    seeds = c["seeds"] if part == "train" else c["seeds"][:1]
    swept = (
        ", where the table does not say otherwise"
        if part in ("hidden", "threshold", "depth", "speed")
        else ""
    )
    versions = ", ".join(f"{name} {v}" for name, v in c["versions"].items() if v)
    guard = f", guard min_active = {s['min_active']:g}" if s["min_active"] else ""
    return (
        f"{c['title']}: {train:,} training and {test:,} test samples, T = {s['T']} of {1e3 * s['dt']:g} ms, input "
        f"density {100 * c['input_density']:.2f} %. {_network(s)}, B_th = "
        f"{s['threshold']:g}{guard}{swept}; B = {s['batch']}, Adam {s['learning_rate']:g}{trained}, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}. {c['device']}, {c['threads']} "
        f"thread{'s' if c['threads'] > 1 else ''}, float32; {versions}, commit {c['commit']}."
    )


def is_conv(settings: dict[str, Any]) -> bool:
    """Whether settings, as a dict, are those of a convolutional network."""
    return "kernel" in settings


def _network(s: dict[str, Any]) -> str:
    if not is_conv(s):
        return f"{s['layers']} hidden layers of {s['hidden']}"
    layers = "1 layer" if s["layers"] == 1 else f"{s['layers']} layers"
    return (
        f"{layers} of a convolution {s['kernel']} × {s['kernel']} to {s['hidden']} channels and a max-pool "
        f"{s['pool']} × {s['pool']}"
    )


def _epochs_of(count: int) -> str:
    return f"{count} epoch" + ("" if count == 1 else "s")


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A markdown table.

    Example:
        >>> table(["a", "b"], [["1", "2"]])
        ['| a | b |', '|---|---|', '| 1 | 2 |']
    """
    columns = list(columns)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


# --- sections ---


def _train(study: Study, found: dict[str, Any]) -> list[str]:
    trials = found["result"]
    by_mode = {mode: [t for t in trials if t["sparse"] is mode] for mode in (True, False)}
    accuracy = {mode: [100 * t["test_accuracy"] for t in ts] for mode, ts in by_mode.items()}
    rows = []
    for mode, name in ((True, f"sparse, B_th = {study.settings.threshold:g}"), (False, "dense")):
        each = ", ".join(f"{a:.2f}" for a in accuracy[mode])
        loss = fmean(t["history"]["train_loss"][-1] for t in by_mode[mode])
        rows.append([name, f"**{_spread(accuracy[mode])} %**", each, f"{loss:.3f}"])
    difference = [a - b for a, b in zip(accuracy[True], accuracy[False], strict=True)]
    lines = ["## Accuracy and activity", ""]
    lines += table(["", "test accuracy", "each seed", "training loss"], rows)
    lines += ["", f"Sparse minus dense, seed by seed: {_spread(difference)} points.", ""]
    active = [t["active_mean"] for t in by_mode[True]]
    ours = [_spread([100 * layer for layer in layers]) for layers in zip(*active, strict=True)]
    names = [f"hidden layer {k}" for k in range(1, len(ours) + 1)]
    compared = [[f"this run, {found['conditions']['title']}", *(f"{x} %" for x in ours)]]
    published = PUBLISHED_ACTIVITY.get(study.settings.data)
    conv = is_conv(found["conditions"]["settings"])
    if published is not None and not conv and len(ours) == len(published):
        where = PUBLISHED_DATA[study.settings.data]
        compared.append([f"published, {where}", *(f"{x:.2f} %" for x in published)])
    lines += ["Active neuron-steps, mean over all updates of training:", ""]
    lines += table(["", *names], compared)
    epochs = by_mode[True][0]["history"]
    count = len(epochs["active"])
    shown = sorted({0, count // 4, count // 2, 3 * count // 4, count - 1})
    rows = [
        [
            str(k + 1),
            *(f"{100 * a:.2f} %" for a in epochs["active"][k]),
            *(f"{100 * r:.2f} %" for r in epochs["rate"][k]),
            f"{100 * epochs['test_accuracy'][k]:.2f} %",
        ]
        for k in shown
    ]
    header = ["epoch", *(f"active, layer {k + 1}" for k in range(len(ours)))]
    header += [f"spikes, layer {k + 1}" for k in range(len(ours))]
    first = by_mode[True][0]["seed"]
    lines += ["", f"Seed {first} in the course of training (all epochs: `epochs.csv`):", ""]
    return [*lines, *table([*header, "test accuracy"], rows), ""]


def _hidden(study: Study, found: dict[str, Any]) -> list[str]:
    trials = found["result"]
    dense = {t["hidden"]: t for t in trials if not t["sparse"]}
    rows = []
    for t in (t for t in trials if t["sparse"]):
        active = " / ".join(f"{100 * a:.2f}" for a in t["active_mean"])
        other = dense[t["hidden"]]["test_accuracy"]
        rows.append(
            [str(t["hidden"]), f"{100 * t['test_accuracy']:.2f} %", f"{100 * other:.2f} %", f"{active} %"]
        )
    lines = [f"## Hidden size, after {_epochs_of(trials[0]['epochs'])}", ""]
    return [*lines, *table(["N", "sparse", "dense", "active, layers 1 / 2"], rows), ""]


def _threshold(study: Study, found: dict[str, Any]) -> list[str]:
    dense, *trials = found["result"]
    rows = []
    for t in trials:
        errors = " / ".join(f"{row['relative_error']:.3f}" for row in t["gradients"])
        cosines = " / ".join(_number(row["cosine"], ".3f") for row in t["gradients"])
        active = " / ".join(f"{100 * a:.2f}" for a in t["active_mean"])
        rows.append(
            [f"{t['threshold']:g}", f"{100 * t['test_accuracy']:.2f} %", f"{active} %", errors, cosines]
        )
    rows.append(["dense", f"{100 * dense['test_accuracy']:.2f} %", "100 %", "0", "1"])
    lines = [f"## B_th, after {_epochs_of(dense['epochs'])}", ""]
    lines += table(["B_th", "test accuracy", "active", "relative error", "cosine"], rows)
    return [
        *lines,
        "",
        "Error and cosine of the gradient of each weight matrix, all windows on the same batch and weights: the dense "
        f"network's as far as it was trained{_weights_of(trials[0])}.",
        "",
    ]


def _weights_of(trial: dict[str, Any]) -> str:
    epochs = trial.get("weights_epochs")  # results of before it was kept lack it
    return "" if epochs is None else f", {_epochs_of(epochs)}"


def _depth(study: Study, found: dict[str, Any]) -> list[str]:
    trials, grads = found["result"]["trials"], found["result"]["gradients"]
    sparse, dense = trials
    lines = [
        f"## {sparse['layers']} hidden layers of {sparse['hidden']}, after {_epochs_of(sparse['epochs'])}",
        "",
    ]
    rows = [
        [
            "sparse" if t["sparse"] else "dense",
            f"{100 * t['test_accuracy']:.2f} %",
            f"{t['history']['train_loss'][-1]:.3f}",
            " / ".join(f"{100 * a:.2f}" for a in t["active_mean"]) + " %",
        ]
        for t in (sparse, dense)
    ]
    lines += [*table(["", "test accuracy", "training loss", "active, by layer"], rows), ""]
    return [*lines, *_gradient_table(grads), ""]


def _gradients(study: Study, found: dict[str, Any]) -> list[str]:
    lines = ["## The sparse gradient against the dense one", ""]
    for each in found["result"]:
        lines += [f"After {_epochs_of(each['epochs'])}:", "", *_gradient_table(each["rows"]), ""]
    return lines


def _gradient_table(rows: list[dict[str, Any]]) -> list[str]:
    columns = {
        "relative error": ("relative_error", ".4f"),
        "cosine": ("cosine", ".4f"),
        "norm, sparse / dense": ("norm_ratio", ".4f"),
        "dense against snnTorch's loop": ("exact_error", ".1e"),
    }
    cells = [[row["weights"], *(_number(row[key], form) for key, form in columns.values())] for row in rows]
    return table(["weights", *columns], cells)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


_SWEEPS = {
    "fresh": "before training",
    "trained": "trained",
    "hidden": "over N",
    "threshold": "over B_th",
    "depth": "deep network",
}


def _speed(study: Study, found: dict[str, Any]) -> list[str]:
    rows, s = [], found["conditions"]["settings"]
    for r in found["result"]:
        a, b = r["sparse"], r["snntorch"]
        forward, backward = (b[p]["median"] / a[p]["median"] for p in ("forward_ms", "backward_ms"))
        both = _total(b) / _total(a)
        rows.append(
            [
                _SWEEPS[r["sweep"]],
                str(r["hidden"]),
                f"{r['threshold']:g}",
                str(r["epochs"]),
                " / ".join(f"{100 * x:.2f}" for x in r["active"][:2]) + " %",
                f"{b['forward_ms']['median']:.1f} → {a['forward_ms']['median']:.1f}",
                f"{b['backward_ms']['median']:.1f} → {a['backward_ms']['median']:.1f}",
                f"{forward:.1f}×",
                f"**{backward:.0f}×**",
                f"{both:.1f}×",
                f"{human_bytes(b['saved_bytes'])} → {human_bytes(a['saved_bytes'])}",
                f"{100 * (a['saved_bytes'] / b['saved_bytes'] - 1):+.0f} %",
            ]
        )
    header = [
        "",
        "channels" if is_conv(s) else "N",
        "B_th",
        "epochs",
        "active",
        "forward, ms",
        "backward, ms",
        "forward",
        "backward",
        "both",
    ]
    which = f"Layer {s['layers']}" if is_conv(s) else "The second hidden layer"
    lines = [f"## {which} alone, snnTorch's step loop → sparse", ""]
    lines += [*table([*header, "saved for backward", "saved"], rows), ""]
    for r in found["result"]:
        if "published" in r:
            ms = r["published"]["backward_ms"]["median"]
            ratio = ms / r["sparse"]["backward_ms"]["median"]
            lines += [
                f"The loop as published, which indexes `h[:, t]` under autograd, takes {ms:.0f} ms for the backward "
                f"(N = {r['hidden']}, after {_epochs_of(r['epochs'])}), {ratio:.0f} times the sparse one; measured "
                "once.",
                "",
            ]
    rounds = sorted({r["rounds"] for r in found["result"]})
    times = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else f"{rounds[0]}"
    published = "" if is_conv(s) else f"Published: {PUBLISHED_SPEED}. "
    return [*lines, f"{published}Medians of alternating rounds, {times} in a row.", ""]


def _total(row: dict[str, Any]) -> float:
    return row["forward_ms"]["median"] + row["backward_ms"]["median"]  # type: ignore[no-any-return]


def _epoch(study: Study, found: dict[str, Any]) -> list[str]:
    r = found["result"]
    rows = [
        [name, f"{r[key]['batch_ms']['median']:.1f} ms", f"{r[key]['epoch_s']:.1f} s", ratio]
        for key, name, ratio in (
            ("sparse", "this package, sparse", f"**{r['ratio']:.1f}×**"),
            ("snntorch", "snnTorch's step loop", "1.0×"),
        )
    ]
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in r["parts_ms"].items())
    return [
        f"## An epoch of {r['batches']} batches of {r['batch']}",
        "",
        *table(["", "batch", "epoch", "times as fast"], rows),
        "",
        f"A turn is {r['batches_per_turn']} batches, {r['rounds']} alternating rounds; an epoch is the median "
        f"batch times the number of batches. A batch: gathering its events, forward, loss, backward, Adam. "
        f"Weights after {_epochs_of(r['epochs'])}. The loop's input is made dense, {r['dense_ms']:.1f} ms of its "
        f"batch. One sparse update in ms: {parts}.",
        "",
    ]


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _epoch_rows(trials: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for t in trials:
        for k in range(t["epochs"]):
            row = {"trial": t["name"], "sparse": t["sparse"], "seed": t["seed"], "epoch": k + 1}
            yield row | {key: values[k] for key, values in t["history"].items()}


SECTIONS: dict[str, Callable[[Study, dict[str, Any]], list[str]]] = {
    "train": _train,
    "epoch": _epoch,
    "speed": _speed,
    "hidden": _hidden,
    "threshold": _threshold,
    "depth": _depth,
    "gradients": _gradients,
}
