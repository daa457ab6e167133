"""Builds the C++ kernels with ninja; everything else about the package is in pyproject.toml.

``python setup.py build_cpp --inplace`` (re)builds ``swin_kernels/lib/libswin_kernels_cpu.so`` in the source tree;
``pip install .``, ``pip install -e .`` and the wheel run the same command. The environment decides:

- ``SWIN_KERNELS_CXX``, else ``CXX``, else the first of c++, g++, clang++ is the compiler (arguments are allowed, as in
  ``ccache g++``); with none found the kernels are skipped and the package runs on its PyTorch reference,
- ``CXXFLAGS`` and ``LDFLAGS`` are appended, ``MAX_JOBS`` bounds the parallel compilations,
- ``SWIN_KERNELS_SANITIZE=address`` (or another list for ``-fsanitize``) builds with a sanitizer.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

LIBRARY = Path("swin_kernels", "lib", "libswin_kernels_cpu.so")

COMPILE_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra"
)
# The oldest stable ABI the library needs: torch 2.10 loads what any later torch built.
TORCH_FLAGS = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Vector widths that one source is compiled for, by the machine the compiler targets; everything has the baseline.
ISA_FLAGS = {
    "x86_64": {
        "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512",
        "avx2": "-mavx2 -mfma -mf16c",
    }
}


def find_compiler() -> tuple[list[str] | None, str]:
    """The compiler's command line and "", or None and the reason there is none.

    Raises:
        SystemExit: ``SWIN_KERNELS_CXX`` names a program that does not exist.
    """
    if sys.platform != "linux":
        return None, f"they are built on Linux only, this is {sys.platform}"
    for variable in ("SWIN_KERNELS_CXX", "CXX"):
        command = shlex.split(os.environ.get(variable, ""))
        if command and shutil.which(command[0]):
            return command, ""
        if command and variable == "SWIN_KERNELS_CXX":
            raise SystemExit(f"SWIN_KERNELS_CXX names {command[0]!r}, which is not an executable program")
        if command:
            return None, f"{variable} names {command[0]!r}, which is not an executable program"
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name], ""
    return None, "no C++ compiler was found (tried SWIN_KERNELS_CXX, CXX, c++, g++, clang++)"


COMPILER, SKIPPED = find_compiler()


def target_machine(compiler: list[str]) -> str:
    """What the compiler compiles for, as in ``x86_64``."""
    answer = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True)
    if answer.returncode:
        raise SystemExit(
            f"{shlex.join(compiler)} -dumpmachine failed, this needs GCC or Clang: {answer.stderr.strip()}"
        )
    return answer.stdout.split("-")[0]


def torch_folder() -> Path:
    """Where torch is installed, without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None:
        raise SystemExit("building the C++ kernels needs torch >= 2.10 in the building environment (for its headers)")
    return Path(spec.submodule_search_locations[0])


def ninja_program() -> str:
    """The ninja of the building environment, or the system's."""
    beside_python = shutil.which("ninja", path=os.path.dirname(sys.executable))
    program = beside_python or shutil.which("ninja")
    if program is None:
        raise SystemExit("building the C++ kernels needs ninja: pip install ninja")
    return program


def quote(words: list[str]) -> str:
    """A shell command line as the value of a ninja variable."""
    return shlex.join(words).replace("$", "$$")


