"""verl's agent loop worker with ours around it: what is stored beside a rollout, and what a failure becomes."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from verl.experimental.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics

from rredcot_verl.agent import worker as worker_module
from rredcot_verl.agent.reward_manager import RESPONSE_MASK
from rredcot_verl.agent.worker import RREDCoTAgentLoopWorker
from rredcot_verl.passes.probe_codec import decode
from rredcot_verl.passes.protocol import FIELDS, NOTHING
from rredcot_verl.servers.probe_queue import ProbingTimeout
from rredcot_verl.sources.record import KEY, Record, Status
from tests import PATIENCE_S
from tests.passes.table_model import FakeServer, TableModel
from tests.probes.tiny_tokenizers import byte_level, encode
from tests.sources.world import PROMPT, TEXT

PROBES, POSITIONS = FIELDS["probes"].payload, FIELDS["hidden"].payload
BOTH = {"calibration": "logistic"}


async def works(self, outputs, kwargs):
    assert outputs[-1].extra_fields[RESPONSE_MASK] == outputs[-1].response_mask
    for output in outputs:
        output.reward_score = float(output.response_ids == encode(byte_level(), TEXT))
        output.extra_fields["reward_extra_info"] = {"acc": 1.0}


async def fails(self, outputs, kwargs):
    raise RuntimeError("no sandbox here")


@pytest.fixture
def stored(monkeypatch):
    """What verl's own worker is handed for each rollout: its outputs, and what is stored beside each of them."""
    handed: list[tuple[list[AgentLoopOutput], dict]] = []

    async def verls_own(self, output, validate, **kwargs):
        handed.append((output if isinstance(output, list) else [output], kwargs))

    async def run_prompt(self, prompt, sampling_params, trajectory, trace=False):
        sessions = [
            self._run_agent_loop(sampling_params, trajectory, uid=prompt["uid"], session_id=number, texts=texts)
            for number, texts in enumerate(prompt["texts"])
        ]
        await asyncio.gather(*sessions)

    async def run_agent_loop(self, sampling_params, trajectory, texts, **kwargs):
        row = {"reward_model": {"ground_truth": "15"}, "global_steps": 1}
        outputs = [make_output(text) for text in texts]
        await self._agent_loop_postprocess(outputs, trajectory["validate"], **kwargs, **row)

    monkeypatch.setattr(worker_module._WorkerTQ, "_agent_loop_postprocess", verls_own)
    monkeypatch.setattr(worker_module._WorkerTQ, "_run_prompt", run_prompt)
    monkeypatch.setattr(worker_module._WorkerTQ, "_run_agent_loop", run_agent_loop)
    monkeypatch.setattr(worker_module._WorkerTQ, "_compute_score", works)
    return handed


def make_output(text: str) -> AgentLoopOutput:
    ids = encode(byte_level(), text)
    return AgentLoopOutput(
        prompt_ids=PROMPT,
        response_ids=ids,
        response_mask=[1] * len(ids),
        response_logprobs=[-0.5] * len(ids),
        num_turns=2,
        metrics=AgentLoopMetrics(),
    )


def make_worker(monkeypatch, estimator="rredcot", server=None, **block) -> RREDCoTAgentLoopWorker:
    """A worker whose constructor finds what verl's has made."""
    rollout = {"name": "rredcot_cpu", "temperature": 1.0, "prompt_length": 64, "response_length": 128, "n": 2}
    settings = {"segmentation": {"min_tokens": 2}} | block
    config = OmegaConf.create(
        {
            "algorithm": {"adv_estimator": estimator, "rredcot": settings},
            "actor_rollout_ref": {"rollout": rollout | {"max_model_len": None}},
        }
    )

    def verls_own(self):
        self.config, self.tokenizer = config, byte_level()
        self.model_config = SimpleNamespace(
            hf_config=SimpleNamespace(max_position_embeddings=4096), generation_config=None
        )
        self.llm_client = server or FakeServer(TableModel(len(byte_level())))

    monkeypatch.setattr(worker_module._WorkerTQ, "__init__", verls_own)
    return RREDCoTAgentLoopWorker()


def run(worker, texts=((TEXT,), ("so 3 but \\boxed{16}.",)), validate=False) -> None:
    """One prompt's rollouts: for each the texts of its outputs."""
    prompt, trajectory = {"uid": "a", "texts": texts}, {"validate": validate}
    asyncio.run(asyncio.wait_for(worker._run_prompt(prompt, {"temperature": 1.0}, trajectory), PATIENCE_S))


