"""Builds the C++ and CUDA kernels with ninja; everything else about the package is in pyproject.toml.

``python setup.py build_cpp --inplace`` (re)builds ``libswin_kernels_cpu.so`` and, where nvcc is found,
``libswin_kernels_cuda.so`` in the source tree's ``swin_kernels/lib``; neither a GPU nor a torch for CUDA is needed.
``pip install .``, ``pip install -e .`` and the wheel run the same command. The environment decides:

- ``SWIN_KERNELS_CXX``, else ``CXX``, else the first of c++, g++, clang++ is the compiler (arguments are allowed, as in
  ``ccache g++``); if none is found, the kernels are skipped and the package runs on its PyTorch reference,
- ``CXXFLAGS`` and ``LDFLAGS`` are appended, ``MAX_JOBS`` limits the parallel compilations,
- ``SWIN_KERNELS_SANITIZE=address`` (or another list for ``-fsanitize``) builds the C++ kernels with a sanitizer, and
  does not build the CUDA kernels,
- ``SWIN_KERNELS_CUDA`` is ``auto`` (the default: CUDA kernels are built if nvcc is found), ``device`` (the same, if
  this machine has an NVIDIA device), ``0`` (never) or ``1`` (a missing nvcc is an error),
- ``CUDACXX`` is the nvcc, else that of ``CUDA_HOME``, else the one on the PATH, else that of ``/usr/local/cuda``,
- ``TORCH_CUDA_ARCH_LIST`` lists the architectures, as in ``8.0;9.0a+PTX``; `CUDA_ARCHITECTURES` is the default.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

LIBRARY = Path("swin_kernels", "lib", "libswin_kernels_cpu.so")
CUDA_LIBRARY = LIBRARY.with_name("libswin_kernels_cuda.so")

COMPILE_FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra"
)
# The oldest stable ABI the library needs: torch 2.10 loads what any later torch built.
TORCH_FLAGS = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Builds of every kernels.cpp, by the machine the compiler targets; the baseline is one everywhere.
ISA_FLAGS = {
    "x86_64": {
        "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c -mprefer-vector-width=512",
        "avx2": "-mavx2 -mfma -mf16c",
    }
}
# A further build, of every kernels_amx.cpp: AVX-512's flags, and an assembler that knows Intel's matrix unit.
AMX_PROBE = 'void probe() { asm volatile("tilerelease"); }'

# Machine code for A100, Hopper and Blackwell; other GPUs of 8.0 or later compile the PTX when it is first used.
CUDA_ARCHITECTURES = "8.0+PTX;9.0a;10.0a"
OLDEST_ARCHITECTURE = 80  # the kernels need cp.async and bfloat16 on tensor cores
CUDA_FLAGS = "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"


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


def find_nvcc() -> tuple[str | None, str]:
    """The path of nvcc and "", or None and the reason why the CUDA kernels are not built.

    Raises:
        SystemExit: ``SWIN_KERNELS_CUDA`` has an unknown value, or is 1 and there is no nvcc.
    """
    wanted = os.environ.get("SWIN_KERNELS_CUDA") or "auto"
    if wanted not in ("auto", "device", "0", "1"):
        raise SystemExit(f"SWIN_KERNELS_CUDA is {wanted!r}; accepted are auto, device, 0 and 1")
    if wanted == "0":
        return None, "SWIN_KERNELS_CUDA is 0"
    if os.environ.get("SWIN_KERNELS_SANITIZE"):
        return None, "SWIN_KERNELS_SANITIZE is for the C++ kernels"
    if wanted == "device" and not any(map(os.path.exists, ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg"))):
        return None, "this machine has no NVIDIA device (SWIN_KERNELS_CUDA=device)"
    if COMPILER is None:
        return None, SKIPPED
    if named := os.environ.get("CUDACXX"):
        if shutil.which(named) is None:
            raise SystemExit(f"CUDACXX names {named!r}, which is not an executable program")
        return shutil.which(named), ""
    if home := os.environ.get("CUDA_HOME"):
        candidates = [os.path.join(home, "bin", "nvcc")]
    else:
        candidates = ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        if found := shutil.which(candidate):
            return found, ""
    reason = f"nvcc was not found (tried {', '.join(candidates)}; CUDACXX and CUDA_HOME say where to look)"
    if wanted == "1":
        raise SystemExit(f"SWIN_KERNELS_CUDA is 1, but {reason}")
    return None, reason


NVCC, CUDA_SKIPPED = find_nvcc()


def target_machine(compiler: list[str]) -> str:
    """The machine that the compiler compiles for, such as ``x86_64``."""
    answer = subprocess.run([*compiler, "-dumpmachine"], capture_output=True, text=True)
    if answer.returncode:
        raise SystemExit(
            f"{shlex.join(compiler)} -dumpmachine failed, this needs GCC or Clang: {answer.stderr.strip()}"
        )
    return answer.stdout.split("-")[0]


def assembles(compiler: list[str], source: str) -> bool:
    """Whether the compiler can compile ``source`` to an object."""
    command = [*compiler, "-x", "c++", "-c", "-o", os.devnull, "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True).returncode == 0


def torch_folder() -> Path:
    """Where torch is installed, without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
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

    Paths are relative to the source tree, so that a copy of the tree need not be compiled again.
    """
    isas = ISA_FLAGS.get(target_machine(compiler), {})
    has_amx = "avx512" in isas and assembles(compiler, AMX_PROBE)
    torch = torch_folder()
    sanitizers = os.environ.get("SWIN_KERNELS_SANITIZE", "")
    sanitize = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g"] if sanitizers else []
    compile_flags = [*COMPILE_FLAGS.split(), *sanitize]
    # An undefined symbol fails the link, not the user's first import. Sanitizers' symbols are resolved at run time.
    link_flags = [*sanitize, *([] if sanitizers else ["-Wl,-z,defs"])]
    # Python loads libtorch privately, so the library has to name it; torch is loaded by then, so it needs no run path.
    torch_libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu"]

    objects: list[tuple[Path, Path, list[str]]] = []  # source, object, flags
    for source in sorted(Path("csrc", "cpu").rglob("*.cpp")):
        compiled = (folder / source.relative_to("csrc")).with_suffix(".o")
        if source.name == "kernels.cpp":
            for isa, options in {**isas, "baseline": ""}.items():
                objects.append((source, compiled.with_suffix(f".{isa}.o"), [*options.split(), f"-DSWIN_ISA={isa}"]))
        elif source.name != "kernels_amx.cpp":
            objects.append((source, compiled, []))
        elif has_amx:
            objects.append((source, compiled, [*isas["avx512"].split(), "-DSWIN_ISA=amx"]))
    for source in sorted(Path("csrc", "torch", "cpu").glob("*.cpp")):
        compiled = (folder / source.relative_to("csrc")).with_suffix(".o")
        objects.append((source, compiled, [TORCH_FLAGS, "-isystem", str(torch / "include")]))
    builds = [f"-DSWIN_HAVE_{isa.upper()}" for isa in (*isas, *(["amx"] if has_amx else []))]

    library = folder / LIBRARY.name
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {path(folder)}",
        f"cxx = {quote(compiler)}",
        f"flags = {quote([*compile_flags, *builds, '-Icsrc', *shlex.split(os.environ.get('CXXFLAGS', ''))])}",
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


def architecture_flags(nvcc: str, wanted: str) -> list[str]:
    """nvcc's options for a list of architectures as in ``TORCH_CUDA_ARCH_LIST``; the default one for "".

    From the default list, what this nvcc does not know is left out; from the user's, what is too old for the kernels.

    Raises:
        SystemExit: the list cannot be read, or nothing is left of it.
    """
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    flags = []
    for word in (wanted or CUDA_ARCHITECTURES).replace(";", " ").replace(",", " ").split():
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if match is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: {word!r} is not an architecture; accepted are values such as 8.0, 9.0a+PTX"
            )
        major, minor, family, ptx = match.groups()
        name = f"{major}{minor}{family}"
        if int(f"{major}{minor}") < OLDEST_ARCHITECTURE:
            print(f"TORCH_CUDA_ARCH_LIST: {word} is left out: the CUDA kernels need 8.0 or later", file=sys.stderr)
        elif wanted or f"sm_{major}{minor}" in known:
            code = f"[compute_{name},sm_{name}]" if ptx else f"sm_{name}"
            flags.append(f"-gencode=arch=compute_{name},code={code}")
    if not flags:
        raise SystemExit(
            f"no architecture is left of {wanted or CUDA_ARCHITECTURES!r} (TORCH_CUDA_ARCH_LIST) for {nvcc}"
        )
    return flags


def cuda_ninja_rules(nvcc: str, compiler: list[str], folder: Path) -> tuple[str, Path]:
    """As `ninja_rules`, for the CUDA kernels. The runtime is linked statically: no version of libcudart is needed."""
    torch = torch_folder()
    host = [f"-ccbin={compiler[0]}"] if len(compiler) == 1 else []  # nvcc does not accept arguments there
    flags = architecture_flags(nvcc, os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    library = folder / CUDA_LIBRARY.name
    kernels = {folder / f"{source.stem}.o": source for source in sorted(Path("csrc", "cuda").glob("*.cu"))}
    sources = sorted(Path("csrc", "torch", "cuda").glob("*.cpp"))
    registrations = {folder / "torch" / f"{source.stem}.o": source for source in sources}
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {path(folder)}",
        f"nvcc = {quote([nvcc, *host])}",
        f"cxx = {quote(compiler)}",
        f"flags = {quote([*CUDA_FLAGS.split(), *flags, '-Icsrc'])}",
        f"hostflags = {quote([*COMPILE_FLAGS.split(), TORCH_FLAGS, '-isystem', str(torch / 'include'), '-Icsrc'])}",
        f"libraries = {quote([f'-L{torch}/lib', '-ltorch_cpu', '-ldl'])}",
        "rule compile",
        "  command = $nvcc $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule register",
        "  command = $cxx $hostflags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        "  command = $nvcc -shared -cudart=static -Xlinker=-z,defs $in $libraries -o $out",
        "  description = link $out",
        *(f"build {path(compiled)}: compile {path(source)}" for compiled, source in kernels.items()),
        *(f"build {path(compiled)}: register {path(source)}" for compiled, source in registrations.items()),
        f"build {path(library)}: link {' '.join(map(path, [*kernels, *registrations]))}",
        "",
    ]
    return "\n".join(lines), library


class BuildCpp(Command):
    """Compiles ``csrc`` into ``swin_kernels/lib``."""

    description = "build the C++ and CUDA kernels"
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

    def target(self, library: Path) -> Path:
        if self.inplace or self.editable_mode:
            return library
        assert self.build_lib is not None, "finalize_options takes it from the command that builds"
        return Path(self.build_lib) / library

    def run(self) -> None:
        if COMPILER is None:
            self.skip(
                LIBRARY, f"the C++ kernels are SKIPPED: {SKIPPED}. Everything runs, slower, on the PyTorch reference."
            )
        else:
            folder = Path("build", "cpp")
            if sanitizers := os.environ.get("SWIN_KERNELS_SANITIZE"):
                folder = folder / sanitizers.replace(",", "-")
            folder.mkdir(parents=True, exist_ok=True)
            self.compile(LIBRARY, folder, *ninja_rules(COMPILER, folder), "C++ kernels", shlex.join(COMPILER))
        if NVCC is None or COMPILER is None:
            self.skip(CUDA_LIBRARY, f"the CUDA kernels are SKIPPED: {CUDA_SKIPPED}. GPUs run on the Triton kernels.")
        else:
            folder = Path("build", "cuda")
            folder.mkdir(parents=True, exist_ok=True)
            self.compile(CUDA_LIBRARY, folder, *cuda_ninja_rules(NVCC, COMPILER, folder), "CUDA kernels", NVCC)

    def skip(self, library: Path, reason: str) -> None:
        # A library left by an earlier build would contradict this message.
        self.target(library).unlink(missing_ok=True)
        self.warn(reason)

    def compile(self, library: Path, folder: Path, rules: str, compiled: Path, what: str, compiler: str) -> None:
        """Run ninja on `rules` in `folder` and put what it `compiled` where `library` belongs."""
        (folder / "build.ninja").write_text(rules)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        ninja = [ninja_program(), "-f", str(folder / "build.ninja"), "-j", jobs]
        if subprocess.run(ninja).returncode:
            raise SystemExit(f"{compiler} was found but did not compile the {what}, see above")
        # A process may have the old library mapped: replace the file, never write into it.
        target = self.target(library)
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".new")
        shutil.copy2(compiled, fresh)
        fresh.replace(target)

    def get_source_files(self) -> list[str]:
        return [str(file) for file in sorted(Path("csrc").rglob("*.*"))]

    def get_outputs(self) -> list[str]:
        built = {LIBRARY: COMPILER, CUDA_LIBRARY: NVCC}
        return [str(self.target(library)) for library, compiler in built.items() if compiler is not None]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_cpp", None)]  # noqa: RUF012


class PlatformDistribution(Distribution):
    """Installs into the platform-specific folder exactly when there is platform code."""

    def has_ext_modules(self) -> bool:
        return COMPILER is not None


class Wheel(bdist_wheel):
    """The library is not a Python extension: one wheel serves every Python of the platform."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(
    distclass=PlatformDistribution,
    cmdclass={"build": Build, "build_cpp": BuildCpp, "bdist_wheel": Wheel},
)
