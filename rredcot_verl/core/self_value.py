"""Self-value of a state from the log-probabilities of known answers: v_k as an estimate of E[R | s_k].

All forms are computed in log space and lie between the lowest and highest utility, so an answer of hundreds of tokens
neither overflows nor turns into NaN.
"""

from torch import Tensor


def joint_value(answer_log_probs: Tensor, utilities: Tensor) -> Tensor:
    """v_k = sum over distinct answers y of p(y | s_k) * utility(y).

    The paper's importance-sampling estimate (Eq. 10, App. C.5) with one term per distinct answer and spelling (ours):
    never above the true value for utilities >= 0, and equal to it when the answers cover everything useful.

    Args:
        answer_log_probs: `(num_states, num_answers)`, nats.
        utilities: `(num_answers,)` in [0, 1].

    Returns:
        `(num_states,)` float32 in [0, 1].
    """
    _check(answer_log_probs, utilities)
    # Rounding can lift the sum of probabilities a little above 1.
    return (answer_log_probs.double().exp() @ utilities.double()).clamp(0.0, 1.0).float()


def normalized_value(answer_log_probs: Tensor, utilities: Tensor) -> Tensor:
    """v_k = sum p(y | s_k) utility(y) / sum p(y | s_k): mass on useful answers over the mass on all probed ones (ours).

    Where every answer has probability zero the answers say nothing: the mean utility is returned.

    Args and returns: as in `joint_value`; the answers should hold wrong ones too.
    """
    _check(answer_log_probs, utilities)
    log_probs = answer_log_probs.double()
    silent = (log_probs == float("-inf")).all(dim=-1)
    weights = log_probs.masked_fill(silent.unsqueeze(-1), 0.0).softmax(dim=-1)
    return (weights @ utilities.double()).clamp(0.0, 1.0).float()


def geometric_value(answer_log_probs: Tensor, utilities: Tensor, answer_lengths: Tensor) -> Tensor:
    """v_k = max over answers of utility(y) * exp(log p(y | s_k) / |y|): the mean log-probability a token (ours).

    Args:
        answer_log_probs: `(num_states, num_answers)`, nats.
        utilities: `(num_answers,)` in [0, 1].
        answer_lengths: `(num_states, num_answers)` tokens that each log-probability sums over, at least 1.

    Returns:
        `(num_states,)` float32 in [0, 1].
    """
    _check(answer_log_probs, utilities)
    if answer_lengths.shape != answer_log_probs.shape or bool((answer_lengths < 1).any()):
        raise ValueError(f"answer_lengths must be >= 1 with shape {tuple(answer_log_probs.shape)}")
    per_token = (answer_log_probs.double() / answer_lengths).exp()
    return (per_token * utilities.double()).amax(dim=-1).clamp(0.0, 1.0).float()


def _check(answer_log_probs: Tensor, utilities: Tensor) -> None:
    if answer_log_probs.ndim != 2 or utilities.shape != answer_log_probs.shape[1:] or utilities.numel() == 0:
        raise ValueError(
            f"answer_log_probs {tuple(answer_log_probs.shape)} and utilities {tuple(utilities.shape)} do not fit: "
            "expected (num_states, num_answers) and (num_answers,) with num_answers >= 1"
        )
    if bool(answer_log_probs.isnan().any()):
        raise ValueError("answer_log_probs holds NaN")
    if not bool(((utilities >= 0) & (utilities <= 1)).all()):
        raise ValueError(f"utilities must lie in [0, 1], got {utilities.min().item()} to {utilities.max().item()}")
