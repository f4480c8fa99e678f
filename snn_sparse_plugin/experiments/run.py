"""Each part of a study done once and kept, and the report of all."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..core.errors import ConfigError
from ..core.version import VERSION, commit, installed
from .files import only_one, write_json
from .parts import PARTS, parts_of
from .report import is_conv, write_report
from .session import Session
from .study import Study


def run_study(study: Study, parts: Sequence[str], console: Console) -> Path:
    """Do the parts that are not done, and write the report of all that are; returns its path.

    A part whose ``NAME.json`` is there under the same conditions is not done again.

    Raises:
        ConfigError: an unknown part, or a folder that holds another study or in which another process works.
        InputError, MissingDependencyError: from reading the data.
    """
    known = parts_of(study.settings)
    for part in parts:
        if part not in known:
            raise ConfigError(f"no part {part!r}; there are {', '.join(known)}.")
    if study.threads:
        torch.set_num_threads(study.threads)
    session = Session(study, console)
    with only_one(study.out):
        for part in PARTS:
            found = study.results(part)
            if found is None:
                continue
            settings = found["conditions"]["settings"]
            if settings["data"] != study.settings.data:
                raise ConfigError(f"{study.out} holds a study of {settings['data']}: give another --out.")
            if is_conv(settings) != is_conv(study.settings.as_dict()):
                raise ConfigError(f"{study.out} holds a study of another network: give another --out.")
        for part in (p for p in known if p in parts):
            wanted = json.loads(json.dumps(PARTS[part].request(study)))
            before = study.results(part)
            if before is not None and before["request"] == wanted:
                console.print(f"{part}: done before, {study.path(part)}", highlight=False, soft_wrap=True)
                continue
            console.print(f"{part}: {PARTS[part].about}", highlight=False)
            found = PARTS[part].run(session)
            conditions = _conditions(session)
            write_json(study.path(part), {"request": wanted, "conditions": conditions, "result": found})
        return write_report(study, console)


def _conditions(session: Session) -> dict[str, Any]:
    study, data = session.study, session.data
    gpu = torch.cuda.get_device_name(study.device) if study.device != "cpu" else None
    return {
        "title": session.title,
        "settings": study.settings.as_dict(),
        "samples": [len(data.train), len(data.test)],
        "input_density": data.train.density,
        "seeds": list(study.seeds),
        "device": gpu or _processor(),
        "threads": torch.get_num_threads(),
        "versions": {
            "snn-sparse-plugin": VERSION,
            "torch": torch.__version__,
            "snntorch": installed("snntorch"),
        },
        "commit": commit(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
