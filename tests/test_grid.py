"""A new operator and backend join the grid by their files alone: `tests/toy` appears wherever the grid does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from swin_kernels import backends

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "swin_kernels"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)


PROGRAM = """
import tests.toy, torch, swin_kernels
from swin_kernels import backends, doctor
from swin_kernels.ops import OPERATORS
from swin_kernels.doctor import Report
print("explained:", swin_kernels.explain("toy_scale", torch.ones(2)))
print("attention:", swin_kernels.explain(torch.ones(1, 4, 4, 24), torch.ones(9, 2), 2)["toy"])
for name in list(OPERATORS):
    if name != "toy_scale":
        del OPERATORS[name]
doctor.show(doctor.run(quick=True))
"""


def test_explain_and_doctor_show_what_joined():
    done = run("-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith(("explained", "attention")))
    reasons = ast.literal_eval(said["explained"])
    assert set(reasons) == {*backends.BACKENDS, "toy"}
    assert reasons["toy"] is None
    assert reasons["cuda"]
    assert said["attention"] == "it has no kernel for window_attention"
    rows = [line.split() for line in done.stdout.splitlines() if "toy_scale" in line and "float32" in line]
    checked = [row[0] for row in rows if row[-2:-1] == ["ok"] or row[-1] == "ok"]
    available = {"toy", "reference"} | ({"cpu"} if backends.BACKENDS["cpu"].unavailable() is None else set())
    assert set(checked) == available
    assert "a toy has no gradients" in " ".join(done.stdout.split())


def test_contract_holds_what_joined():
    """The generic tests include the new row and column, and check them: a wrong kernel fails."""
    base = ["-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.toy", "tests/ops/test_contract.py"]
    some = "toy_scale and (agree or bad_arguments or explain or public or empty or vmap or opcheck)"
    done = run(*base, "-k", some, "--verbose")
    assert done.returncode == 0, done.stdout
    assert "test_backends_agree[toy_scale-a matrix-toy-torch.float32] PASSED" in done.stdout
    assert "test_bad_arguments_are_named[toy_scale] PASSED" in done.stdout
    broken = (
        "import tests.toy, swin_kernels.backends.toy.toy_scale as k; k.forward = lambda x, factor: x * factor * 1.01"
    )
    program = f"{broken}\nimport pytest, sys; sys.exit(pytest.main({[*base[2:], '-k', 'toy-torch.float32']!r}))"
    done = run("-c", program)
    assert done.returncode == 1, done.stdout
    assert "output: error" in done.stdout


def test_import_is_light():
    """The kernels of a backend, MONAI and Dynamo are imported by those who need them."""
    heavy = ("monai", "torch._dynamo", "swin_kernels.backends.triton.window_attention")
    done = run("-c", f"import swin_kernels, sys; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_readme_misses_what_joined():
    program = "import sys, tests.toy; sys.path.insert(0, 'scripts'); import readme_tables; readme_tables.main()"
    done = run("-c", program, "--check")
    assert done.returncode == 1
    assert "| `toy_scale(x, factor=2.0, *, backend=None)` | `x` → same: times a number |" in done.stderr
    assert "| `toy` | every processor |" in done.stderr


def test_readme_has_every_operator_and_backend():
    done = run("scripts/readme_tables.py", "--check")
    assert done.returncode == 0, done.stderr


def test_a_kernel_with_other_parameters_is_refused(monkeypatch):
    class Kernel:
        @staticmethod
        def forward(x): ...

        backward = None

    monkeypatch.setattr(backends.BACKENDS["cpu"], "kernel", lambda name: Kernel)
    with pytest.raises(TypeError, match=r"backend 'cpu': layer_norm\.forward is .*; accepted is a function of \(x, we"):
        backends.kernel_of(backends.BACKENDS["cpu"], "layer_norm")


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (object(), "accepted is an object with the members of Backend"),
        (type(backends.BACKENDS["cpu"]), "accepted is an object with the members of Backend"),
        (None, "a backend 'cpu' is already registered"),
    ],
    ids=["no backend", "class", "twice"],
)
def test_register_refuses(backend, message):
    with pytest.raises((TypeError, ValueError), match=message):
        backends.register(backend or backends.BACKENDS["cpu"])


def test_contributing_names_files_that_exist():
    """With an operator that has a kernel on every backend in place of ``<op>``."""
    walks = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"\*\*`([^`]+)`\*\*", walks)
    assert len(named) > 12
    for path in named:
        found = path.replace("<op>", "convolution").replace("<backend>", "cpu")
        assert (ROOT / found).is_file(), path


FLOORS = {
    "geometry.py": set(),
    "backends": {"backends", "geometry"},
    "ops": {"ops", "backends", "geometry"},
}
"""Which parts of this package may be imported where."""


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_down(floor):
    """Types used only in annotations are exempt: `if TYPE_CHECKING`."""
    place = PACKAGE / floor
    for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
        for module in _imported(ast.parse(file.read_text()), file):
            assert module in FLOORS[floor], f"{file.relative_to(ROOT)} imports {module}"


def _imported(tree: ast.AST, file: Path) -> set[str]:
    """First parts of what `tree` imports from `swin_kernels`, relative imports resolved."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            package = file.relative_to(PACKAGE).parts[:-1]
            base = package[: len(package) - node.level + 1]
            parts = [*base, *(node.module or "").split(".")]
            first = next((part for part in parts if part), "")
            found |= {first} if first else {alias.name for alias in node.names}
        found |= _imported(node, file)
    return found
