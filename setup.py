"""Builds the optional native kernels (kernels/*.cc) into the package. Everything else is in pyproject.toml.

FORERUN_KERNELS=0 skips them; without a working C++ compiler they are skipped with a notice, and forerun runs on torch.
FORERUN_SANITIZE=1 builds them with the address and undefined-behaviour sanitizers, for tests.
"""

import os
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = "forerun.native._kernels"
SOURCES = sorted(str(path) for path in Path("kernels").glob("*.cc"))
# -ffp-contract=off: the kernels say themselves where a product and a sum are fused, so that every path rounds alike.
FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-g0", "-Wall"]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC's own intrinsics
SANITIZERS = ["-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# What a compiler may lack, and a program that it must build for the flag to be used: Apple's clang has no OpenMP, and
# Debian's has none without libomp-dev. The kernels run on one thread then.
CHOICES = {
    "-fopenmp": "#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }\n",
    "-Wno-maybe-uninitialized": "int main() { return 0; }\n",
}


class BuildKernels(build_ext):
    """A plain shared library for ctypes: no Python symbols, no ABI tag in its name."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        try:
            refused = [flag for flag in CHOICES if flag in ext.extra_compile_args and not self.takes(flag)]
            for flags in (ext.extra_compile_args, ext.extra_link_args):
                flags[:] = [flag for flag in flags if flag not in refused]
            super().build_extension(ext)
            if "-fopenmp" in refused:
                print("forerun: this compiler has no OpenMP, the kernels run on one thread", file=sys.stderr)
        except Exception as error:  # whatever a compiler or its absence brings about
            reason = " ".join(str(error).split())[:300]
            print(f"forerun: the native kernels were not built, torch will be used instead: {reason}", file=sys.stderr)
            note = Path(self.build_lib, *ext.name.split(".")).with_suffix(".txt")
            for path in (note, Path("src", *ext.name.split(".")).with_suffix(".txt")) if self.inplace else (note,):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(reason + "\n")  # what `forerun inspect` will say

    def takes(self, flag: str) -> bool:
        """Whether the compiler builds a program with this flag without a word."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cc")
            source.write_text(CHOICES[flag])
            try:
                objects = self.compiler.compile([str(source)], folder, extra_postargs=[flag, "-Werror"])
                self.compiler.link_executable(objects, "probe", folder, extra_postargs=[flag], target_lang="c++")
            except Exception:  # as above
                return False
        return True


class Wheel(bdist_wheel):
    """With kernels it fits one platform, without them any; every Python that forerun runs on either way."""

    def get_tag(self) -> tuple[str, str, str]:
        built = self.get_finalized_command("build_ext").get_ext_fullpath(KERNELS)
        return "py3", "none", super().get_tag()[2] if Path(built).exists() else "any"

    def write_wheelfile(self, *args: object, **options: object) -> None:
        self.root_is_pure = self.get_tag()[2] == "any"
        super().write_wheelfile(*args, **options)


def kernels() -> list[Extension]:
    if os.environ.get("FORERUN_KERNELS") == "0":
        return []
    extra = SANITIZERS if os.environ.get("FORERUN_SANITIZE") == "1" else []
    return [
        Extension(
            KERNELS,
            SOURCES,
            depends=sorted(str(path) for path in Path("kernels").glob("*.h")),
            extra_compile_args=FLAGS + extra,
            extra_link_args=["-fopenmp", *extra],
            optional=True,  # it is no error if there is no file in the end
        )
    ]


setup(ext_modules=kernels(), cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel})
