"""How the test suite itself runs."""

import os
from pathlib import Path

import pytest
import slow


TESTS = sorted(Path(__file__).parent.rglob("test_*.py"))


@pytest.mark.xdist_group("package")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests")
def test_tests_that_share_what_takes_long_run_in_one_worker(request):
    """xdist reads a group from the end of a test's name. Without it, each worker would start servers of its own."""
    assert request.node.nodeid.endswith("@package")


def test_names_of_files_differ():
    """pytest imports a test by its file's name, and none of a second file of that name."""
    stems = [path.stem for path in TESTS]
    assert len(set(stems)) == len(stems)


def test_what_is_slow_exists():
    """A file or test that was renamed would slow down `make test-fast`."""
    assert slow.FILES <= {path.stem for path in TESTS}
    source = "\n".join(path.read_text() for path in TESTS)
    assert all(f"def {name}(" in source for name in slow.TESTS)
