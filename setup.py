"""Builds the packages and, where a C++ compiler is found, the native kernels (everything else is in pyproject.toml).

Environment:
  PERP_NO_NATIVE=1                  leave the native kernels out; at run time, ignore those that are there.
  PERP_SANITIZE=address,undefined   compile them with -fsanitize=...; csrc/sanitize.sh does so in a build of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CUDA = ("perp_kernels", "cuda")


def tool(name: str) -> str:
    """Path of cmake or ninja: the copy beside this interpreter, else the one on PATH."""
    beside = Path(sys.executable).with_name(name)
    if beside.exists():
        return str(beside)
    found = shutil.which(name)
    if found is None:
        raise CompileError(f"{name} was not found")
    return found


class WithSources(build_py):
    """Puts the CUDA sources into the package, where NVRTC finds them at run time."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc" / "cuda", Path(self.build_lib, *CUDA, "source"), dirs_exist_ok=True)


class CMakeBuild(build_ext):
    """Compiles perp_kernels._C by CMake and Ninja; `optional=True` turns a failure into one warning.

    The CUDA kernels follow where there is an nvcc. What it cannot compile is left to NVRTC.
    """

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = (ROOT / self.build_temp / "native").resolve()
        try:
            self.compile(target.parent, build)
        except (OSError, ImportError, subprocess.CalledProcessError, CompileError) as error:
            # A half-configured cache would outlive the missing compiler, and an older module be packaged as this one.
            shutil.rmtree(build, ignore_errors=True)
            target.unlink(missing_ok=True)
            reason = (getattr(error, "stdout", None) or str(error)).strip().splitlines()[-12:]
            raise CompileError(
                "the native CPU kernels were not built, so perp_kernels will run on plain torch; install a C++20"
                " compiler and reinstall for the fast path. Last words of the build:\n  " + "\n  ".join(reason)
            ) from error

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        cubins = Path(self.build_lib, *CUDA, "cubins")
        if cubins.is_dir():
            shutil.copytree(cubins, ROOT.joinpath(*CUDA, "cubins"), dirs_exist_ok=True)

    def compile(self, module_dir: Path, build: Path) -> None:
        import pybind11

        configure = [
            tool("cmake"),
            *("-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPERP_MODULE_DIR={module_dir}",
            f"-DPERP_SANITIZE={os.environ.get('PERP_SANITIZE', '')}",
        ]
        native = [tool("cmake"), "--build", str(build)]
        cubins = [*native, "--target", "cubins", "--", "-k", "0"]
        for command in (configure, native, cubins):
            optional = command is cubins
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=not optional
            )
            if self.verbose:
                print(done.stdout)


native = os.environ.get("PERP_NO_NATIVE", "0") in ("", "0")
setup(
    packages=find_packages(include=["perp_kernels", "perp_kernels.*"])
    + find_packages("python", include=["perp", "perp.*"]),
    package_dir={"perp": "python/perp"},
    package_data={
        "perp_kernels": ["py.typed", "tuning/*.json"],
        "perp": ["py.typed"],
    },
    ext_modules=[Extension("perp_kernels._C", sources=[], optional=True)] if native else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": WithSources},
)
