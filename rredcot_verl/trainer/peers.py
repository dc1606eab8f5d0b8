"""Peers of RREDCoT as advantage estimators: the same segments and forms of credit, values from elsewhere.

In each of them the segmentation, the forms `reweight` and `td`, their metrics and the command line are RREDCoT's
(`algorithm.rredcot`), so a comparison changes one word. What a paper says and what we filled in is told one by one.
Without segments each is verl's GRPO, as `rredcot` is.
"""

from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

# The module, not the function: importing the estimator first brings this module in while that one is being loaded.
from rredcot_verl.trainer import estimator


@register_adv_est("vineppo")
def compute_vineppo_advantage(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Monte Carlo values: v_k is the mean reward of continuations sampled from boundary k.

    VinePPO (Kazemnejad et al., arXiv 2410.01679) values every step of a response by 9 independent rollouts and takes
    one-step advantages, r + v_k - v_{k-1}: here `algorithm.rredcot.credit.form=td algorithm.lam=0
    algorithm.norm_adv_by_std_in_grpo=False`, with GRPO's group mean as the first value. It is also what the RREDCoT
    paper calls MC-GRPO. Ours: segments in place of steps, `reweight` by default, one estimate of the prompt's own value
    a group, and the budget (`algorithm.rredcot.monte_carlo`). Dear: `num_rollouts` times the rest of the response at
    every boundary.
    """
    return estimator.compute_rredcot_advantage(*args, **kwargs)


@register_adv_est("attention_attribution")
def compute_attention_attribution_advantage(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Segments share the advantage by how much the tokens that give the answer attend to them.

    Attention as credit is ABC's (Chan et al., "Dense Reward for Free in RLHF", arXiv 2402.00782), which spreads a
    reward model's score over tokens by its last layer's attention; the RREDCoT paper compares with attention
    attribution. Ours: the policy's own attention, from the rows that predict the answer, averaged over heads and
    layers, summed by segment, and shares of R less the group's mean (`core.values.attribution_values`). One more pass
    over the traces.
    """
    return estimator.compute_rredcot_advantage(*args, **kwargs)


@register_adv_est("gradient_attribution")
def compute_gradient_attribution_advantage(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Segments share the advantage by the gradient of the answer's log-probability in their embeddings.

    Input x gradient (Shrikumar et al., arXiv 1605.01713) or integrated gradients (Sundararajan et al., arXiv
    1703.01365); the RREDCoT paper compares with gradient attribution. Ours: the absolute value of the sum over a
    segment's tokens, the zero baseline, and the shares, as in `compute_attention_attribution_advantage`. One forward
    and one backward pass over the traces, `num_steps` of them for integrated gradients.
    """
    return estimator.compute_rredcot_advantage(*args, **kwargs)


@register_adv_est("leave_one_out")
def compute_leave_one_out_advantage(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Segments share the advantage by how far the answer's log-probability falls without them.

    The RREDCoT paper compares with leave-one-out. Ours: the rest closes up, rises count as 0, and the shares, as in
    `compute_attention_attribution_advantage`. A sequence of the trace's length for every segment.
    """
    return estimator.compute_rredcot_advantage(*args, **kwargs)


@register_adv_est("vps")
def compute_vps_advantage(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Segments are credited with the change of the reference answer's probability.

    GRPO-VPS (arXiv 2604.20659) appends the correct answer at every segment boundary and takes the change of its
    conditional probability as the segment's progress; IGPO (arXiv 2510.14967) does so for an agent's turns with
    exp(mean log-probability), which is our form `geometric` and the default here. Ours: RREDCoT's segments, how
    progress becomes advantages, and that the answer's own segment makes none (`core.values.UNPINNED`). Costs what
    RREDCoT costs.
    """
    return estimator.compute_rredcot_advantage(*args, **kwargs)


@register_adv_est("mig")
def compute_mig_advantage(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """As `vps`, but only new highs of the probability pay.

    Step-wise marginal information gain (arXiv 2602.01034) measures a step against a monotonic historical watermark.
    Ours: the same as in `vps`; its masking of rewards to parts of the completion and its supervised objective are not
    built. Costs what RREDCoT costs.
    """
    return estimator.compute_rredcot_advantage(*args, **kwargs)
