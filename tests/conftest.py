"""Fixtures for all tests."""

import shutil
import tempfile

import pytest


@pytest.fixture
def ray_folder():
    """A folder for Ray: its sockets have paths of at most 107 characters, too few for pytest's own folders."""
    folder = tempfile.mkdtemp(prefix="rc", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
