"""The parts of a study, and what each one needs to be called done."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean
from time import perf_counter
from typing import Any

import numpy as np

from ..files import write_atomic
from . import gradients, speed
from .session import Session
from .settings import ConvSettings, Settings
from .study import Study
from .training import Training, Trial, epochs_done


@dataclass(frozen=True)
class Part:
    """``run(session)`` finds the results; they hold as long as ``request(study)`` stays the same."""

    about: str
    request: Callable[[Study], dict[str, Any]]
    run: Callable[[Session], Any]


def _common(study: Study) -> dict[str, Any]:
    return {"settings": study.settings.as_dict(), "samples": study.samples, "device": study.device}


def _trained_so_far(study: Study, trials: Iterable[Trial]) -> dict[str, int]:
    """How far the trials are trained whose weights a part looks at: with more epochs it is to be done again."""
    return {trial.name: epochs_done(study.out / "trials" / trial.name) for trial in trials}


def _sweep_settings(study: Study, **changes: Any) -> Settings:
    return study.settings.changed(epochs=study.sweep_epochs, **changes)


# --- trainings ---


def _trained(training: Training) -> dict[str, Any]:
    """What a finished trial found; ``active_mean`` is the publication's: over all updates of the training."""
    trial = training.trial
    history = training.history[: trial.settings.epochs]  # a sweep may find a trial that has run for longer
    updates = [row for epoch in history for row in epoch["active_by_update"]]
    return {
        "name": trial.name,
        "sparse": trial.sparse,
        "seed": trial.seed,
        "hidden": trial.settings.hidden,
        "layers": trial.settings.layers,
        "threshold": trial.settings.threshold if trial.sparse else None,
        "epochs": len(history),
        "test_accuracy": history[-1]["test_accuracy"],
        "active_mean": [fmean(layer) for layer in zip(*updates, strict=True)],
        "history": {
            key: [row[key] for row in history]
            for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "active", "rate")
        },
        "loss_by_update": [x for epoch in history for x in epoch["loss_by_update"]],
        "active_by_update": updates if trial.sparse else None,
    }


def _train(session: Session) -> Any:
    study = session.study
    trials = [Trial(study.settings, sparse, seed) for seed in study.seeds for sparse in (True, False)]
    return [_trained(t) for t in session.train(trials, "training")]


def _hidden(session: Session) -> Any:
    study = session.study
    trials = [
        Trial(_sweep_settings(study, hidden=n), sparse, study.seeds[0])
        for n in study.sizes
        for sparse in (True, False)
    ]
    return [_trained(t) for t in session.train(trials, "sweep over N")]


def _threshold(session: Session) -> Any:
    study = session.study
    trials = [Trial(_sweep_settings(study), False, study.seeds[0])]
    trials += [Trial(_sweep_settings(study, threshold=b), True, study.seeds[0]) for b in study.thresholds]
    rows = [_trained(t) for t in session.train(trials, "sweep over B_th")]
    # all windows on the same weights, those of the dense training
    x, y = session.batch()
    for row, trial in zip(rows[1:], trials[1:], strict=True):
        net, row["weights_epochs"] = session.network(trial.settings, trial.seed, trials[0])
        row["gradients"] = gradients.compare(net, x, y)
        row["active_same_weights"] = [float(a) for a in net(x).active]
    return rows


def _depth(session: Session) -> Any:
    study = session.study
    layers, hidden = study.deep
    settings = _sweep_settings(study, layers=layers, hidden=hidden)
    trials = [Trial(settings, sparse, study.seeds[0]) for sparse in (True, False)]
    rows = [_trained(t) for t in session.train(trials, f"{layers} layers of {hidden}")]
    x, y = session.batch()
    net, _ = session.network(settings, study.seeds[0], trials[1])
    return {"trials": rows, "gradients": gradients.compare(net, x, y)}


def _gradients(session: Session) -> Any:
    """Before training and after it; the matrices themselves go to ``gradients.npz``, for the picture."""
    study, (x, y) = session.study, session.batch()
    trial = _main(study)
    found: list[dict[str, Any]] = []
    arrays: dict[str, Any] = {}
    for weights in (None, trial):
        net, epochs = session.network(study.settings, trial.seed, weights)
        if weights is not None and not epochs:
            continue  # part "train" is not done: only the fresh network is looked at
        rows = gradients.compare(net, x, y)
        found.append({"epochs": epochs, "rows": rows})
        for sparse in (True, False):
            name = "sparse" if sparse else "dense"
            for k, grad in enumerate(gradients.weight_gradients(net, x, y, sparse=sparse)):
                arrays[f"{name}_{k}_{epochs}"] = grad.flatten(1).cpu().numpy()
    write_atomic(study.out / "gradients.npz", lambda file: np.savez_compressed(file, **arrays))
    return found


# --- times ---


_Plan = tuple[str, Settings, Trial | None]


