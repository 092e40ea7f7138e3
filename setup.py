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


# Where nvcc is: machine code for sm_80 and sm_90a, and PTX for what is newer. MOR_CUDA_ARCHS in the
# environment names others, in CMake's words (https://cmake.org/cmake/help/latest/prop_tgt/
# CUDA_ARCHITECTURES.html), as in MOR_CUDA_ARCHS=90a-real; "none" leaves the CUDA kernels out.
CUDA_ARCHS = "80-real;90a-real;80-virtual"


class CMakeBuild(build_ext):
    """Builds the op library and mor_ext._engine with one CMake run."""

    user_options = [  # noqa: RUF012
        *build_ext.user_options,
        ("prebuilt=", None, "take this libmor_ext.so, build mor_ext._engine alone"),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.prebuilt: str | None = None

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "mor_ext"
        archs = "prebuilt" if self.prebuilt else os.environ.get("MOR_CUDA_ARCHS") or CUDA_ARCHS
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
            "MOR_OUTPUT_DIR": package,
            "MOR_CUDA_ARCHS": archs,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "Python_EXECUTABLE": sys.executable,
        }
        cmake = program("cmake")
        configure = [cmake, "-S", ROOT, "-B", folder, "-G", "Ninja"]
        subprocess.run(configure + [f"-D{k}={v}" for k, v in defines.items()], check=True)
        jobs = os.environ.get("MAX_JOBS")
        make = [cmake, "--build", folder, *(["-j", jobs] if jobs else [])]
        if self.prebuilt:
            make += ["--target", "_engine"]
            target = package / "libmor_ext.so"
            if Path(self.prebuilt).resolve() != target.resolve():
                shutil.copyfile(self.prebuilt, target)
        subprocess.run(make, check=True)


# The extension's name only tells setuptools that the wheel is not pure Python.
setup(
    ext_modules=[Extension("mor_ext._engine", [])],
    cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
)
