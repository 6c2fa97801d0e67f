"""How the suite itself is run."""

import os

import pytest


@pytest.mark.xdist_group("package")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests")
def test_tests_that_share_what_takes_long_run_in_one_worker(request):
    """xdist reads a group from the end of a test's name. Without it, each worker would start servers of its own."""
    assert request.node.nodeid.endswith("@package")