def path(value: Path) -> str:
    """A path as a ninja input or output."""
    return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_rules(compiler: list[str], folder: Path) -> tuple[str, Path]:
    """The text of build.ninja, with objects and library in ``folder``; and the library.

    Paths are relative to the source tree, so that a copy of the tree has nothing to compile again.
    """
    isas = ISA_FLAGS.get(target_machine(compiler), {})
    torch = torch_folder()
    sanitizers = os.environ.get("SWIN_KERNELS_SANITIZE", "")
    sanitize = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g"] if sanitizers else []
    compile_flags = [*COMPILE_FLAGS.split(), *sanitize]
    # An undefined symbol is an error of the link, not of the user's first import. Sanitizers' symbols come at run time.
    link_flags = [*sanitize, *([] if sanitizers else ["-Wl,-z,defs"])]
    # Python loads libtorch privately, so the library has to name it; torch has it in memory by then: no run path.
    torch_libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu"]

    objects: list[tuple[Path, Path, list[str]]] = []  # source, object, flags
    for source in sorted(Path("csrc", "cpu").glob("*.cpp")):
        if source.name == "kernels.cpp":
            for isa, flags in {**isas, "baseline": ""}.items():
                objects.append((source, folder / f"kernels.{isa}.o", [*flags.split(), f"-DSWIN_ISA={isa}"]))
        elif source.name == "dispatch.cpp":
            objects.append((source, folder / "dispatch.o", [f"-DSWIN_HAVE_{isa.upper()}" for isa in isas]))
        else:
            objects.append((source, folder / f"{source.stem}.o", []))
    torch_flags = [TORCH_FLAGS, "-isystem", str(torch / "include")]
    objects.append((Path("csrc", "torch", "cpu.cpp"), folder / "torch_cpu.o", torch_flags))

    library = folder / LIBRARY.name
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {path(folder)}",
        f"cxx = {quote(compiler)}",
        f"flags = {quote([*compile_flags, '-Icsrc', *shlex.split(os.environ.get('CXXFLAGS', ''))])}",
        f"ldflags = {quote([*link_flags, *shlex.split(os.environ.get('LDFLAGS', ''))])}",
        f"libraries = {quote(torch_libraries)}",
        "rule compile",
        "  command = $cxx $flags $own -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        "  command = $cxx -shared $ldflags $in $libraries -o $out",
        "  description = link $out",
    ]
    for source, compiled, flags in objects:
        lines += [f"build {path(compiled)}: compile {path(source)}", f"  own = {quote(flags)}"]
    lines += [f"build {path(library)}: link {' '.join(path(compiled) for _, compiled, _ in objects)}", ""]
    return "\n".join(lines), library


class BuildCpp(Command):
    """Compiles ``csrc`` into ``swin_kernels/lib``."""

    description = "build the C++ kernels"
    user_options = [  # noqa: RUF012  (setuptools reads a plain list)
        ("inplace", "i", "put the library into the source tree"),
        ("build-lib=", "b", "folder of the built package"),
    ]
    boolean_options = ["inplace"]  # noqa: RUF012

    def initialize_options(self) -> None:
        self.inplace = False
        self.editable_mode = False  # set by setuptools for `pip install -e`
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    @property
    def target(self) -> Path:
        return LIBRARY if self.inplace or self.editable_mode else Path(self.build_lib) / LIBRARY

    def run(self) -> None:
        if COMPILER is None:
            # A library left by an earlier build would contradict what is said here.
            self.target.unlink(missing_ok=True)
            self.warn(f"the C++ kernels are SKIPPED: {SKIPPED}. Everything runs, slower, on the PyTorch reference.")
            return
        folder = Path("build", "cpp")
        if sanitizers := os.environ.get("SWIN_KERNELS_SANITIZE"):
            folder = folder / sanitizers.replace(",", "-")
        folder.mkdir(parents=True, exist_ok=True)
        text, library = ninja_rules(COMPILER, folder)
        (folder / "build.ninja").write_text(text)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        ninja = [ninja_program(), "-f", str(folder / "build.ninja"), "-j", jobs]
        if subprocess.run(ninja).returncode:
            raise SystemExit(f"{shlex.join(COMPILER)} is there but did not compile the C++ kernels, see above")
        # A process may have the old library mapped: replace the file, never write into it.
        self.target.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.target.with_suffix(".new")
        shutil.copy2(library, fresh)
        fresh.replace(self.target)

    def get_source_files(self) -> list[str]:
        return [str(file) for file in sorted(Path("csrc").rglob("*.*"))]

    def get_outputs(self) -> list[str]:
        return [] if COMPILER is None else [str(self.target)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_cpp", None)]  # noqa: RUF012


class PlatformDistribution(Distribution):
    """Installs beside platform code exactly when there is any."""

    def has_ext_modules(self) -> bool:
        return COMPILER is not None


class Wheel(bdist_wheel):
    """The library is no Python extension: one wheel serves every Python of the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(
    distclass=PlatformDistribution,
    cmdclass={"build": Build, "build_cpp": BuildCpp, "bdist_wheel": Wheel},
)
