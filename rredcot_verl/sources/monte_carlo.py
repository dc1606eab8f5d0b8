"""The source behind `algorithm.adv_estimator=vineppo`: Monte Carlo values, by rolling out again from every boundary.

VinePPO (Kazemnejad et al., arXiv 2410.01679): v_k is the mean verified reward of independent continuations of state
s_k, sampled from the policy (9 in the paper's main setting); an unbiased estimate of E[R | s_k]. The RREDCoT paper
compares with the same idea under the name MC-GRPO. VinePPO's advantage is one step of temporal difference,
v_k - v_{k-1} for all tokens of a reasoning step, and not divided by a deviation:

    algorithm.adv_estimator=vineppo +algorithm.rredcot.credit.form=td algorithm.lam=0
    algorithm.norm_adv_by_std_in_grpo=False +algorithm.rredcot.segmentation.method=newline

Ours is everything around the estimate, so that sources differ in the values alone: its credit is `reweight` unless set,
the default cuts `keyword_entropy`, v_K is pinned to R, `td` takes the group's mean outcome for the value of the
prompt's state, groups that are all right or all wrong are not sampled but for `critic`, the prompt's state is sampled
once for all rollouts of the prompt, and an equal text is verified once for a prompt.

Cost: about num_rollouts * num_segments / 2 times the tokens of the response, generated, and up to num_rollouts *
num_segments more texts to verify.

Under which weights: those of the rollout server when a response is finished, the ones R itself comes from (in the
asynchronous modes, possibly a newer version that arrived meanwhile). In `sync` mode they are the policy's. So v_k and R
are outcomes of one policy in every mode, old as the response is; `algorithm.rollout_correction` corrects for that.
"""

import logging
from collections.abc import Sequence

from omegaconf import DictConfig

from rredcot_verl.sources.base import Source
from rredcot_verl.sources.engines import EngineChoice
from rredcot_verl.sources.group import Group
from rredcot_verl.sources.queue import Rows
from rredcot_verl.sources.record import Plan, Record, Status
from rredcot_verl.sources.response import AgentTools, Response
from rredcot_verl.sources.sampled_values import Job, StateSampler

logger = logging.getLogger(__name__)

ESTIMATOR = "algorithm.adv_estimator=vineppo"


