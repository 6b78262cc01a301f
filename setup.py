"""Builds csrc/ with CMake; everything else is in pyproject.toml.

Environment:
    FORGE_CUDA   auto (default: build _C_cuda.so when nvcc is found) | on (fail without nvcc) | off
    FORGE_WERROR 1 turns compiler warnings into errors (CI does)
"""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
PACKAGE = "forge_core.kernels"  # the libraries lie beside the Python ops that load them


def torch_root() -> Path:
    """Folder of the installed torch; an isolated build cannot import it but can still read its headers."""
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates.append(Path(sysconfig.get_path("purelib")) / "torch")
    for candidate in candidates:
        if (candidate / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
            return candidate
    raise SystemExit(
        f"forge_core builds against an installed torch >= 2.11; none found in {', '.join(map(str, candidates))}. "
        "Install torch first, for example: pip install torch==2.13.0"
    )


class CMakeBuild(build_ext):
    """Runs CMake once and puts _C.so, _C_cuda.so and the pybind11 module into the package."""

    def run(self) -> None:
        """Configures, builds and installs into the package folder (the source tree for an editable install)."""
        package_dir = (
            ROOT / self.get_finalized_command("build_py").get_package_dir(PACKAGE)
            if self.inplace or self.editable_mode
            else Path(self.build_lib).joinpath(*PACKAGE.split("."))
        )
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFORGE_TORCH_ROOT={torch_root()}",
            f"-DFORGE_CUDA={os.environ.get('FORGE_CUDA', 'auto')}",
            f"-DFORGE_WERROR={os.environ.get('FORGE_WERROR', '0')}",
            f"-Dpybind11_DIR={pybind11_cmake_dir()}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build_dir)], check=True)
        subprocess.run(["cmake", "--install", str(build_dir), "--prefix", str(package_dir.resolve())], check=True)

    def get_outputs(self) -> list[str]:
        """CMake installs the files itself; there is nothing for setuptools to copy."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """See get_outputs."""
        return {}


def pybind11_cmake_dir() -> str:
    """Where find_package(pybind11) finds its configuration."""
    import pybind11

    return pybind11.get_cmake_dir()


def version() -> str:
    """`__version__` of forge_core/__init__.py, read without importing it."""
    for line in (ROOT / "forge_core" / "__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise SystemExit("forge_core/__init__.py does not define __version__")


setup(
    version=version(),
    packages=[
        "forge_core", "forge_core.data", "forge_core.model", "forge_core.train", "forge_core.evaluate",
        "forge_core.kernels", "forge_core.kernels.gpu",
    ],
    # A top-level package named `kernels` would collide with another of that name: the folder ships inside forge_core.
    package_dir={"forge_core": "forge_core", "forge_core.kernels": "kernels"},
    package_data={"forge_core": ["py.typed"], "forge_core.kernels": ["*.so", "*.pyi"]},
    ext_modules=[Extension(f"{PACKAGE}._data", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)  # fmt: skip
