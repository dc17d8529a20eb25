"""Packages of alphaspin, and the optional C++ operators for the CPU. Metadata: pyproject.toml.

The extension is built where torch and a C++ compiler are found, which takes
``pip install --no-build-isolation .`` (with or without ``-e``) or, in a checkout,
``python setup.py build_ext --inplace``. Anywhere else the install says so and goes on: every
operator also has a PyTorch implementation.
"""

import shutil
import sys
from pathlib import Path

from setuptools import find_namespace_packages, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
RECIPE_FILES = ("yaml", "jsonl", "json", "safetensors", "jinja")
# Without traps to preserve, loops with conditions in them can be vectorised.
FLAGS = ["-O3", "-fno-trapping-math"]
SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))


def extension_arguments() -> dict:
    """Arguments of ``setup`` that build the extension; none, with the reason printed, if not."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return without_extension(f"torch cannot be imported here ({error})")
    if shutil.which("c++") is None and shutil.which("g++") is None:
        return without_extension("no C++ compiler found")

    # A plain file _C.so: it holds operators for torch.ops.load_library, no Python module.
    torch_build_ext = BuildExtension.with_options(no_python_abi_suffix=True)

    class OptionalBuildExtension(torch_build_ext):
        """torch's build_ext, going on without the extension when compiling fails."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                without_extension(f"compiling failed ({error})")
                self.extensions = []

    extension = CppExtension(
        "alphaspin_kernels._C",
        SOURCES,
        extra_compile_args=[*FLAGS, "-fopenmp"] if sys.platform == "linux" else FLAGS,
        extra_link_args=["-fopenmp"] if sys.platform == "linux" else [],
        py_limited_api=True,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuildExtension}}


def without_extension(reason: str) -> dict:
    """Say why there is no extension, and return no arguments for it."""
    print(
        f"\nalphaspin: building without the C++ operators: {reason}.\n"
        "alphaspin: the operators will run through PyTorch. To build the C++ ones: install torch "
        "and a compiler,\nalphaspin: then `pip install --no-build-isolation -e .`\n",
        file=sys.stderr,
    )
    return {"cmdclass": {"build_ext": build_ext}}


setup(
    package_dir={"alphaspin": "alphaspin", "alphaspin_kernels": "kernels/alphaspin_kernels"},
    packages=[
        # The folders of recipes too: they hold data, and setuptools wants them named.
        *find_namespace_packages(include=["alphaspin", "alphaspin.*"]),
        *find_packages("kernels"),
    ],
    package_data={
        "alphaspin": [
            "py.typed",
            *("report/*.html.jinja", "report/*.js"),
            *(f"recipes/**/*.{kind}" for kind in RECIPE_FILES),
        ],
        "alphaspin_kernels": ["py.typed"],
    },
    **extension_arguments(),
)
