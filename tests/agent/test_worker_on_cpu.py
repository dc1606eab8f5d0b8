"""A rollout that cannot be verified reaches the trainer as a failure, not as a smaller group."""

import asyncio
from types import SimpleNamespace

import pytest

from rredcot_verl.agent import worker as agent_loop
from rredcot_verl.sources.record import FAILED, KEY, SCORED, CreditRecord


def postprocess(monkeypatch, compute_score, validate: bool = False) -> tuple[SimpleNamespace, list]:
    """What verl's worker is handed for a rollout whose verifier is `compute_score`."""
    handed = []

    async def verls_own(self, output, validate, **kwargs):
        handed.append((output.reward_score, dict(output.extra_fields)))

    async def credit(self, output, kwargs):
        return CreditRecord(SCORED)

    monkeypatch.setattr(agent_loop._WorkerTQ, "_agent_loop_postprocess", verls_own)
    monkeypatch.setattr(agent_loop.RREDCoTAgentLoopWorker, "_compute_score", compute_score)
    monkeypatch.setattr(agent_loop.RREDCoTAgentLoopWorker, "_credit", credit)
    worker = object.__new__(agent_loop.RREDCoTAgentLoopWorker)
    output = SimpleNamespace(reward_score=None, extra_fields={})
    asyncio.run(worker._agent_loop_postprocess(output, validate))
    return output, handed


async def works(self, outputs, kwargs):
    outputs[-1].reward_score = 1.0
    outputs[-1].extra_fields["reward_extra_info"] = {"acc": 1.0}


async def fails(self, outputs, kwargs):
    raise RuntimeError("no sandbox here")


def test_a_verified_rollout_is_credited(monkeypatch):
    _, [(reward, fields)] = postprocess(monkeypatch, works)
    assert reward == 1.0 and fields["reward_extra_info"] == {"acc": 1.0}
    assert CreditRecord(**fields[KEY]).status == SCORED


def test_a_failing_verifier_is_carried_to_the_trainer(monkeypatch):
    # With a reward in place verl does not ask the verifier again, and stores the row.
    _, [(reward, fields)] = postprocess(monkeypatch, fails)
    record = CreditRecord(**fields[KEY])
    assert (reward, record.status) == (0.0, FAILED)
    assert record.error == "the verifier failed: RuntimeError: no sandbox here"


@pytest.mark.parametrize("compute_score", [works, fails])
def test_validation_is_verls_own(monkeypatch, compute_score):
    output, [(reward, fields)] = postprocess(monkeypatch, compute_score, validate=True)
    assert (reward, fields) == (None, {})
