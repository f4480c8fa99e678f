"""The public workflows run what exists, on every version that is claimed, and only a tested tag is published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = (ROOT / "pyproject.toml").read_text()


def workflow(name: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    return read


def commands(job: dict[str, Any]) -> list[str]:
    return [step["run"] for step in job["steps"] if "run" in step]


def matrix() -> list[dict[str, str]]:
    rows: list[dict[str, str]] = workflow("weekly")["jobs"]["versions"]["strategy"]["matrix"]["include"]
    return rows


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def claimed(pattern: str) -> str:
    found = re.search(pattern, PROJECT, re.M)
    assert found is not None
    return found.group(1)


def test_ci_is_the_script() -> None:
    assert commands(workflow("ci")["jobs"]["ci"]) == ["bash .ci/run"]


@pytest.mark.parametrize("file", [*WORKFLOWS, ROOT / ".ci" / "run"], ids=lambda file: file.stem)
def test_every_target_is_in_the_makefile(file: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|run: )make ([a-z-]+)", file.read_text(), re.M)) <= targets


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_actions_are_pinned_by_commit_and_jobs_end(file: Path) -> None:
    used = re.findall(r"uses: (.+)", file.read_text())
    assert used
    for action in used:
        assert re.fullmatch(r"\./\.github/workflows/[a-z]+\.yml|[\w/-]+@[0-9a-f]{40} # v[\d.]+", action)
    jobs = workflow(file.stem)["jobs"].values()
    assert all("timeout-minutes" in job for job in jobs if "steps" in job)
    assert workflow(file.stem)["permissions"] == {"contents": "read"}


def test_one_action_has_one_commit() -> None:
    pins: dict[str, set[str]] = {}
    for file in WORKFLOWS:
        for action, commit in re.findall(r"uses: ([\w/-]+)@(\w+)", file.read_text()):
            pins.setdefault(action, set()).add(commit)
    assert all(len(commits) == 1 for commits in pins.values()), pins


def test_every_python_that_is_claimed_is_tried_with_the_newest_torch() -> None:
    classified = set(re.findall(r"Python :: (3\.\d+)", PROJECT))
    floor = claimed(r'^    "torch>=([\d.]+)"')
    assert {row["python"] for row in matrix() if row["torch"] == f">={floor}"} == classified
    oldest = claimed(r'^requires-python = ">=([\d.]+)"')
    assert oldest == min(classified, key=version)
    assert {"python": oldest, "torch": f"=={floor}.*"} in matrix()


def test_every_text_says_the_same_oldest_torch() -> None:
    floor = claimed(r'^    "torch>=([\d.]+)"')
    said = {
        "README.md": rf"torch {re.escape(floor)} and newer\]\(.*torch-{re.escape(floor)}%2B",
        "docs/install.md": rf"torch {re.escape(floor)} or newer",
        "constraints.txt": rf"torch >= {re.escape(floor)}\b",
    }
    for file, words in said.items():
        assert re.search(words, (ROOT / file).read_text()), file


def test_a_release_is_tested_built_and_checked_before_it_is_published() -> None:
    release = workflow("release")
    jobs = release["jobs"]
    assert release[True] == {"push": {"tags": ["v[0-9]+.[0-9]+.[0-9]+*"]}}  # YAML 1.1 reads "on" as true
    assert jobs["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert "workflow_call" in workflow("ci")[True]
    assert commands(jobs["build"])[0] == "make dist"
    assert "tests/test_release.py" in commands(jobs["build"])[-1]
    publish = jobs["publish"]
    assert set(publish["needs"]) == {"ci", "build"}
    assert publish["environment"] == "pypi"
    assert publish["permissions"] == {"id-token": "write"}
    assert not commands(publish)  # nothing that the project wrote runs where it may publish
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text()


def test_dependabot_moves_the_pins() -> None:
    updates = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"github-actions", "pip"}