def _plans(study: Study) -> list[_Plan]:
    """What is timed: fresh and trained, over N, over B_th, and in the deep network; whose weights it takes."""
    s, seed = study.settings, study.seeds[0]
    layers, hidden = study.deep
    main, deep = Trial(s, True, seed), _sweep_settings(study, layers=layers, hidden=hidden)
    plans: list[_Plan] = [("fresh", s, None), ("trained", s, main)]
    windows: list[_Plan] = [("threshold", s.changed(threshold=b), main) for b in study.thresholds]
    if isinstance(s, ConvSettings):
        return plans + windows
    plans += [
        ("hidden", s.changed(hidden=n), Trial(_sweep_settings(study, hidden=n), True, seed))
        for n in study.sizes
    ]
    plans += windows
    plans.append(("depth", deep, Trial(deep, True, seed)))
    return [plan for plan in plans if plan[1].layers > 1]


def _timed_layer(settings: Settings) -> int:
    """The second hidden layer, as published, or the last convolution."""
    return settings.layers if isinstance(settings, ConvSettings) else 2


def _speed(session: Session) -> Any:
    """One hidden layer, in all plans."""
    study, plans = session.study, _plans(session.study)
    trained = bool(_trained_so_far(study, [_main(study)])[_main(study).name])
    if not trained:
        plans = [plan for plan in plans if plan[0] != "trained"]
    x, y = session.batch()
    rows = []
    with session.progress() as bars:
        task = bars.add_task("one layer", total=len(plans), note="")
        for sweep, settings, weights in plans:
            note = f"{sweep}: N = {settings.hidden}, B_th = {settings.threshold:g}"
            bars.update(task, note=note)
            session.log(f"one layer, {note}")
            net, epochs = session.network(settings, study.seeds[0], weights)
            rounds = _rounds(study, net, x, y)
            published = sweep == ("trained" if trained else "fresh") and settings.T <= 300
            published &= not isinstance(settings, ConvSettings)
            k = _timed_layer(settings)
            row = speed.time_layer(net, x, y, k=k, rounds=rounds, published=published)
            rows.append({"sweep": sweep, "epochs": epochs, "rounds": rounds} | row)
            bars.advance(task)
    return rows


def _rounds(study: Study, net: Any, x: Any, y: Any) -> int:
    """As many rounds as fit into the budget of a row; a round makes two steps of the loop."""
    probe = speed.layer_alone(net, x, y, "snntorch", _timed_layer(net.settings))
    start = perf_counter()
    probe.backward(probe.forward())
    seconds = perf_counter() - start
    return max(1, min(study.rounds, int(study.budget / (2 * seconds)) - 1))


def _epoch(session: Session) -> Any:
    study = session.study
    trial = _main(study)
    _, epochs = session.network(study.settings, trial.seed, trial)
    turns = 2 * study.rounds
    with session.progress() as bars:
        task = bars.add_task("epoch time", total=turns, note="")
        session.log(f"epoch time, {turns} turns")
        found = speed.time_epoch(
            lambda: session.network(study.settings, trial.seed, trial)[0],
            session.data.train,
            batches=16,  # long enough that a turn does not pay for the caches the other has filled
            rounds=study.rounds,
            device=study.device,
            advance=lambda: bars.advance(task),
        )
    net, _ = session.network(study.settings, trial.seed, trial)
    return found | {"epochs": epochs, "parts_ms": speed.profile_update(net, *session.batch())}


def _main(study: Study) -> Trial:
    return Trial(study.settings, True, study.seeds[0])


def _timed(study: Study) -> dict[str, Any]:
    return _common(study) | {"threads": study.threads, "rounds": study.rounds}


def _swept(study: Study) -> dict[str, Any]:
    return _common(study) | {"seed": study.seeds[0], "sweep_epochs": study.sweep_epochs}


PARTS: dict[str, Part] = {
    "train": Part(
        "sparse against dense training, activity",
        lambda study: _common(study) | {"seeds": list(study.seeds)},
        _train,
    ),
    "hidden": Part(
        "accuracy and activity over hidden size",
        lambda study: _swept(study) | {"sizes": list(study.sizes)},
        _hidden,
    ),
    "threshold": Part(
        "accuracy, activity and gradient error over B_th",
        lambda study: _swept(study) | {"thresholds": list(study.thresholds)},
        _threshold,
    ),
    "depth": Part("a deep network", lambda study: _swept(study) | {"deep": list(study.deep)}, _depth),
    "gradients": Part(
        "sparse gradient against dense",
        lambda study: _common(study) | _trained_so_far(study, [_main(study)]),
        _gradients,
    ),
    "speed": Part(
        "time and memory of one hidden layer",
        lambda study: (
            _timed(study)
            | {
                "budget": study.budget,
                "sizes": study.sizes,
                "thresholds": study.thresholds,
                "deep": study.deep,
            }
            | _trained_so_far(study, [trial for *_, trial in _plans(study) if trial is not None])
        ),
        _speed,
    ),
    "epoch": Part(
        "time of an epoch against snnTorch's loop",
        lambda study: _timed(study) | _trained_so_far(study, [_main(study)]),
        _epoch,
    ),
}

CONV_PARTS = ("train", "threshold", "gradients", "speed", "epoch")


def parts_of(settings: Settings) -> dict[str, Part]:
    """The parts that a study with these settings has."""
    return {name: PARTS[name] for name in CONV_PARTS} if isinstance(settings, ConvSettings) else PARTS
