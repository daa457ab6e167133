"""Builds the CUDA kernels for the CPU (`emulation/`) as a Python extension module.

Two builds: "plain", and "sanitized" with AddressSanitizer and UndefinedBehaviorSanitizer, which only a process started
under `sanitizer_environment` can load. Both are kept under ``build/`` and rebuilt when their sources change.
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.unmeasured import unmeasured_environment

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
MODULE = "swin_emulation"
SANITIZE = "-fsanitize=address,undefined"
OPTIMISE = {
    "plain": "-O2",
    "sanitized": f"-O0 -g1 {SANITIZE} -fno-sanitize-recover=all -fno-omit-frame-pointer",
}
"""With optimisation, compiling for the sanitizers would take longer than the tests of the unoptimised build."""
# Products are not contracted to fused multiply-adds: kernels say fmaf where they want one. Alike kernels stay apart.
FLAGS = "-std=c++20 -fPIC -fvisibility=hidden -ffp-contract=off -fno-ipa-icf -Wall -Wextra"


def compiler() -> list[str]:
    """The C++ compiler; skips the test if there is none."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if not shutil.which(command[0]):
        pytest.skip(f"the emulation of CUDA needs a C++20 compiler; there is no {command[0]}")
    return command


def _ninja_file(flavour: str, folder: Path) -> str:
    import pybind11

    includes = [HERE / "emulation", ROOT / "csrc"]  # in this order: cuda/ptx.h and cuda/launch.h stand in for csrc's
    system = [pybind11.get_include(), sysconfig.get_path("include")]
    flags = [
        *FLAGS.split(),
        *(f"-I{path}" for path in includes),
        *(word for path in system for word in ("-isystem", path)),
        f"-DMODULE_NAME={MODULE}",
    ]
    sources = [
        *(HERE / "emulation").glob("*.cpp"),
        *(HERE / "planted").glob("*.cu"),
        *(ROOT / "csrc/cuda").glob("*.cu"),
    ]
    for name in ("forward", "backward"):
        if (ROOT / f"csrc/cuda/window_attention_{name}.cu").exists():
            flags.append(f"-DSWIN_HAVE_{name.upper()}")
    objects = {source: folder / f"{source.stem}.o" for source in sorted(sources)}
    lines = [
        f"builddir = {folder}",
        "rule compile",
        f"  command = {shlex.join(compiler())} {shlex.join(flags)} $own -x c++ -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join(compiler())} -shared {SANITIZE if flavour == 'sanitized' else ''} $in -o $out",
        *(
            # pybind11's templates are neither the kernels' nor the emulator's: they are as they compile fastest
            f"build {compiled}: compile {source}\n  own = {'-O0' if source.stem == 'bindings' else OPTIMISE[flavour]}"
            for source, compiled in objects.items()
        ),
        f"build {folder / MODULE}.so: link {' '.join(map(str, objects.values()))}",
    ]
    return "\n".join(lines) + "\n"


@functools.cache  # a failed build is not tried again for every test
def _compile(flavour: str) -> tuple[Path, str]:
    """The extension module of `flavour`, recompiled where its sources changed; and what went wrong."""
    folder = ROOT / "build" / "emulation" / flavour
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes share the folder
        (folder / "build.ninja").write_text(_ninja_file(flavour, folder))
        done = subprocess.run(["ninja", "-f", folder / "build.ninja"], capture_output=True, text=True)
    return folder / f"{MODULE}.so", done.stdout[-8000:] + done.stderr if done.returncode else ""


def build(flavour: str) -> Path:
    """The extension module of `flavour`."""
    module, problem = _compile(flavour)
    if problem:
        raise RuntimeError(f"the {flavour} emulation does not compile:\n{problem}")
    return module


@functools.cache
def load(flavour: str | None = None):
    """The extension module, of the flavour that the process was started for."""
    path = build(flavour or os.environ.get("SWIN_EMULATION", "plain"))
    spec = importlib.util.spec_from_file_location(MODULE, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitizer_environment() -> dict[str, str]:
    """Environment of a process that loads the sanitized build. Python and PyTorch leak at exit: leaks are ignored.

    libstdc++ is named too: AddressSanitizer looks for its ``__cxa_throw`` when the process starts.
    """
    libraries = [
        subprocess.run([*compiler(), f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return {
        **unmeasured_environment(),
        "LD_PRELOAD": " ".join(map(str.strip, libraries)),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "SWIN_EMULATION": "sanitized",
    }
