"""Drives CMakeLists.txt; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def program(name: str) -> str:
    """cmake or ninja: without build isolation those of this environment need not be on PATH."""
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    return shutil.which(name, path=places) or name


class FreshBuild(build):
    """Starts from an empty folder: setuptools would ship modules that are no longer there."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Builds the op library and mor_ext._engine with one CMake run."""

    def run(self) -> None:
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        # One folder for all builds of this Python, so that an editable install, a wheel and a
        # change of torch share the kernels' objects, which depend on none of them.
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        torch_root = Path(torch.__file__).parent
        library = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
        # Every path that CMake would otherwise remember: pip's isolated builds keep cmake, ninja,
        # torch and pybind11 in a folder that is gone by the next build.
        defines = {
            "CMAKE_MAKE_PROGRAM": program("ninja"),
            "MOR_VERSION": self.distribution.get_version(),
            "MOR_TORCH_VERSION": torch.__version__,
            "MOR_TORCH_INCLUDE": torch_root / "include",
            "MOR_TORCH_LIBRARY": torch_root / "lib" / library,
            "MOR_OUTPUT_DIR": package / "mor_ext",
            "MOR_CUDA_ARCHS": os.environ.get("MOR_CUDA_ARCHS") or "80-real;90a-real;80-virtual",
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "Python_EXECUTABLE": sys.executable,
        }
        cmake = program("cmake")
        configure = [cmake, "-S", ROOT, "-B", folder, "-G", "Ninja"]
        subprocess.run(configure + [f"-D{k}={v}" for k, v in defines.items()], check=True)
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([cmake, "--build", folder, *(["-j", jobs] if jobs else [])], check=True)


# The extension's name only tells setuptools that the wheel is not pure Python.
setup(
    ext_modules=[Extension("mor_ext._engine", [])],
    cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
)
