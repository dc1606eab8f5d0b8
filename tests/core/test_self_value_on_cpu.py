"""Self-values: the paper's bound on a policy small enough to enumerate, golden numbers, and extreme answers."""

import itertools
import math

import pytest
import torch

from rredcot_verl.core.self_value import geometric_value, joint_value, normalized_value

LETTERS, END, MAX_LENGTH = 3, 3, 4


class ToyPolicy:
    """A random autoregressive policy over the texts of at most `MAX_LENGTH` letters; token `END` ends a text."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        prefixes = [p for n in range(MAX_LENGTH) for p in itertools.product(range(LETTERS), repeat=n)]
        self.table = {p: torch.randn(LETTERS + 1, generator=generator).double().log_softmax(0) for p in prefixes}

    def log_prob(self, prefix: tuple[int, ...], text: tuple[int, ...]) -> float:
        """log p(text, then its end | prefix); a text of full length ends by itself."""
        total, state = 0.0, prefix
        for letter in text:
            total, state = total + self.table[state][letter].item(), (*state, letter)
        return total + (self.table[state][END].item() if len(state) < MAX_LENGTH else 0.0)

    @staticmethod
    def completions(prefix: tuple[int, ...]) -> list[tuple[int, ...]]:
        room = MAX_LENGTH - len(prefix)
        return [c for n in range(room + 1) for c in itertools.product(range(LETTERS), repeat=n)]


def utility(text: tuple[int, ...]) -> float:
    """Graded, and zero for most texts."""
    return {0: 1.0, 1: 0.5}.get(sum(text) % 4, 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_joint_never_exceeds_the_true_value_and_reaches_it_when_all_useful_answers_are_probed(seed):
    policy = ToyPolicy(seed)
    generator = torch.Generator().manual_seed(seed)
    for prefix in [(), (0,), (2, 1), (1, 0, 2)]:
        completions = policy.completions(prefix)
        log_probs = torch.tensor([policy.log_prob(prefix, c) for c in completions], dtype=torch.float64)
        utilities = torch.tensor([utility(prefix + c) for c in completions], dtype=torch.float64)
        # The enumeration itself: the probabilities of all completions sum to 1.
        assert log_probs.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
        true_value = (log_probs.exp() * utilities).sum().item()
        useful = utilities > 0
        if not useful.any():
            continue
        exact = joint_value(log_probs[useful].unsqueeze(0), utilities[useful])
        assert exact.item() == pytest.approx(true_value, abs=1e-6)
        for _ in range(5):
            some = torch.rand(len(completions), generator=generator) < 0.4
            if some.any():
                value = joint_value(log_probs[some].unsqueeze(0), utilities[some]).item()
                assert value <= true_value + 1e-6
                missing = (log_probs.exp() * utilities)[~some].sum().item()
                assert value == pytest.approx(true_value - missing, abs=1e-6)


LOG_PROBS = torch.tensor([[0.2, 0.1, 0.3], [0.5, 0.25, 0.0]]).log()
UTILITIES = torch.tensor([1.0, 0.5, 0.0])


def test_golden_values():
    assert joint_value(LOG_PROBS, UTILITIES).tolist() == pytest.approx([0.25, 0.625], abs=1e-6)
    assert normalized_value(LOG_PROBS, UTILITIES).tolist() == pytest.approx([0.25 / 0.6, 0.625 / 0.75], abs=1e-6)
    lengths = torch.tensor([[2, 1, 1], [1, 2, 1]])
    # max(0.2 ** (1/2), 0.5 * 0.1, 0) and max(0.5, 0.5 * 0.25 ** (1/2), 0)
    assert geometric_value(LOG_PROBS, UTILITIES, lengths).tolist() == pytest.approx([math.sqrt(0.2), 0.5], abs=1e-6)


def test_results_are_float32_in_the_range_of_the_utilities():
    lengths = torch.ones(2, 3, dtype=torch.int64)
    for values in (
        joint_value(LOG_PROBS, UTILITIES),
        normalized_value(LOG_PROBS, UTILITIES),
        geometric_value(LOG_PROBS, UTILITIES, lengths),
    ):
        assert values.dtype == torch.float32 and values.shape == (2,)
    # Rounding of log-probabilities may lift a sum above 1.
    assert joint_value(torch.tensor([[math.log(0.7), math.log(0.31)]]), torch.ones(2)).item() == 1.0
    assert geometric_value(torch.tensor([[1e-4]]), torch.ones(1), torch.ones(1, 1)).item() == 1.0


def test_answers_of_thousands_of_tokens_are_safe():
    log_probs = torch.tensor([[-5000.0, -5001.0], [-5000.0, -5000.0]])
    utilities = torch.tensor([1.0, 0.0])
    assert joint_value(log_probs, utilities).tolist() == [0.0, 0.0]
    # 1 / (1 + 1/e), 1 / 2: the ratio survives where both probabilities underflow.
    assert normalized_value(log_probs, utilities).tolist() == pytest.approx([1 / (1 + math.exp(-1)), 0.5], abs=1e-6)
    lengths = torch.full((2, 2), 2000)
    assert geometric_value(log_probs, utilities, lengths).tolist() == pytest.approx([math.exp(-2.5)] * 2, abs=1e-6)


def test_impossible_answers():
    never = float("-inf")
    log_probs = torch.tensor([[never, math.log(0.5)], [never, never]])
    utilities = torch.tensor([1.0, 0.5])
    assert joint_value(log_probs, utilities).tolist() == pytest.approx([0.25, 0.0], abs=1e-6)
    # Where nothing has any probability the answers say nothing: the mean utility.
    assert normalized_value(log_probs, utilities).tolist() == pytest.approx([0.5, 0.75], abs=1e-6)
    assert geometric_value(log_probs, utilities, torch.ones(2, 2)).tolist() == pytest.approx([0.25, 0.0], abs=1e-6)


def all_forms():
    return [
        joint_value,
        normalized_value,
        lambda log_probs, utilities: geometric_value(log_probs, utilities, torch.ones_like(log_probs)),
    ]


@pytest.mark.parametrize("form", all_forms())
@pytest.mark.parametrize(
    "log_probs, utilities, message",
    [
        (torch.tensor([[float("nan"), 0.0]]), torch.ones(2), "NaN"),
        (torch.zeros(2), torch.ones(2), "do not fit"),
        (torch.zeros(1, 2), torch.ones(3), "do not fit"),
        (torch.zeros(1, 0), torch.ones(0), "do not fit"),
        (torch.zeros(1, 2), torch.tensor([0.0, 1.5]), r"\[0, 1\]"),
        (torch.zeros(1, 2), torch.tensor([-0.5, 1.0]), r"\[0, 1\]"),
    ],
)
def test_bad_input_is_refused(form, log_probs, utilities, message):
    with pytest.raises(ValueError, match=message):
        form(log_probs, utilities)


@pytest.mark.parametrize("lengths", [torch.zeros(1, 2), torch.ones(2), torch.ones(1, 3)])
def test_bad_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match="answer_lengths"):
        geometric_value(torch.zeros(1, 2), torch.ones(2), lengths)


@pytest.mark.parametrize("form", all_forms())
def test_a_nan_utility_is_refused(form):
    with pytest.raises(ValueError, match=r"utilities must lie in \[0, 1\]"):
        form(torch.zeros(1, 2), torch.tensor([0.5, float("nan")]))


@pytest.mark.parametrize("form", all_forms())
def test_order_of_answers_and_of_states_does_not_matter(form):
    torch.manual_seed(0)
    log_probs, utilities = torch.randn(4, 5) - 3, torch.rand(5)
    order, states = torch.randperm(5), torch.randperm(4)
    expected = form(log_probs, utilities)
    torch.testing.assert_close(form(log_probs[:, order], utilities[order]), expected)
    torch.testing.assert_close(form(log_probs[states], utilities), expected[states])


@pytest.mark.parametrize("form", all_forms())
def test_inputs_are_left_alone(form):
    log_probs, utilities = LOG_PROBS.clone(), UTILITIES.clone()
    form(log_probs, utilities)
    assert torch.equal(log_probs, LOG_PROBS) and torch.equal(utilities, UTILITIES)