class MonteCarlo(Source):
    """v_k is the mean reward of continuations sampled from boundary k; see above.

    A record's payload: `values` and their `standard_errors` in units of reward, `num_cut_short` continuations that
    reached their limit, `num_weight_versions` of the weights that wrote them.
    """

    estimates_reward = True

    def reads(self) -> frozenset[str]:
        """See `Source`."""
        return super().reads() | {"monte_carlo"}

    def check(self, config: DictConfig) -> str | None:
        """See `Source`."""
        reward_model = config.reward.reward_model
        if reward_model.enable and not reward_model.enable_resource_pool:
            return (
                f"{ESTIMATOR} needs the rewards of its continuations while they are rolled out, but "
                "reward.reward_model.enable_resource_pool=False computes rewards later; use a resource pool"
            )
        return super().check(config) or self._why_not_sampled(config.actor_rollout_ref.rollout)

    def _why_not_sampled(self, rollout: DictConfig) -> str | None:
        if rollout.get("full_determinism", False):
            return (
                f"{ESTIMATOR} with actor_rollout_ref.rollout.full_determinism=True: verl gives every request the same "
                "seed, so all continuations of a state would be one; set it to False"
            )
        loop, multi_turn = rollout.agent.get("default_agent_loop"), rollout.multi_turn.get("enable", False)
        if multi_turn or loop == "tool_agent":
            return (
                f"{ESTIMATOR} with actor_rollout_ref.rollout.multi_turn.enable={multi_turn} and "
                f"agent.default_agent_loop={loop}: a response is continued by generating, without tools or further "
                "turns; use algorithm.adv_estimator=rredcot, whose probes need neither"
            )
        return None

    def choose_engine(self, config: DictConfig) -> EngineChoice:
        """See `Source`."""
        choice = EngineChoice("rollout", False, "continuations are generated", "continuations")
        logger.warning("rredcot: %s: %s, by %s; %s", self.name, choice.what, choice.engine, choice.reason)
        return choice

    def describe(self) -> str:
        """See `Source`."""
        return f"Monte Carlo, {self.settings.monte_carlo.num_rollouts} continuations from every boundary: dear"

    def most_generated_tokens(self, max_response_length: int) -> int:
        """See `Source`: as if all boundaries were at the start of a response of full length."""
        block, num_boundaries = self.settings.monte_carlo, self.settings.segmentation.num_segments
        longest = min(block.max_tokens or max_response_length, max_response_length)
        return block.num_rollouts * num_boundaries * longest

    def start(self, tools: AgentTools) -> None:
        """See `Source`."""
        super().start(tools)
        self._sampler = StateSampler(self.settings.monte_carlo, tools.generate, tools.response_length, tools.max_length)

    async def plan(self, response: Response, group: Group, boundaries: list[int]) -> Plan:
        """See `Source`.

        Raises:
            ValueError: The response cannot be continued by generating, or a reward is no number.
            Exception: Whatever client and verifier raise.
        """
        if response.verify is None or response.reward is None:
            raise ValueError(
                f"{ESTIMATOR} verifies continuations with verl's reward manager, while responses are rolled out; the "
                "reward of this response comes later, or from its agent loop"
            )
        check_single_turn(response.response_mask)
        job = Job(
            prompt_ids=response.prompt_ids,
            response_ids=response.response_ids,
            reward=response.reward - response.shaping,
            request_id=response.request_id,
            sampling_params=response.sampling_params,
            group=group,
            verify=response.verify,
        )
        estimate = await self._sampler.values(job, boundaries)
        record = Record(
            Status.SCORED,
            segment_boundaries=boundaries,
            payload={
                "values": estimate.values,
                "standard_errors": estimate.standard_errors,
                "num_cut_short": sum(state.num_cut_short for state in estimate.paid),
                "num_weight_versions": len(estimate.weight_versions),
            },
            num_probes=estimate.num_rollouts,
            num_probe_tokens=estimate.num_tokens,
            num_recomputed_tokens=sum(state.num_recomputed_tokens for state in estimate.paid),
        )
        return Plan(record)

    def values(self, rows: Rows) -> list[list[float]]:
        """See `Source`."""
        scored = set(rows.scored)
        return [
            list(record.payload["values"]) if record is not None and row in scored else []
            for row, record in enumerate(rows.records)
        ]

    def metrics(self, records: Sequence[Record]) -> dict[str, float]:
        """What the estimates of a step are worth; nothing where no response was sampled.

        `monte_carlo_standard_error/mean`: standard error of a value, mean over all sampled states, in units of reward;
        `monte_carlo_cut_short/mean`: share of continuations that reached their limit and may not be finished;
        `monte_carlo_weight_versions/max`: most versions of the weights behind the values of one response.
        """
        sampled = [record for record in records if record.payload]
        errors = [error for record in sampled for error in record.payload["standard_errors"]]
        if not errors:
            return {}
        num_rollouts = sum(record.num_probes for record in sampled)
        num_cut_short = sum(record.payload["num_cut_short"] for record in sampled)
        versions = [record.payload["num_weight_versions"] for record in sampled]
        return {
            "rredcot/monte_carlo_standard_error/mean": sum(errors) / len(errors),
            "rredcot/monte_carlo_cut_short/mean": num_cut_short / max(1, num_rollouts),
            "rredcot/monte_carlo_weight_versions/max": float(max(versions)),
        }


def check_single_turn(response_mask: Sequence[int]) -> None:
    """Refuse a response with observations in it: its environment would have to go on too, not the policy alone.

    Raises:
        ValueError: A token that the policy did not write stands before one that it wrote.
    """
    num_written = sum(map(bool, response_mask))
    if not all(response_mask[:num_written]):
        raise ValueError(
            f"{ESTIMATOR} continues a response by generating, and this one has observations between its own tokens "
            "(tools, several turns), which only its environment could give; use algorithm.adv_estimator=rredcot, whose "
            "probes need no environment"
        )
