"""The package as users get it: built, installed with nothing but its dependencies, with and without a compiler."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from itertools import combinations
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "swin_kernels/lib/libswin_kernels_cpu.so"
CUDA_LIBRARY = "swin_kernels/lib/libswin_kernels_cuda.so"
COMPILERS = ("c++", "g++", "clang++")
NO_COMPILER = not any(shutil.which(name) for name in COMPILERS)

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree: setup.py is missing")
CUDA_HOME = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
NVCC = shutil.which("nvcc") or shutil.which(f"{CUDA_HOME}/bin/nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason=f"nvcc is missing, on the PATH and in {CUDA_HOME}")
needs_compiler = pytest.mark.skipif(NO_COMPILER, reason=f"no C++ compiler: none of {', '.join(COMPILERS)} is on PATH")


def run(command: list, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """The finished command, with both outputs in `stdout`; the environment names no other compiler, backend or path.

    CUDA kernels are only built if `environment` says so: nvcc takes a minute.
    """
    hidden = {"CXX", "SWIN_KERNELS_CXX", "SWIN_KERNELS_SANITIZE", "PYTHONPATH", "SWIN_KERNELS_BACKEND", "LD_PRELOAD"}
    hidden |= {"CUDACXX", "TORCH_CUDA_ARCH_LIST"}
    kept = {key: value for key, value in os.environ.items() if key not in hidden}
    environment = {**kept, "SWIN_KERNELS_CUDA": "0", **environment}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def succeed(command: list, cwd: Path, **environment: str) -> str:
    done = run(command, cwd, **environment)
    assert done.returncode == 0, done.stdout
    return done.stdout


def copy_sources(target: Path) -> Path:
    """A copy of the tree, with the objects compiled so far: ninja relies on their times, which the copy keeps."""
    target.mkdir()
    for file in (*ROOT.glob("*.*"), ROOT / "LICENSE"):
        if file.is_file():
            shutil.copy2(file, target)
    for folder in ("csrc", "swin_kernels", "swin_unetr", "build/cpp", "build/cuda"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    return target


def build_wheel(sources: Path, **environment: str) -> tuple[Path, str]:
    """The wheel and what pip printed."""
    options = ["--verbose", "--no-deps", "--no-build-isolation", "--wheel-dir", sources / "dist"]
    printed = succeed([sys.executable, "-m", "pip", "wheel", *options, "."], sources, **environment)
    (wheel,) = (sources / "dist").glob("*.whl")
    return wheel, printed


def make_environment(folder: Path) -> Path:
    """The Python of a new environment that finds the installed dependencies, but not this package."""
    succeed([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    python = folder / "bin" / "python"
    own = succeed([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    # A folder named in a .pth file is searched, but .pth files in it (an editable install of this tree) are not read.
    (Path(own) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, what: Path, *options: str, **environment: str) -> str:
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation"]
    return succeed([*command, *options, what], python.parent, **environment)


PROBE = """
import importlib.metadata, pathlib, torch, swin_kernels, swin_unetr
from swin_kernels.backends import BACKENDS
print("from", pathlib.Path(swin_kernels.__file__).parents[1])
assert importlib.metadata.version("swin-kernels") == swin_kernels.__version__
scripts = importlib.metadata.distribution("swin-kernels").entry_points.select(group="console_scripts")
assert {script.name for script in scripts} == {"swin-kernels", "swin-unetr"}
assert all(callable(script.load()) for script in scripts)
qkv, table = torch.randn(1, 5, 6, 4, 3 * 8), torch.randn(5 * 5 * 5, 2)
chosen = swin_kernels.window_attention(qkv, table, 3, 1)
reference = swin_kernels.window_attention(qkv, table, 3, 1, backend="reference")
torch.testing.assert_close(chosen, reference)
print("unavailable:", BACKENDS["cpu"].unavailable())
try:
    swin_kernels.window_attention(qkv, table, 3, 1, backend="cpu")
except Exception as error:
    print("forced:", type(error).__name__, error)
else:
    print("forced: runs")
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("packaging") / "sources with a space")


