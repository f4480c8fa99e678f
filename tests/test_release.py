"""What is released: one version everywhere, every package, and distributions that install and test themselves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

from snn_sparse_plugin import __version__
from snn_sparse_plugin.core.version import installed

ROOT = Path(__file__).parents[1]
SAMPLE = (
    "tests/test_release.py",
    "tests/test_spikes.py",
    "tests/test_docs_tables.py",
    "tests/layers/test_ttfs_energy_table.py",
)

NO_SOURCES = (".*_cache", ".git", ".hypothesis", ".venv", "__pycache__", "build", "dist", "*.egg-info")


def run(*command: object, cwd: Path, **environment: str) -> str:
    found = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def declared_packages() -> set[str]:
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert listed is not None
    return set(re.findall(r'"([\w.]+)"', listed.group(1)))


def test_one_version() -> None:
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    citation = re.search(r"^version: (.+)", (ROOT / "CITATION.cff").read_text(), re.M)
    assert project is not None
    assert citation is not None
    assert project.group(1) == citation.group(1) == __version__
    assert f"version = {{{__version__}}}" in (ROOT / "docs" / "index.md").read_text()  # the BibTeX entry


def test_the_changelog_has_a_dated_section_of_this_version_below_unreleased() -> None:
    headings = re.findall(r"^## (.+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d", headings[1])
    released = re.search(r"^date-released: (.+)", (ROOT / "CITATION.cff").read_text(), re.M)
    assert released is not None
    assert headings[1].endswith(released.group(1))


def test_every_package_is_in_the_wheel() -> None:
    package = ROOT / "snn_sparse_plugin"
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in package.rglob("__init__.py")
        if "triton_kernels" not in file.parts  # a link, which rglob follows or not by version
    }
    assert declared_packages() == found | {"snn_sparse_plugin.triton_kernels"}


@pytest.mark.parametrize("publication", ["2105.08810", "s41467-020-17236-y", "2106.02568"])
def test_the_publications_are_named(publication: str) -> None:
    assert publication in (ROOT / "CITATION.cff").read_text()
    assert publication in (ROOT / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is made from it."""
    for tool in ("build", "twine"):
        if installed(tool) is None:  # asked by name: a folder called build can be imported too
            pytest.skip(f"{tool} is not installed: pip install {tool}")
    out, copy = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("copy") / "project"
    # a build writes into the tree, in which other tests, and another process's build, are at work
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NO_SOURCES))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy, cwd=out)
    run(sys.executable, "-m", "twine", "check", "--strict", *out.iterdir(), cwd=out)
    (source,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return source, wheel


@pytest.mark.slow
def test_the_wheel_installs_and_runs(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """In an environment of its own; torch and the other dependencies are those of this one."""
    _, wheel = distributions
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", wheel, cwd=tmp_path, PYTHONPATH="")
    dependencies = [path for path in sys.path if path.endswith("-packages")] or [
        sysconfig.get_path("purelib")
    ]
    (site,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    (site / "dependencies.pth").write_text("\n".join(dependencies))
    modules = "import importlib, snn_sparse_plugin; print(snn_sparse_plugin.__file__); " + "; ".join(
        f"importlib.import_module({name!r})"
        for name in sorted(declared_packages())
        if name not in ("snn_sparse_plugin.plot", "snn_sparse_plugin.triton_kernels")
    )
    assert str(site) in run(python, "-c", modules, cwd=tmp_path, PYTHONPATH="")
    command = tmp_path / "venv" / "bin" / "snn-sparse"
    assert run(command, "--version", cwd=tmp_path, PYTHONPATH="").split()[-1] == __version__
    assert "all checks passed" in run(command, "doctor", cwd=tmp_path, PYTHONPATH="")


@pytest.mark.slow
def test_the_source_distribution_passes_its_own_tests(
    distributions: tuple[Path, Path], tmp_path: Path
) -> None:
    source, _ = distributions
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    for name in ("docs/index.md", "examples/notebooks", "benchmarks/README.md", "Makefile", ".ci/run"):
        assert (folder / name).exists(), name
    told = run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SAMPLE, "-m", "not slow"),
        cwd=folder,
        PYTHONPATH=str(folder),
        PYTEST_ADDOPTS="",
    )
    assert re.search(r"\d+ passed", told)
    assert "failed" not in told


def test_no_text_says_to_install_this_package_by_a_name_that_no_index_has() -> None:
    """It is installed from a checkout: messages name the library that is missing."""
    texts = (
        file
        for folder in ("snn_sparse_plugin", "docs", "examples", "benchmarks", "README.md")
        for file in ([ROOT / folder] if (ROOT / folder).is_file() else (ROOT / folder).rglob("*"))
        if file.suffix in (".py", ".md", ".ipynb", ".yml")
    )
    found = [
        str(file) for file in texts if re.search(r"pip install[^\n`]*snn-sparse-plugin", file.read_text())
    ]
    assert not found