def records(stored) -> list[Record]:
    """By session, whichever was done first."""
    stored.sort(key=lambda each: each[1]["session_id"])
    return [Record.from_dict(outputs[-1].extra_fields[KEY]) for outputs, _ in stored]


async def penalises(self, outputs, kwargs):
    """As verl's DAPO manager: right answers, all of them too long."""
    for output in outputs:
        output.reward_score, output.extra_fields["reward_extra_info"] = 0.25, {"score": 1.0, "acc": True}


async def keeps_no_score(self, outputs, kwargs):
    for output in outputs:
        output.reward_score, output.extra_fields["reward_extra_info"] = 0.25, {"judge": 1.0}


def test_a_penalty_is_told_from_the_score(monkeypatch, stored):
    monkeypatch.setattr(worker_module, "reward_penalty", lambda config: 1.0)
    monkeypatch.setattr(worker_module._WorkerTQ, "_compute_score", penalises)
    worker = make_worker(monkeypatch, self_value=ACTOR)
    run(worker)
    assert [record.shaping for record in records(stored)] == [-0.75, -0.75]
    # What continuations are worth, and the group's answers, is their score.
    output = stored[0][0][-1]
    assert asyncio.run(worker._verify_other(output, {}, output.response_ids)) == 1.0
    monkeypatch.setattr(worker_module, "reward_penalty", lambda config: 0.0)
    stored.clear()
    run(make_worker(monkeypatch, self_value=ACTOR))
    assert [record.shaping for record in records(stored)] == [0.0, 0.0]


def test_a_penalty_that_cannot_be_told_from_the_score_fails(monkeypatch, stored):
    monkeypatch.setattr(worker_module, "reward_penalty", lambda config: 1.0)
    monkeypatch.setattr(worker_module._WorkerTQ, "_compute_score", keeps_no_score)
    run(make_worker(monkeypatch, self_value=ACTOR))
    for record in records(stored):
        assert record.status is Status.FAILED and "neither `score` nor `acc`, only ['judge']" in record.error


ACTOR = {"engine": "actor"}


def test_a_rollout_is_stored_with_its_record_and_its_payload(monkeypatch, stored):
    run(make_worker(monkeypatch, self_value=ACTOR))
    for record, (outputs, fields) in zip(records(stored), stored, strict=True):
        assert record.status is Status.SCORED and outputs[-1].extra_fields["reward_extra_info"] == {"acc": 1.0}
        assert fields[PROBES].dtype == torch.int32
        assert len(decode(fields[PROBES].tolist())) == record.num_probes > 1
        assert POSITIONS not in fields


@pytest.mark.parametrize(
    "estimator, block, fields",
    [
        ("rredcot", {"self_value": ACTOR | BOTH, "readout": {"use_hidden": True}}, {PROBES, POSITIONS}),
        ("rredcot", {"self_value": ACTOR | {"form": "hidden"}}, {POSITIONS}),
        ("vps", {"self_value": {"engine": "rollout"}}, {PROBES}),
        ("attention_attribution", {}, {FIELDS["attention"].payload}),
        ("gradient_attribution", {}, {FIELDS["gradient"].payload}),
        ("leave_one_out", {}, {"rredcot_left_out_plans"}),
        ("vineppo", {}, set()),
    ],
)
@pytest.mark.parametrize("texts", [((TEXT,), ("",)), (("",), ("so",)), ((TEXT,), (TEXT,))])
def test_payload_fields_are_there_for_every_training_rollout(monkeypatch, stored, estimator, block, fields, texts):
    """Also where the record has none: verl stores the rows of a step in one table."""
    run(make_worker(monkeypatch, estimator, **block), texts)
    assert len(stored) == 2
    for record, (_, row) in zip(records(stored), stored, strict=True):
        assert {name for name in row if name.startswith("rredcot_")} == fields
        for name in fields:
            held = row[name].tolist()
            assert row[name].dtype == torch.int32 and held
            if record.status is not Status.SCORED and not record.segment_boundaries:
                assert held == list(NOTHING)


def test_the_last_output_of_a_session_has_the_record(monkeypatch, stored):
    run(make_worker(monkeypatch, self_value=ACTOR), ((TEXT, TEXT), ("so 3",)))
    assert len(records(stored)) == 2
    first, last = stored[0][0]
    assert KEY not in first.extra_fields and KEY in last.extra_fields


@pytest.mark.parametrize("compute_score", [works, fails])
def test_validation_is_verls_own(monkeypatch, stored, compute_score):
    monkeypatch.setattr(worker_module._WorkerTQ, "_compute_score", compute_score)
    run(make_worker(monkeypatch, self_value=ACTOR), validate=True)
    for outputs, fields in stored:
        assert outputs[-1].reward_score is None and outputs[-1].extra_fields == {}
        assert not any(name.startswith("rredcot_") for name in fields)


