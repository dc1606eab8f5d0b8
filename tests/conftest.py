"""Fixtures for all tests."""

import shutil
import tempfile

import pytest


def _ray_folder():
    """A folder for Ray: its sockets have paths of at most 107 characters, too few for pytest's own folders."""
    folder = tempfile.mkdtemp(prefix="rc", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


ray_folder = pytest.fixture(_ray_folder)
ray_folder_of_module = pytest.fixture(_ray_folder, scope="module")