@needs_compiler
def test_wheel_with_kernels(sources: Path, tmp_path: Path):
    wheel, printed = build_wheel(sources, SWIN_KERNELS_CUDA="auto")
    assert re.fullmatch(r"swin_kernels-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert LIBRARY in names
    assert (CUDA_LIBRARY in names) == (NVCC is not None)
    assert ("CUDA kernels are SKIPPED: nvcc was not found" in printed) == (NVCC is None)
    assert not [name for name in names if name.startswith(("csrc", "tests", "build"))]
    shipped = [str(file.relative_to(ROOT)) for file in (ROOT / "swin_unetr" / "data").glob("*.nii.gz")]
    shipped += [str(file.relative_to(ROOT)) for file in (ROOT / "swin_unetr" / "presets").rglob("*.yaml")]
    assert shipped
    assert {*shipped, "swin_kernels/ops/window_attention.py"} <= {*names}
    assert any(name.endswith("licenses/LICENSE") for name in names)

    python = make_environment(tmp_path / "environment")
    install(python, wheel, PATH="")
    printed = succeed([python, "-c", PROBE], tmp_path, PATH="")
    assert f"from {tmp_path}" in printed
    assert "unavailable: None" in printed
    assert "forced: runs" in printed


@needs_compiler
def test_editable_install_builds_in_place(sources: Path, tmp_path: Path):
    python = make_environment(tmp_path / "environment")
    # The ninja that wrote the log of the existing objects: another version would compile everything again.
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    install(python, sources, "--editable", PATH=path)
    assert (sources / LIBRARY).is_file()
    printed = succeed([python, "-c", PROBE], tmp_path)
    assert f"from {sources}" in printed
    assert "unavailable: None" in printed


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        pytest.param({"PATH": ""}, "no C++ compiler was found", id="empty PATH"),
        pytest.param({"CXX": "no-such-compiler"}, "CXX names 'no-such-compiler'", id="CXX that is not there"),
    ],
)
def test_no_compiler_is_said(sources: Path, environment: dict[str, str], reason: str):
    printed = succeed([sys.executable, "setup.py", "-q", "build_cpp", "--inplace"], sources, **environment)
    assert "SKIPPED" in printed
    assert reason in printed
    assert not (sources / LIBRARY).exists()


def test_install_without_compiler_runs_on_reference(sources: Path, tmp_path: Path):
    python = make_environment(tmp_path / "environment")
    printed = install(python, sources, "--verbose", PATH="")
    assert "SKIPPED: no C++ compiler was found" in printed
    assert "py3-none-any.whl" in printed
    printed = succeed([python, "-c", PROBE], tmp_path, PATH="")
    assert f"from {tmp_path}" in printed
    assert "unavailable: the C++ library was not built" in printed
    assert re.search(r"forced: \w+Error .*was not built", printed)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        pytest.param({"SWIN_KERNELS_CXX": "no-such-compiler"}, "not an executable program", id="named but missing"),
        pytest.param({"SWIN_KERNELS_CXX": "false"}, "this needs GCC or Clang", id="no compiler at all"),
        pytest.param({"CXXFLAGS": "-no-such-flag"}, "did not compile the C++ kernels", id="does not compile"),
    ],
)
@needs_compiler
def test_broken_compiler_is_an_error(tmp_path: Path, environment: dict[str, str], message: str):
    sources = copy_sources(tmp_path / "sources")
    done = run([sys.executable, "setup.py", "build_cpp", "--inplace"], sources, **environment)
    assert done.returncode != 0
    assert message in done.stdout


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        pytest.param({"SWIN_KERNELS_CUDA": "0"}, "SWIN_KERNELS_CUDA is 0", id="unwanted"),
        pytest.param(
            {"SWIN_KERNELS_CUDA": "auto", "CUDA_HOME": "/nowhere"},
            "nvcc was not found (tried /nowhere/bin/nvcc",
            id="no nvcc",
        ),
        pytest.param(
            {"SWIN_KERNELS_CUDA": "device"},
            "this machine has no NVIDIA device",
            id="no device",
            marks=pytest.mark.skipif(
                any(map(os.path.exists, ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg"))),
                reason="this machine has an NVIDIA device",
            ),
        ),
    ],
)
@needs_compiler
def test_skipped_cuda_kernels_are_said(sources: Path, environment: dict[str, str], reason: str):
    stale = sources / CUDA_LIBRARY
    stale.parent.mkdir(exist_ok=True)
    stale.touch()
    printed = succeed([sys.executable, "setup.py", "-q", "build_cpp", "--inplace"], sources, **environment)
    assert f"the CUDA kernels are SKIPPED: {reason}" in printed
    assert (sources / LIBRARY).exists()
    assert not stale.exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        pytest.param({"SWIN_KERNELS_CUDA": "maybe"}, "accepted are auto, device, 0 and 1", id="unknown switch"),
        pytest.param({"CUDACXX": "no-such-nvcc"}, "CUDACXX names 'no-such-nvcc'", id="named but missing"),
        pytest.param({"SWIN_KERNELS_CUDA": "1", "CUDA_HOME": "/nowhere"}, "nvcc was not found", id="demanded"),
        pytest.param({"TORCH_CUDA_ARCH_LIST": "Turing"}, "'Turing' is not an architecture", id="no such architecture"),
        pytest.param({"TORCH_CUDA_ARCH_LIST": "7.0;7.5"}, "no architecture is left of '7.0;7.5'", id="all too old"),
    ],
)
@needs_compiler
@needs_nvcc
def test_broken_cuda_settings_are_an_error(sources: Path, environment: dict[str, str], message: str):
    settings = {"SWIN_KERNELS_CUDA": "auto", **environment}
    done = run([sys.executable, "setup.py", "build_cpp", "--inplace"], sources, **settings)
    assert done.returncode != 0
    assert message in done.stdout


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("", ["compute_80,code=[compute_80,sm_80]", "compute_90a,code=sm_90a", "compute_100a,code=sm_100a"]),
        ("8.0;9.0a+PTX", ["compute_80,code=sm_80", "compute_90a,code=[compute_90a,sm_90a]"]),
        ("7.5 8.6", ["compute_86,code=sm_86"]),
    ],
)
def test_architectures(monkeypatch, wanted: str, expected: list[str]):
    """The user's list is kept; from the default, what nvcc does not know is left out."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    flags = runpy.run_path(str(ROOT / "setup.py"))["architecture_flags"]

    def listing(codes: str):
        return lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=codes)

    monkeypatch.setattr(subprocess, "run", listing("sm_80\nsm_90\nsm_100\n"))
    assert flags("nvcc", wanted) == [f"-gencode=arch={flag}" for flag in expected]
    monkeypatch.setattr(subprocess, "run", listing("sm_80\nsm_90\n"))
    known = expected if wanted else expected[:2]
    assert flags("nvcc", wanted) == [f"-gencode=arch={flag}" for flag in known]


@pytest.fixture
def cuda_library() -> Path:
    library = ROOT / CUDA_LIBRARY
    if not library.is_file():
        pytest.skip(f"{CUDA_LIBRARY} was not built: nvcc was missing, or SWIN_KERNELS_CUDA said so")
    return library


LOAD = """
import sys, torch
torch.ops.load_library(sys.argv[1])
operators = torch.ops.swin_kernels_cuda
x = torch.zeros(1, 4, 4, 8)
for name in ("window_attention_forward", "window_attention_backward", "window_partition", "window_reverse"):
    print(getattr(operators, name).default._schema)
