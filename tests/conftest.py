"""Fixtures for all tests."""

import os
import shutil
import tempfile

import pytest

# Ray's workers have the lowest priority by default (15): beside a test that computes, a run would hardly go on.
os.environ.setdefault("RAY_worker_niceness", "0")


def pytest_collection_modifyitems(items):
    """Tests that train come first: at the end one process would wait for the other's."""
    items.sort(key=lambda item: item.get_closest_marker("run") is None)


def _ray_folder():
    """A folder for Ray: its sockets have paths of at most 107 characters, too few for pytest's own folders."""
    folder = tempfile.mkdtemp(prefix="rc", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


ray_folder = pytest.fixture(_ray_folder)
ray_folder_of_module = pytest.fixture(_ray_folder, scope="module")
