"""Builds the optional native kernels (kernels/*.cc) into the package. Everything else is in pyproject.toml.

FORERUN_KERNELS=0 skips them; without a working C++ compiler they are skipped with a notice, and forerun runs on torch.
FORERUN_SANITIZE=1 builds them with the address and undefined-behaviour sanitizers, for tests.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("kernels").glob("*.cc"))
# -ffp-contract=off: the kernels say themselves where a product and a sum are fused, so that every path rounds alike.
FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-g0", "-Wall"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC's own intrinsics
SANITIZERS = ["-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


class BuildKernels(build_ext):
    """A plain shared library for ctypes: no Python symbols, no ABI tag in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:  # whatever a compiler or its absence brings about
            reason = " ".join(str(error).split())[:300]
            print(f"forerun: the native kernels were not built, torch will be used instead: {reason}", file=sys.stderr)
            note = Path(self.build_lib, *ext.name.split(".")).with_suffix(".txt")
            for path in (note, Path("src", *ext.name.split(".")).with_suffix(".txt")) if self.inplace else (note,):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(reason + "\n")  # what `forerun inspect` will say


def kernels() -> list[Extension]:
    if os.environ.get("FORERUN_KERNELS") == "0":
        return []
    extra = SANITIZERS if os.environ.get("FORERUN_SANITIZE") == "1" else []
    return [
        Extension(
            "forerun.native._kernels",
            SOURCES,
            depends=sorted(str(path) for path in Path("kernels").glob("*.h")),
            extra_compile_args=FLAGS + extra,
            extra_link_args=["-fopenmp", *extra],
            optional=True,  # it is no error if there is no file in the end
        )
    ]


setup(ext_modules=kernels(), cmdclass={"build_ext": BuildKernels})