def test_a_failing_verifier_is_carried_to_the_trainer(monkeypatch, stored):
    monkeypatch.setattr(worker_module._WorkerTQ, "_compute_score", fails)
    run(make_worker(monkeypatch, self_value=ACTOR))
    for record, (outputs, fields) in zip(records(stored), stored, strict=True):
        # With a reward in place verl does not ask the verifier again, and stores the row.
        assert (outputs[-1].reward_score, record.status) == (0.0, Status.FAILED)
        assert record.error == "the verifier failed: RuntimeError: no sandbox here"
        assert fields[PROBES].tolist() == list(NOTHING)


@pytest.mark.parametrize(
    "error, told",
    [
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
        (ProbingTimeout("no answer in time"), "no answer in time"),
    ],
)
def test_a_failing_server_is_too(monkeypatch, stored, error, told):
    class Failing:
        async def generate(self, *args, **kwargs):
            raise error

    run(make_worker(monkeypatch, server=Failing(), self_value={"engine": "rollout"}))
    assert [(record.status, record.error) for record in records(stored)] == [(Status.FAILED, told)] * 2
    assert all(outputs[-1].reward_score is not None for outputs, _ in stored)


def test_a_response_with_pictures_is_told(monkeypatch, stored):
    picture = {"multi_modal_data": {"images": [1]}}
    monkeypatch.setattr(f"{__name__}.make_output", lambda text, make=make_output: make(text).model_copy(update=picture))
    run(make_worker(monkeypatch, self_value=ACTOR))
    assert all("['images'] in its prompt; RREDCoT supports text only" in record.error for record in records(stored))


def test_vineppo_verifies_continuations_as_the_response_was(monkeypatch, stored):
    class Server:
        async def generate(self, request_id, *, prompt_ids, sampling_params, **kwargs):
            rest = encode(byte_level(), TEXT)[len(prompt_ids) - len(PROMPT) :]
            return SimpleNamespace(token_ids=rest, stop_reason="completed", extra_fields={})

    run(make_worker(monkeypatch, "vineppo", Server(), monte_carlo={"num_rollouts": 2}))
    first, _ = records(stored)
    assert first.error is None and first.payload["values"] == [1.0] * (len(first.segment_boundaries) - 1)


@pytest.mark.parametrize("compute_score", [works, fails])
def test_the_mask_goes_to_the_reward_manager_alone(monkeypatch, stored, compute_score):
    monkeypatch.setattr(worker_module._WorkerTQ, "_compute_score", compute_score)
    run(make_worker(monkeypatch, self_value=ACTOR))
    assert len(stored) == 2
    assert all(RESPONSE_MASK not in output.extra_fields for outputs, _ in stored for output in outputs)


def test_another_response_has_the_tools_words_where_it_has_them_in_common(monkeypatch, stored):
    masks = []

    async def judge(self, outputs, kwargs):
        masks.append(outputs[-1].extra_fields[RESPONSE_MASK])
        await works(self, outputs, kwargs)

    monkeypatch.setattr(worker_module._WorkerTQ, "_compute_score", judge)
    worker = make_worker(monkeypatch, self_value=ACTOR)
    output = make_output(TEXT)
    output.response_mask[1:3] = [0, 0]
    ids = output.response_ids
    for other, mask in [
        ([*ids[:4], 1, 2], [1, 0, 0, 1, 1, 1]),
        ([*ids[:2], 1, *ids[3:]], [1, 0, *[1] * (len(ids) - 2)]),
        (ids[:2], [1, 0]),
        ([1, *ids[1:3]], [1, 1, 1]),
    ]:
        asyncio.run(worker._verify_other(output, {}, other))
        assert masks.pop() == mask


def test_a_tools_box_is_no_answer_of_the_response(monkeypatch, stored):
    def with_tool(text, make=make_output):
        output = make(text)
        box = encode(byte_level(), "so \\boxed{16}.")
        output.response_ids += box
        output.response_mask += [0] * len(box)
        output.response_logprobs += [0.0] * len(box)
        return output

    monkeypatch.setattr(f"{__name__}.make_output", with_tool)
    answers = []
    worker = make_worker(monkeypatch, self_value=ACTOR)
    monkeypatch.setattr(worker._recorder.elicitation, "remember", answers.append)
    run(worker, ((TEXT,), ("so 3",)))
    assert {answer and answer.text for answer in answers} == {"15", None}
