"""The agent loop side: responses are recorded where they are generated, while their prefix is in the server's cache."""

import functools
import itertools
import logging
from typing import Any

import ray
import torch
from verl.experimental.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from rredcot_verl.agent.reward_manager import RESPONSE_MASK
from rredcot_verl.agent.segmenting import ResponseRecorder
from rredcot_verl.agent.session import SESSION, Session, SessionClient
from rredcot_verl.answers.grammar import look_up
from rredcot_verl.live import GENERATED, MEASURED, VERIFIED, under_way
from rredcot_verl.passes.protocol import NOTHING
from rredcot_verl.probes.elicitation import Elicitation
from rredcot_verl.probes.vocabulary import Vocabulary, ends_of
from rredcot_verl.run.settings import max_sequence_length, parse_block, reward_penalty, run_source
from rredcot_verl.servers.probe_queue import ProbingTimeout
from rredcot_verl.sources.group import Group
from rredcot_verl.sources.record import KEY, Plan, Record, Status
from rredcot_verl.sources.response import AgentTools, Response

logger = logging.getLogger(__name__)

# Ray's decorator hides the class itself; there is no other way to derive from verl's worker.
_WorkerTQ: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class.__ray_actor_class__


class TellingAgentLoopWorker(_WorkerTQ):
    """verl's agent loop worker, which tells the reward manager `rredcot` what of a response the model wrote."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Ray sends an inherited constructor with a copy of its class, of which this one is no subclass.
        super().__init__(*args, **kwargs)

    async def _compute_score(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> None:
        # verl hands the manager a response's tokens and these fields, but no mask.
        fields = outputs[-1].extra_fields
        fields[RESPONSE_MASK] = list(outputs[-1].response_mask)
        try:
            await super()._compute_score(outputs, kwargs=kwargs)
        finally:
            del fields[RESPONSE_MASK]


class RREDCoTAgentLoopWorker(TellingAgentLoopWorker):
    """verl's agent loop worker; a training rollout is stored with its segments and what their values are made of."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The trainer has checked them, and names this worker only for runs that redistribute.
        settings = parse_block(self.config)
        model = self.model_config
        positions = getattr(model.hf_config, "max_position_embeddings", None)
        ends = ends_of(model.generation_config, model.hf_config)
        rollout = self.config.actor_rollout_ref.rollout
        self.llm_client = SessionClient(self.llm_client)
        tools = AgentTools(
            elicitation=Elicitation(Vocabulary(self.tokenizer, settings.segmentation.keywords, ends), settings),
            generate=self.llm_client.generate,
            max_length=max_sequence_length(self.config, settings.self_value.engine, positions),
            response_length=int(rollout.response_length),
            temperature=float(rollout.temperature),
            rollout_name=rollout.name,
        )
        source = run_source(self.config, settings)
        source.start(tools)
        self._recorder = ResponseRecorder(settings, source, tools)
        self._groups: dict[str, Group] = {}
        self._is_shaped = reward_penalty(self.config) > 0

    async def _run_prompt(
        self, prompt: dict[str, Any], sampling_params: dict[str, Any], trajectory: dict[str, Any], trace: bool = False
    ) -> None:
        if trajectory["validate"]:
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
            return
        uid = prompt["uid"]
        self._groups[uid] = Group(prompt.get("__rollout_n__", self.config.actor_rollout_ref.rollout.n))
        try:
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
        finally:
            del self._groups[uid]

    async def _run_agent_loop(self, sampling_params: dict[str, Any], trajectory: dict[str, Any], **kwargs: Any) -> Any:
        with under_way(GENERATED) as generated:
            if trajectory["validate"]:
                return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)
            token = SESSION.set(Session(sampling_params, generated=generated))
            try:
                return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)
            finally:
                SESSION.reset(token)
                # Whatever happened, the others of the group must not wait for this rollout.
                await self._groups[kwargs["uid"]].leave(kwargs["session_id"])

    async def _agent_loop_postprocess(
        self, output: AgentLoopOutput | list[AgentLoopOutput], validate: bool, **kwargs: Any
    ) -> None:
        outputs = output if isinstance(output, list) else [output]
        if not validate and outputs:
            if (session := SESSION.get()) is not None:
                session.generated()
            plan = await self._verify(outputs, kwargs) or await self._record(outputs, kwargs)
            outputs[-1].extra_fields[KEY] = plan.record.to_dict()
            # verl stores what the prompt's row holds beside each output: so these go straight to the training engine.
            for field in self._recorder.source.payload_fields:
                kwargs[field] = torch.tensor(plan.rows.get(field, NOTHING), dtype=torch.int32)
        await super()._agent_loop_postprocess(output, validate, **kwargs)

    async def _verify(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> Plan | None:
        """The rewards of a rollout; a plan where the verifier failed.

        Like `_record` it never raises: verl would drop the response and train on the rest of its group without a word.
        The record carries the failure to the trainer, which stops.
        """
        try:
            # verl's own call further down finds the reward and does not compute it again.
            with under_way(VERIFIED):
                await self._compute_score(outputs, kwargs=kwargs)
        except Exception as error:  # noqa: BLE001 - not swallowed: the trainer raises it
            logger.exception("rredcot: a response could not be verified")
            outputs[-1].reward_score = 0.0
            outputs[-1].extra_fields["reward_extra_info"] = {}
            return _failed(f"the verifier failed: {type(error).__name__}: {error}")
        return None

    async def _record(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> Plan:
        """Segments of a verified rollout, and what is measured of them. Never raises, see `_verify`."""
        try:
            response = self._response(outputs, kwargs)
            group = self._groups[kwargs["uid"]]
            await group.arrive(kwargs["session_id"], response.as_member())
            with under_way(MEASURED):
                return await self._recorder.record(response, group)
        except ProbingTimeout as error:
            return _failed(str(error))
        except Exception as error:  # noqa: BLE001 - not swallowed: the trainer raises it
            logger.exception("rredcot: the self-values of a response could not be computed")
            return _failed(f"{type(error).__name__}: {error}")

    def _shaping(self, output: AgentLoopOutput) -> float:
        """What verl's DAPO manager added to the score; it keeps the score itself beside the reward.

        Raises:
            ValueError: A penalty is configured, and the manager keeps no score.
        """
        if not self._is_shaped or output.reward_score is None:
            return 0.0
        known = output.extra_fields.get("reward_extra_info") or {}
        score = known.get("score", known.get("acc"))
        if score is None:
            raise ValueError(
                "reward.reward_kwargs.overlong_buffer_cfg.enable=True, but the reward manager reports neither `score` "
                f"nor `acc`, only {sorted(known)}: the penalty cannot be told from the score; use "
                "reward.reward_manager.name=dapo"
            )
        return float(output.reward_score) - float(score)

    def _response(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> Response:
        output = outputs[-1]
        # Another response can be verified as this one was: alone, and by the reward manager.
        verifiable = len(outputs) == 1 and "reward_extra_info" in output.extra_fields
        if output.multi_modal_data:
            raise ValueError(
                f"the response has {sorted(output.multi_modal_data)} in its prompt; RREDCoT supports text only"
            )
        session = SESSION.get()
        return Response(
            prompt_ids=list(output.prompt_ids),
            response_ids=list(output.response_ids),
            response_mask=list(output.response_mask),
            log_probs=output.response_logprobs,
            reward=output.reward_score,
            references=look_up(kwargs, self._recorder.settings.self_value.reference_key),
            # An agent loop that never called the server has no request; any id then routes by load.
            request_id=(session.request_id if session else None) or f"{kwargs['uid']}_{kwargs['session_id']}",
            answer=(
                self._recorder.elicitation.read(output.response_ids, output.prompt_ids, output.response_mask)
                if output.response_ids
                else None
            ),
            sampling_params=session.sampling_params if session else {},
            verify=functools.partial(self._verify_other, output, kwargs) if verifiable else None,
            shaping=self._shaping(output),
        )

    async def _verify_other(self, output: AgentLoopOutput, kwargs: dict[str, Any], response_ids: list[int]) -> float:
        """The score that another response to the same prompt would have got."""
        other = AgentLoopOutput(
            prompt_ids=output.prompt_ids,
            response_ids=response_ids,
            response_mask=_mask_of(output, response_ids),
            num_turns=output.num_turns,
            metrics=AgentLoopMetrics(),
        )
        await self._compute_score([other], kwargs=kwargs)
        assert other.reward_score is not None  # refused by the settings
        return other.reward_score - self._shaping(other)


def _mask_of(output: AgentLoopOutput, response_ids: list[int]) -> list[int]:
    """Which tokens the model wrote of a response that goes on in another way than an output: after what they share."""
    pairs = zip(response_ids, output.response_ids, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return list(output.response_mask[:shared]) + [1] * (len(response_ids) - shared)


def _failed(error: str) -> Plan:
    return Plan(Record(Status.FAILED, error=error))


class TellingAgentLoopManager(AgentLoopManagerTQ):
    """verl's agent loop manager with our workers, for runs that do not redistribute."""

    _worker_class: type = TellingAgentLoopWorker

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The parent's constructor names verl's worker.
        self.agent_loop_workers_class = ray.remote(self._worker_class)


class RREDCoTAgentLoopManager(TellingAgentLoopManager):
    """verl's agent loop manager with our workers."""

    _worker_class = RREDCoTAgentLoopWorker