assert isinstance(operators.attention_declines(1, 16, [7, 7, 7], True), str)
try:
    operators.window_partition(x, [2, 2], [0, 0])
except NotImplementedError as error:
    print("refused:", str(error).splitlines()[0])
"""


def test_cuda_library_loads_without_a_gpu(cuda_library: Path, tmp_path: Path):
    printed = succeed([sys.executable, "-c", LOAD, cuda_library], tmp_path)
    assert printed.count("swin_kernels_cuda::window_") >= 4
    assert "refused: Could not run 'swin_kernels_cuda::window_partition'" in printed


@pytest.mark.skipif(not shutil.which("readelf"), reason="readelf (binutils) is missing")
def test_cuda_library_asks_for_no_version_of_cuda(cuda_library: Path):
    needed = re.findall(r"NEEDED.*\[(.*)\]", succeed(["readelf", "--dynamic", cuda_library], ROOT))
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if "cuda" in name]


def objects_by_build() -> dict[str, list[Path]]:
    """Every object that the library was linked from. Those compiled once, for any processor, are the baseline's."""
    rules = ROOT / "build" / "cpp" / "build.ninja"
    if not rules.exists():
        pytest.skip("build/cpp is missing: python setup.py build_cpp --inplace has not run")
    text = rules.read_text()
    (linked,) = re.findall(r"^build \S+: link (.*)$", text, flags=re.M)
    flags = dict(re.findall(r"^build (\S+): compile .*\n  own = (.*)$", text, flags=re.M))
    found = {}
    for file in linked.split():
        build = re.search(r"-DSWIN_ISA=(\w+)", flags[file])
        found.setdefault(build[1] if build else "baseline", []).append(ROOT / file)
    return found


@pytest.mark.skipif(not shutil.which("nm"), reason="nm (binutils) is missing")
def test_no_symbol_is_shared_between_builds():
    """The linker keeps a weak symbol of two builds once: a processor without AVX-512 might run the AVX-512 copy."""
    symbols = {}
    for build, files in objects_by_build().items():
        listing = succeed(["nm", "--defined-only", "--extern-only", "--format=posix", *files], ROOT)
        # DW.ref.* are the compiler's pointers to functions of the C++ runtime, which is compiled once.
        symbols[build] = {name for name in re.findall(r"^(\S+) \w ", listing, flags=re.M) if name[:7] != "DW.ref."}
        assert symbols[build], files
    for one, other in combinations(symbols, 2):
        assert not symbols[one] & symbols[other], (one, other)


