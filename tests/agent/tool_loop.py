"""An agent loop in which a tool has the last word, and a reward for that word."""

from typing import Any

from verl.experimental.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

WORD = "~"


class Tooled(SingleTurnAgentLoop):
    """What the model says first, then what the tool says."""

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        """See `SingleTurnAgentLoop.run`."""
        output = await super().run(sampling_params, priority, **kwargs)
        said = self.tokenizer.encode(2 * WORD, add_special_tokens=False)
        kept = self.response_length - len(said)
        # The model's letters may be any, the tool's own among them.
        ids = [self.tokenizer.encode("a")[0] if i in said else i for i in output.response_ids[:kept]]
        output.response_ids = ids + said
        output.response_mask = output.response_mask[:kept] + [0] * len(said)
        if output.response_logprobs:
            output.response_logprobs = output.response_logprobs[:kept] + [0.0] * len(said)
        output.num_turns = 4
        return output


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **kwargs: Any
) -> float:
    """1 where the tool's word is in the response, otherwise 0.5."""
    return 1.0 if WORD in solution_str else 0.5
