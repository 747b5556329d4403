"""Builds the C++ cores. Everything else is said in pyproject.toml.

Every ``csrc/<name>.cpp`` becomes the extension module ``hdp._<name>``. None of them links against torch, so an
ordinary isolated ``pip install`` builds them and one wheel serves every torch.
"""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

ROOT = Path(__file__).parent


def extension(source: Path) -> Pybind11Extension:
    return Pybind11Extension(
        f"hdp._{source.stem}",
        [source.relative_to(ROOT).as_posix()],
        cxx_std=20,
        extra_compile_args=["-O3", "-fno-math-errno", "-Wall", "-Wextra"],
        depends=[p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "csrc").glob("*.h"))],
    )


setup(
    ext_modules=[extension(source) for source in sorted((ROOT / "csrc").glob("*.cpp"))],
    cmdclass={"build_ext": build_ext},
)