TOY_KERNELS = """
#include "cpu/vec.h"

namespace swin {
namespace SWIN_ISA {

// y = x times the bytes of a vector, which tells the builds apart.
void toy_forward(const float* x, int64_t count, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] = SWIN_VECTOR_BYTES * x[i];
}

void toy_backward(const float* grad_y, int64_t count, float* grad_x) { toy_forward(grad_y, count, grad_x); }

}  // namespace SWIN_ISA
}  // namespace swin
"""

TOY_REGISTRATION = """
#include "torch/cpu/cpu.h"

namespace swin {
SWIN_KERNEL(toy_forward, void(const float* x, int64_t count, float* y));
SWIN_KERNEL(toy_backward, void(const float* grad_y, int64_t count, float* grad_x));
}  // namespace swin

namespace swin_torch {
namespace {

Tensor run(const swin::Kernel<void(const float*, int64_t, float*)>& kernel, const Tensor& from) {
  require_dense("toy", "x", from);
  Tensor to = torch::stable::empty_like(from);
  kernel[build_here()](static_cast<const float*>(from.const_data_ptr()), from.numel(),
                       static_cast<float*>(to.mutable_data_ptr()));
  return to;
}

Tensor toy_forward(Tensor x) { return run(swin::toy_forward, x); }
Tensor toy_backward(Tensor grad_y) { return run(swin::toy_backward, grad_y); }

}  // namespace
}  // namespace swin_torch

STABLE_TORCH_LIBRARY_FRAGMENT(swin_kernels_cpu, m) {
  m.def("toy_forward(Tensor x) -> Tensor");
  m.def("toy_backward(Tensor grad_y) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cpu, CPU, m) {
  m.impl("toy_forward", TORCH_BOX(&swin_torch::toy_forward));
  m.impl("toy_backward", TORCH_BOX(&swin_torch::toy_backward));
}
"""

RUN_TOY = """
import os, sys, torch
torch.ops.load_library(sys.argv[1])
for isa in ("baseline", "avx2", "avx512", "amx"):
    os.environ["SWIN_KERNELS_ISA"] = isa
    try:
        print(isa, *(int(toy(torch.ones(3)).sum()) for toy in (
            torch.ops.swin_kernels_cpu.toy_forward, torch.ops.swin_kernels_cpu.toy_backward)))
    except RuntimeError as error:
        print(isa, "runs" if "SWIN_KERNELS_ISA" not in str(error) else "not here")
"""


@needs_compiler
def test_new_operator_is_two_files(tmp_path: Path):
    """Kernels in a new folder and a registration: no list names them, and every build has them."""
    sources = copy_sources(tmp_path / "sources")
    (sources / "csrc" / "cpu" / "toy").mkdir()
    (sources / "csrc" / "cpu" / "toy" / "kernels.cpp").write_text(TOY_KERNELS)
    (sources / "csrc" / "torch" / "cpu" / "toy.cpp").write_text(TOY_REGISTRATION)
    succeed([sys.executable, "setup.py", "-q", "build_cpp", "--inplace"], sources)
    printed = succeed([sys.executable, "-c", RUN_TOY, sources / LIBRARY], tmp_path).splitlines()
    vector_bytes = {"baseline": 16, "avx2": 32, "avx512": 64, "amx": 64}
    for line in printed:
        isa, *found = line.split(maxsplit=1)
        assert found in (["not here"], [f"{3 * vector_bytes[isa]} {3 * vector_bytes[isa]}"]), line
    assert "baseline 48 48" in printed


SOURCES = [
    str(file.relative_to(ROOT)) for file in sorted((ROOT / "csrc").rglob("*.cpp")) if file.name != "kernels_amx.cpp"
]


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="aarch64-linux-gnu-g++ is missing")
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_for_aarch64(source: str):
    import torch

    headers = Path(torch.__file__).parent / "include"
    options = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Icsrc", "-DSWIN_ISA=baseline"]
    torch_options = ["-isystem", headers, "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    succeed(["aarch64-linux-gnu-g++", *options, *torch_options, source], ROOT)


def test_lock_pins_every_dependency():
    """Exact versions, and nothing that is valid on one machine only: local builds, paths, hosts."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib is missing: Python 3.11 brought it")
    lines = (ROOT / "requirements" / "lock.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    for pin in pins:
        assert re.fullmatch(r"==\d[\d.]*", str(pin.specifier)), pin
        assert pin.url is None, pin
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *extras["test"],
        *extras["dev"],
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name == "swin-kernels":
            continue
        versions = [next(iter(pin.specifier)).version for pin in pins if pin.name == requirement.name.lower()]
        assert versions, requirement
        assert all(version in requirement.specifier for version in versions), requirement
