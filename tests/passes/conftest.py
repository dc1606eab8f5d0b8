"""Fixtures for the tests of scoring."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Many small forward passes: more threads than cores make them slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
