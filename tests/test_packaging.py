"""What is published installs without this checkout: with the C++ operators' sources, and typed.

Compiling them takes minutes: with ALPHASPIN_SWEEP=1 (`make test-all`).
"""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = "import sys, setuptools.build_meta as b; b.build_{}(sys.argv[1])"


def build(kind: str, source: Path, to: Path, *, torch: bool = False) -> Path:
    """The one file that setuptools makes, in an environment with torch or as if without it."""
    to.mkdir()
    code = BUILD.format(kind)
    if not torch:  # `setup.py` runs in this same process
        code = f"import os; os.environ['USE_NINJA'] = '0'; {WITHOUT_TORCH}{code}"
    done = subprocess.run(
        [sys.executable, "-c", code, to], cwd=source, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("building without the C++ operators" in done.stderr) is not torch
    (found,) = to.iterdir()
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution of what git has here."""
    folder = tmp_path_factory.mktemp("source")
    kept = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in kept:
        if (ROOT / name).is_file():
            (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "checkout" / name).write_bytes((ROOT / name).read_bytes())
    packed = build("sdist", folder / "checkout", folder / "sdist")
    with tarfile.open(packed) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (found,) = (folder / "unpacked").iterdir()
    return found


def installed(wheel: Path, place: Path) -> dict[str, str]:
    """An environment that finds this wheel's packages first."""
    command = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(place), str(wheel)]
    subprocess.run([sys.executable, *command], check=True, capture_output=True, timeout=300)
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(place)}


def first_step(environment: dict[str, str], place: Path) -> str:
    """The demo's first step, and where its packages are."""
    code = (
        "import sys, alphaspin, alphaspin_kernels; print(alphaspin.__file__, alphaspin_kernels"
        ".__file__); from alphaspin.cli import main; sys.argv[0] = 'alphaspin'; main()"
    )
    options = ["train", "--selfplay.iterations=1", "--selfplay.prompts=8", "--train.max_steps=1"]
    options += ["--evaluate.prompts=2", "--control=none", "--train.batch_size=8"]
    done = subprocess.run(
        [sys.executable, "-c", code, *options, f"--output={place / 'run'}"],
        cwd=place, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (place / "run/iterations/0/adapter/adapter_model.safetensors").is_file()
    return done.stdout


def test_the_source_distribution_is_whole(source: Path) -> None:
    def names(*patterns: str, root: Path) -> set[str]:
        return {str(p.relative_to(root)) for pattern in patterns for p in root.glob(pattern)}

    data = ("alphaspin/**/*.jinja", "alphaspin/recipes/**/*.*", "alphaspin/py.typed")
    patterns = ("csrc/*", *data)
    assert names(*patterns, root=source) == names(*patterns, root=ROOT)
    assert "csrc/linear_logprob.cpp" in names("csrc/*", root=source)


def test_a_wheel_without_torch_or_compiler(source: Path, tmp_path: Path) -> None:
    wheel = build("wheel", source, tmp_path / "wheel")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name}
    data = {f"{p.relative_to(ROOT)}" for p in (ROOT / "alphaspin").rglob("*.jinja")}
    assert data <= names and {"alphaspin/py.typed", "alphaspin_kernels/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {"alphaspin", "alphaspin_kernels"}
    place = tmp_path / "place"
    printed = first_step(installed(wheel, place), place)
    assert str(place / "alphaspin/__init__.py") in printed


@pytest.mark.skipif(not os.environ.get("ALPHASPIN_SWEEP"), reason="needs ALPHASPIN_SWEEP=1")
def test_a_wheel_with_the_operators(source: Path, tmp_path: Path) -> None:
    wheel = build("wheel", source, tmp_path / "wheel", torch=True)
    assert "alphaspin_kernels/_C.so" in zipfile.ZipFile(wheel).namelist()
    place = tmp_path / "place"
    first_step(installed(wheel, place), place)


def test_the_image_has_what_it_is_built_from(tmp_path: Path) -> None:
    """`.dockerignore` lets through what setuptools needs; extras and commands exist."""
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*"
    kept = [line[1:] for line in lines if line.startswith("!")]
    dropped = [line.removeprefix("**/") for line in lines if line.startswith("**/")]
    for name in kept:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, tmp_path / "src" / name, ignore=shutil.ignore_patterns(*dropped)
            )
        else:
            (tmp_path / "src").mkdir(exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / "src" / name)
    wheel = build("wheel", tmp_path / "src", tmp_path / "wheel")
    names = zipfile.ZipFile(wheel).namelist()
    assert fnmatch.filter(names, "alphaspin/recipes/tiny/model/*.safetensors")
    text = (ROOT / "Dockerfile").read_text()
    (extras,) = re.findall(r"/src\[([\w,]+)\]", text)
    assert {*extras.split(",")} <= {*PROJECT["optional-dependencies"]}
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.M)
    assert {*json.loads(entry)} <= {*PROJECT["scripts"]}
    commands = subprocess.run(
        [sys.executable, "-c", "from alphaspin.cli import main; main()"],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    (command,) = json.loads(re.findall(r"^CMD (.*)$", text, re.M)[0])
    assert re.search(rf"^  {command}\b", commands, re.M)


@pytest.mark.skipif(not shutil.which("hadolint"), reason="hadolint is not installed")
def test_the_image_passes_its_linter() -> None:
    done = subprocess.run(
        ["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(
    not (os.environ.get("ALPHASPIN_SWEEP") and shutil.which("uv")),
    reason="needs ALPHASPIN_SWEEP=1 and uv",
)
@pytest.mark.parametrize("python", ["3.11", "3.14"])
@pytest.mark.parametrize("extra", [*PROJECT["optional-dependencies"]])
def test_an_extra_can_be_had(extra: str, python: str) -> None:
    """Versions that go together exist, for Linux; where a registry of packages is reached."""
    command = ["uv", "pip", "compile", "pyproject.toml", "--extra", extra, "--quiet"]
    command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    if "error sending request" in done.stderr:
        pytest.skip("no registry of packages is reached")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "\ntorch==" in done.stdout
