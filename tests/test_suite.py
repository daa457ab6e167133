"""What a run of the tests collects, in which order, and which skips fail it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xdist.plugin
import xdist.workermanage

from . import collection, skips


@pytest.fixture
def ci(monkeypatch):
    monkeypatch.setenv("CI", "true")


@pytest.fixture
def suite(pytester, monkeypatch):
    """A separate suite that runs with the plugins of this one; `expect` writes its list of expected skips."""
    pytester.makepyprojecttoml('[tool.pytest.ini_options]\nmarkers = ["gpu: needs a CUDA device"]')
    monkeypatch.setattr(skips, "EXPECTED", pytester.path / "expected_skips.txt")
    monkeypatch.setattr(collection, "DURATIONS", pytester.path / "durations.json")
    monkeypatch.setattr(skips, "unbuilt", lambda: None)  # it imports modules, which `runpytest_inprocess` would undo
    # The processes of xdist import the plugins, on the path that it kept when the command pytest started.
    path = [str(Path(__file__).parents[1]), *xdist.plugin._sys_path]
    monkeypatch.setattr(xdist.workermanage, "_sys_path", path)
    skips.EXPECTED.write_text("")
    return pytester


def run(suite, *options: str):
    plugins = ("-p", "tests.collection", "-p", "tests.skips", "-p", "no:cacheprovider")
    return suite.runpytest_inprocess(*plugins, *options)


# ------------------------------------------------------------------------------------------------------------- skips

SKIPPING = """
    import pytest

    @pytest.mark.parametrize("tool", ["one", "other"])
    def test_tool(tool):
        pytest.skip(f"{tool} is missing")

    @pytest.mark.xfail(strict=True)
    def test_known():
        assert False

    def test_fine():
        pass
"""


def test_an_unexpected_skip_fails_ci(suite, ci):
    suite.makepyfile(test_it=SKIPPING)
    skips.EXPECTED.write_text("# a comment\n\ntest_it.py::test_tool[one] | one is mis\n")
    done = run(suite)
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(
        ["*1 skips that expected_skips.txt does not expect*", "test_it.py::test_tool?other? | other is missing"]
    )
    done.stdout.no_fnmatch_line("*| one is missing")


@pytest.mark.parametrize(
    "expected",
    [
        "test_it.py::test_tool[one] | one is\ntest_it.py::test_tool[other] | other is missing",
        "test_it.py::test_tool | one is missing\ntest_it.py::test_tool | other is missing",
    ],
    ids=["by parameter", "by test"],
)
def test_expected_skips_do_not(suite, ci, expected):
    suite.makepyfile(test_it=SKIPPING)
    skips.EXPECTED.write_text(expected)
    assert run(suite).ret == pytest.ExitCode.OK


def test_another_reason_is_not_expected(suite, ci):
    suite.makepyfile(test_it=SKIPPING)
    skips.EXPECTED.write_text("test_it.py::test_tool | one is missing\n")
    assert run(suite).ret == pytest.ExitCode.TESTS_FAILED


def test_further_files_of_expected_skips(suite, ci):
    suite.makepyfile(test_it=SKIPPING)
    suite.path.joinpath("more.txt").write_text("test_it.py::test_tool | o\n")
    assert run(suite, "--expect-skips", "more.txt").ret == pytest.ExitCode.OK


SKIPPED_FILE = "import pytest\npytest.importorskip('no_such_package', reason='it is missing')"


def test_a_file_that_is_skipped_fails_ci(suite, ci):
    suite.makepyfile(test_it=SKIPPED_FILE, test_fine="def test_fine(): pass")
    done = run(suite)
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["test_it.py | it is missing"])


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_elsewhere_any_skip_will_do(suite, monkeypatch, value):
    monkeypatch.setenv("CI", value)
    suite.makepyfile(test_it=SKIPPING)
    assert run(suite).ret == pytest.ExitCode.OK


def test_ci_needs_the_kernels(suite, ci, monkeypatch):
    monkeypatch.setattr(skips, "unbuilt", lambda: "the C++ library was not built")
    suite.makepyfile(test_it="def test_fine(): pass")
    done = run(suite)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*CI needs the C++ kernels: the C++ library was not built*"])


@pytest.mark.parametrize("line", ["test_it.py::test_tool", "test_it.py |", "| is missing"])
def test_a_line_without_a_reason_is_refused(tmp_path, line):
    file = tmp_path / "expected_skips.txt"
    file.write_text(f"# a comment\n{line}\n")
    with pytest.raises(ValueError, match=r"expected_skips\.txt, line 2: accepted is 'test | reason'"):
        skips.read(file)


@pytest.mark.parametrize("file", sorted(skips.EXPECTED.parent.glob("expected_skips*.txt")), ids=lambda file: file.name)
def test_expected_skips_are_of_tests_that_exist(file):
    """Else a list keeps what was renamed, and would let it be skipped if it came back."""
    for test, _ in skips.read(file):
        path, _, function = test.partition("[")[0].partition("::")
        text = (skips.EXPECTED.parents[1] / path).read_text(encoding="utf-8")
        assert not function or f"def {function}(" in text, test


# --------------------------------------------------------------------------------------------------------- collection

ON_GPU = "import pytest\npytestmark = pytest.mark.gpu\ndef test_gpu(): pass"


@pytest.mark.parametrize("device", [False, True], ids=["no device", "a device"])
def test_gpu_tests_are_collected_where_a_gpu_is(suite, monkeypatch, device):
    monkeypatch.setattr(collection.torch.cuda, "is_available", lambda: device)
    suite.makepyfile(test_gpu=ON_GPU, test_cpu="def test_cpu(): pass")
    done = run(suite)
    done.assert_outcomes(passed=1 + device, deselected=1 - device)
    if not device:
        done.stdout.fnmatch_lines(["GPU tests: left out, there is no CUDA device"])


def test_gpu_tests_that_are_asked_for_are_collected(suite, monkeypatch):
    monkeypatch.setattr(collection.torch.cuda, "is_available", lambda: False)
    suite.makepyfile(test_gpu=ON_GPU, test_cpu="def test_cpu(): pass")
    run(suite, "-m", "gpu").assert_outcomes(passed=1, deselected=1)


def test_files_that_take_longest_come_first(suite):
    """New files before all others; within a file the order stays."""
    names = ("brief", "fresh", "long", "medium")
    suite.makepyfile(**{f"test_{name}": "def test_b(): pass\ndef test_a(): pass" for name in names})
    collection.DURATIONS.write_text(json.dumps({"test_brief.py": 0, "test_long.py": 90, "test_medium.py": 8}))
    collected = run(suite, "--collect-only", "-q").outlines[:8]
    assert collected == [
        f"test_{name}.py::test_{test}" for name in ("fresh", "long", "medium", "brief") for test in "ba"
    ]


def test_durations_are_stored(suite):
    suite.makepyfile(test_slow="import time\ndef test_a(): time.sleep(0.6)", test_quick="def test_a(): pass")
    assert run(suite, "--store-durations").ret == 0
    assert json.loads(collection.DURATIONS.read_text()) == {"test_quick.py": 0, "test_slow.py": 1}


def test_processes_that_share_the_tests_report_all_this(suite, ci):
    """Under pytest-xdist skips and durations are counted where the reports come together."""
    suite.makepyfile(test_it=SKIPPING, test_file=SKIPPED_FILE)
    done = run(suite, "--store-durations", "-n", "1")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*3 skips that expected_skips.txt does not expect*"])
    assert json.loads(collection.DURATIONS.read_text()) == {"test_it.py": 0}
