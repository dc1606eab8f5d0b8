"""A training worker's share of the cores."""

import os

import pytest
import torch

from rredcot_verl.cpu.process_group import THREADS, take_threads


@pytest.fixture(autouse=True)
def worker(monkeypatch):
    """As one of two ranks, on a machine of five cores."""
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(5)))
    monkeypatch.delenv(THREADS, raising=False)
    monkeypatch.delenv("RAY_LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("ranks, chosen, threads", [("2", "", 2), ("1", "", 5), ("8", "", 1), ("2", "4", 4)])
def test_cores_are_shared_unless_a_number_is_chosen(monkeypatch, ranks, chosen, threads):
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.setenv(THREADS, chosen)
    take_threads()
    assert torch.get_num_threads() == threads


def test_ranks_of_other_nodes_take_none_of_this_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("RAY_LOCAL_WORLD_SIZE", "1")
    take_threads()
    assert torch.get_num_threads() == 5


@pytest.mark.parametrize("chosen", ["0", "-1", "all"])
def test_a_number_that_is_none_is_refused(monkeypatch, chosen):
    monkeypatch.setenv(THREADS, chosen)
    with pytest.raises(ValueError, match=f"{THREADS} must be a whole number from 1, got '{chosen}'"):
        take_threads()
