"""The agent loop side: probes are scored where responses are generated, while their prefix is in the server's cache."""

import functools
import logging
from typing import Any

import ray
from verl.experimental.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from rredcot_verl.agent.scorer import ResponseScorer
from rredcot_verl.agent.session import SESSION, Session, SessionClient
from rredcot_verl.answers.grammar import look_up
from rredcot_verl.run.settings import max_sequence_length, parse_block
from rredcot_verl.servers.client import ProbingTimeout
from rredcot_verl.sources.group import Group
from rredcot_verl.sources.record import FAILED, KEY, CreditRecord
from rredcot_verl.sources.response import Response, as_member

logger = logging.getLogger(__name__)

# Ray's decorator hides the class itself; there is no other way to derive from verl's worker.
_WorkerTQ: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class.__ray_actor_class__


class RREDCoTAgentLoopWorker(_WorkerTQ):
    """verl's agent loop worker; every training rollout also gets its segments and self-values before it is stored."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The trainer has checked them, and names this worker only for runs that redistribute.
        settings = parse_block(self.config)
        positions = getattr(self.model_config.hf_config, "max_position_embeddings", None)
        max_length = max_sequence_length(self.config, settings.self_value.engine, positions)
        self.llm_client = SessionClient(self.llm_client)
        self._scorer = ResponseScorer(self.config, settings, self.tokenizer, self.llm_client.generate, max_length)
        self._groups: dict[str, Group] = {}

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
        if trajectory["validate"]:
            return await super()._run_agent_loop(sampling_params, trajectory, **kwargs)
        token = SESSION.set(Session(sampling_params))
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
            failure = await self._verify(outputs, kwargs)
            record = failure or await self._credit(outputs, kwargs)
            outputs[-1].extra_fields[KEY] = record.to_dict()
        await super()._agent_loop_postprocess(output, validate, **kwargs)

    async def _verify(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> CreditRecord | None:
        """The rewards of a rollout; a record where the verifier failed.

        Like `_credit` it never raises: verl would drop the response and train on the rest of its group without a word.
        The record carries the failure to the trainer, which stops.
        """
        try:
            # verl's own call further down finds the reward and does not compute it again.
            await self._compute_score(outputs, kwargs=kwargs)
        except Exception as error:  # noqa: BLE001 - not swallowed: the trainer raises it
            logger.exception("rredcot: a response could not be verified")
            outputs[-1].reward_score = 0.0
            outputs[-1].extra_fields["reward_extra_info"] = {}
            return CreditRecord(FAILED, error=f"the verifier failed: {type(error).__name__}: {error}")
        return None

    async def _credit(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> CreditRecord:
        """Segments and self-values of a verified rollout. Never raises, see `_verify`."""
        try:
            response = self._response(outputs, kwargs)
            group = self._groups[kwargs["uid"]]
            await group.arrive(kwargs["session_id"], as_member(response))
            return await self._scorer.credit(response, group)
        except ProbingTimeout as error:
            return CreditRecord(FAILED, error=str(error))
        except Exception as error:  # noqa: BLE001 - not swallowed: the trainer raises it
            logger.exception("rredcot: the self-values of a response could not be computed")
            return CreditRecord(FAILED, error=f"{type(error).__name__}: {error}")

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
            references=look_up(kwargs, self._scorer.settings.self_value.reference_key),
            # An agent loop that never called the server has no request; any id then routes by load.
            request_id=(session.request_id if session else None) or f"{kwargs['uid']}_{kwargs['session_id']}",
            answer=(
                self._scorer.elicitation.read(output.response_ids, output.prompt_ids) if output.response_ids else None
            ),
            sampling_params=session.sampling_params if session else {},
            verify=functools.partial(self._verify_other, output, kwargs) if verifiable else None,
        )

    async def _verify_other(self, output: AgentLoopOutput, kwargs: dict[str, Any], response_ids: list[int]) -> float:
        """The reward that another response to the same prompt would have got."""
        other = AgentLoopOutput(
            prompt_ids=output.prompt_ids,
            response_ids=response_ids,
            response_mask=[1] * len(response_ids),
            num_turns=output.num_turns,
            metrics=AgentLoopMetrics(),
        )
        await self._compute_score([other], kwargs=kwargs)
        assert other.reward_score is not None  # refused by the settings
        return other.reward_score


class RREDCoTAgentLoopManager(AgentLoopManagerTQ):
    """verl's agent loop manager with our workers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The parent's constructor names verl's worker.
        self.agent_loop_workers_class = ray.remote(RREDCoTAgentLoopWorker)
