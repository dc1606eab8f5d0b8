"""verl's FSDP2 engine with our passes, on one rank and more: against verl's own, and the plain ways to compute each.

Probes against a sequence for each, hidden states against transformers' own, attributions against the plain functions,
one row at a time on the whole model.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rredcot_verl.passes.attribution import attention_attribution, gradient_attribution
from rredcot_verl.passes.probe_codec import num_probe_tokens
from rredcot_verl.passes.probe_pack import ProbePack, count_probe_tokens
from rredcot_verl.passes.probe_parts import LEAST_ROOM
from rredcot_verl.passes.protocol import ALONE, FIELDS, PASSES
from rredcot_verl.probes.probe import Probe
from tests import PATIENCE_S
from tests.passes import cases
from tests.passes.architectures import ARCHITECTURES, build_model, naive_scores
from tests.passes.test_hidden_on_cpu import expected as expected_states

REPOSITORY = Path(__file__).parents[2]
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
TEMPERATURE_OF_ROWS = (cases.TEMPERATURE,) * cases.NUM_ROWS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all ranks have left what they gave."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.passes.ranks", str(folder)]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, text=True, capture_output=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return folder


@pytest.fixture(scope="module")
def by_size(folder):
    """By number of ranks, of every rank what each case gave."""
    return {
        size: [torch.load(folder / f"{size}-{rank}.pt", weights_only=False) for rank in range(size)]
        for size in cases.SPLIT_CASES
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def results(request, by_size):
    return by_size[request.param]


@pytest.fixture(scope="module")
def model():
    return build_model("qwen3-untied")


@pytest.fixture(scope="module")
def kernel_model():
    return cases.kernel_model()


def read(rank, name: str, what: str) -> list[torch.Tensor]:
    """The rows of a field, or of a pass's result."""
    return rank[name]["fields"][FIELDS[what].result if what in FIELDS else what]


def assert_equal(rank, name: str, other: str, *fields: str) -> None:
    """To the bit."""
    for field in fields:
        for row, before in zip(read(rank, name, field), read(rank, other, field), strict=True):
            assert torch.equal(row, before), (name, other, field)


def assert_close(rank, name: str, other: str, other_rank=None) -> None:
    for field in ("log_probs", "entropy"):
        for row, before in zip(read(rank, name, field), read(other_rank or rank, other, field), strict=True):
            # The last token of a row predicts the next row's first one: verl cuts it off.
            torch.testing.assert_close(row[:-1], before[:-1], atol=2e-5, rtol=1e-5)
            assert row.dtype == before.dtype and row.shape == before.shape


@functools.cache
def naive(model, trace: tuple[int, ...], probes: tuple[Probe, ...], temperature: float) -> list[float]:
    return naive_scores(model, trace, probes, temperature) if probes else [0.0]


def assert_probes(found, model, rows: cases.Rows, temperatures=TEMPERATURE_OF_ROWS) -> None:
    for scores, trace, own, temperature in zip(found, rows.traces, rows.probes, temperatures, strict=True):
        assert scores.dtype == torch.float32
        assert scores.tolist() == pytest.approx(naive(model, tuple(trace), tuple(own), temperature), abs=1e-4)


def states_of(model, trace, positions) -> torch.Tensor:
    return expected_states(model, trace, positions, *cases.READOUT)


def pack_of(rows: cases.Rows) -> ProbePack:
    return ProbePack.build([len(trace) for trace in rows.traces], rows.probes)


def assert_states(found, model, rows: cases.Rows) -> None:
    for own, trace, wanted in zip(found, rows.traces, rows.positions, strict=True):
        assert own.dtype == torch.float32
        if wanted:
            states = states_of(model, trace, wanted)
            torch.testing.assert_close(own.reshape(states.shape), states, **TOLERANCE)
        else:
            assert own.tolist() == [0.0]


def weigh(model, rows: cases.Rows, function, temperatures=TEMPERATURE_OF_ROWS) -> list[list[float]]:
    """Each row alone on the whole model."""
    weights = []
    for trace, plan, temperature in zip(rows.traces, rows.plans, temperatures, strict=True):
        options = {"temperature": float(temperature)} if function is gradient_attribution else {}
        weights.append(function(model, [plan.task(trace)], **options)[0] if plan else [0.0])
    return weights


def assert_weights(found, expected) -> None:
    for row, own in zip(found, expected, strict=True):
        assert row.dtype == torch.float32
        assert row.tolist() == pytest.approx(own, rel=1e-4, abs=1e-4)


# --- all passes


def test_a_pass_gives_what_it_is_asked_for(results):
    """Nothing but that where it is `ALONE`."""
    for name in cases.CASES:
        settings = cases.settings_of(name)
        fields = set() if settings.get(ALONE) else {"log_probs", "entropy"}
        fields |= {FIELDS[asked].result for asked, _ in settings.get(PASSES, ())}
        assert all(set(rank[name]["fields"]) == fields for rank in results), name


def test_ranks_make_the_same_number_of_passes(results):
    for name in cases.CASES:
        assert len({len(rank[name]["sizes"]) for rank in results}) == 1, name


def test_a_batch_that_asks_for_nothing_goes_through_verls_own_pass(results):
    """To the bit, before all other passes and after them."""
    for rank in results:
        for name in ("plain", "plain-again"):
            assert_equal(rank, name, "verl", "log_probs", "entropy")
            assert rank[name]["sizes"] == rank["verl"]["sizes"]


def test_a_training_step_afterwards_is_verls_own(results):
    """To the bit: nothing of a pass is left in gradients, hooks or optimiser."""
    for rank in results:
        for name in ("ours", "ours lora"):
            ours, theirs = rank["steps"][name], rank["steps"][name.replace("ours", "verl")]
            assert ours["norm"] == theirs["norm"] > 0
            for parameter, value in theirs["parameters"].items():
                assert torch.equal(ours["parameters"][parameter], value), parameter


def test_the_adapter_is_part_of_the_policy(results):
    """On a model with a tied head."""
    model, without = cases.adapted_model(), build_model("qwen2-tied")
    for rank, rows in zip(results, cases.ROWS, strict=False):
        for name in ("probes lora", "both lora"):
            assert_probes(read(rank, name, "probes"), model, rows)
        for name in ("hidden lora", "both lora", "hidden alone lora"):
            assert_states(read(rank, name, "hidden"), model, rows)
            states = states_of(without, rows.traces[0], rows.positions[0])
            assert not torch.allclose(read(rank, name, "hidden")[0], states.flatten(), atol=0.01)
        assert_weights(read(rank, "attention lora", "attention"), weigh(model, rows, attention_attribution))
        assert_weights(read(rank, "gradient lora", "gradient"), weigh(model, rows, gradient_attribution))


def test_half_precision(results, model):
    """bfloat16 has 8 bits: errors of a few hundredths of a nat, of a state or of a weight's size, as in verl's pass."""
    for rank, rows in zip(results, cases.ROWS, strict=False):
        for field in ("log_probs", "entropy"):
            ours, theirs = (
                torch.cat([row[:-1] for row in read(rank, name, field)]) for name in ("probes half", "verl half")
            )
            assert ours.dtype == theirs.dtype and (ours - theirs).abs().mean() < 0.05
        asked = [(tuple(trace), tuple(own)) for trace, own in zip(rows.traces, rows.probes, strict=True) if own]
        exact = torch.tensor([value for own in asked for value in naive(model, *own, cases.TEMPERATURE)])
        scores = torch.cat([row for row in read(rank, "probes half", "probes") if len(row) > 1])
        assert (scores - exact).abs().mean() < 0.1
        pairs = zip(read(rank, "hidden half", "hidden"), rows.traces, rows.positions, strict=True)
        errors = [(own - states_of(model, trace, wanted).flatten()).abs() for own, trace, wanted in pairs if wanted]
        assert 0 < torch.cat(errors).mean() < 0.05
        states = torch.cat(read(rank, "hidden half", "hidden"))
        # The projection itself is not rounded.
        assert states.dtype == torch.float32 and not torch.equal(states, states.bfloat16().float())
        for name, function, limit in (
            ("attention", attention_attribution, 0.02),
            ("gradient", gradient_attribution, 0.2),
        ):
            found = torch.cat(read(rank, f"{name} half", name))
            exact = torch.tensor([weight for own in weigh(model, rows, function) for weight in own])
            assert found.isfinite().all() and (found - exact).abs().mean() < limit * exact.abs().mean()


def test_the_first_version_of_fsdp(results, model):
    """torch's own, on a model alone: verl's engine of that strategy needs a GPU."""
    for rank, rows, sided in zip(results, cases.ROWS, cases.ROWS_BY_WORD["one-sided"], strict=False):
        states = states_of(model, rows.traces[0], rows.positions[0])
        torch.testing.assert_close(rank["fsdp1"]["states"], states, **TOLERANCE)
        expected = [function(model, sided.tasks()) for function in (attention_attribution, gradient_attribution)]
        for found in rank["fsdp1"]["weights"]:
            for own, other in zip(found, expected, strict=True):
                assert_weights([torch.tensor(weights) for weights in own], other)


# --- probes


@pytest.mark.parametrize("name", cases.select("probes", "both", without="half garbage alone"))
def test_probes_leave_verls_own_numbers(results, name):
    kept = ("by-row", "at-1", "uneven", "lora", "kernels")
    other = " ".join(["verl", *(word for word in name.split() if word in kept)])
    for rank in results:
        assert_close(rank, name, other)


@pytest.mark.parametrize("name", cases.select("probes", "both"))
def test_probes_are_those_of_a_sequence_each(results, model, name):
    for rank, rows in zip(results, cases.rows_of(name), strict=False):
        assert_probes(read(rank, name, "probes"), model, rows)


def test_every_row_has_its_temperature(results, model):
    for rank, rows in zip(results, cases.ROWS, strict=False):
        assert_probes(read(rank, "probes by-row", "probes"), model, rows, cases.TEMPERATURES.tolist())
        assert_probes(read(rank, "probes at-1", "probes"), model, rows, [1.0] * cases.NUM_ROWS)
        expected = weigh(model, rows, gradient_attribution, cases.TEMPERATURES.tolist())
        assert_weights(read(rank, "gradient by-row", "gradient"), expected)


def test_logits_are_made_where_they_are_read(results):
    for rank, rows in zip(results, cases.ROWS, strict=False):
        pack = pack_of(rows)
        for name in ("probes alone", "both alone", "both-turned alone"):
            assert rank[name]["num_logits"] == [len(pack.rows(all_trace_rows=False))]
        assert rank["probes"]["num_logits"] == [len(pack.rows(all_trace_rows=True))]
        for name in cases.select("hidden", without="kernels"):
            if "alone" in name:
                # Of each row of a padded pass, or of a packed one.
                assert set(rank[name]["num_logits"]) == {1}, name


def test_the_budget_holds_with_probes(results):
    for rank, rows in zip(results, cases.rows_of("probes uneven"), strict=False):
        payloads = rows.fields()[FIELDS["probes"].payload]
        needed = [len(trace) + num_probe_tokens(own) for trace, own in zip(rows.traces, payloads, strict=True)]
        sizes = rank["probes uneven"]["sizes"]
        assert sum(sizes) == sum(needed)
        assert max(sizes) <= max(cases.BUDGET, max(needed))


@pytest.mark.parametrize("name", ["probes small", "probes alone small", "both small"])
def test_probes_that_do_not_fit_are_read_in_parts(results, name):
    """With one-sided rows too, so that ranks have as many: no pass goes over the budget by more than a quarter."""
    for rank, rows in zip(results, cases.ROWS, strict=False):
        limit = max(map(len, rows.traces)) + cases.SMALL_BUDGET // LEAST_ROOM
        needed = [len(trace) + count_probe_tokens(own) for trace, own in zip(rows.traces, rows.probes, strict=True)]
        assert max(needed) > limit
        assert max(rank[name]["sizes"]) <= max(limit, cases.SMALL_BUDGET)


def test_a_pass_alone_computes_no_more_of_traces_than_probes_see(results):
    for rank, rows in zip(results, cases.ROWS, strict=False):
        seen = [max((probe.position for probe in own), default=1) for own in rows.probes]
        assert rank["probes alone"]["sizes"] == [sum(seen) + sum(map(count_probe_tokens, rows.probes))]
        assert rank["probes alone none"]["sizes"] == [cases.NUM_ROWS]


def test_padded_passes_have_whole_buckets_of_trace_tokens(results):
    for rank, rows in zip(results, cases.ROWS, strict=False):
        padding = -sum(len(trace) for trace in rows.traces) % cases.BUCKET
        assert padding and rank["probes padded"]["sizes"] == [rank["probes packed"]["sizes"][0] + padding]


# --- hidden states


@pytest.mark.parametrize("name", cases.select("hidden", "both", "both-turned"))
def test_states_are_those_of_every_trace_by_itself(results, model, name):
    for rank, rows in zip(results, cases.rows_of(name), strict=False):
        assert_states(read(rank, name, "hidden"), model, rows)


@pytest.mark.parametrize("name", cases.select("hidden", without="alone garbage"))
def test_states_leave_everything_else_to_the_bit(results, name):
    other = " ".join(["verl", *(word for word in name.split()[1:] if word not in ("one-sided", "none", "last-layer"))])
    for rank in results:
        assert_equal(rank, name, other, "log_probs", "entropy")
        assert rank[name]["sizes"] == rank[other]["sizes"] and rank[name]["num_logits"] == rank[other]["num_logits"]


def test_probes_and_states_do_not_know_of_each_other(results):
    """Nor of the order in which they are asked for."""
    for rank in results:
        assert_equal(rank, "both", "probes", "probes", "log_probs", "entropy")
        # For probes alone, no more of the traces is computed than they see.
        for both, alone in zip(read(rank, "both alone", "probes"), read(rank, "probes alone", "probes"), strict=True):
            torch.testing.assert_close(both, alone, atol=2e-5, rtol=1e-5)
        assert rank["both"]["num_logits"] == rank["probes"]["num_logits"]
        assert_equal(rank, "both-turned", "both", "probes", "hidden", "log_probs", "entropy")
        assert_equal(rank, "both-turned alone", "both alone", "probes", "hidden")


def test_garbage_in_another_row_changes_nothing(results):
    for rank in results:
        for name in ("hidden garbage", "hidden garbage packed", "both garbage"):
            pairs = zip(read(rank, name, "hidden"), read(rank, name.replace(" garbage", ""), "hidden"), strict=True)
            changed = [number for number, (row, before) in enumerate(pairs) if not torch.equal(row, before)]
            assert changed == [cases.GARBAGE_ROW]


# --- fused kernels


def test_fused_kernels(results, kernel_model):
    """They make no logits: states need none, and the head makes those of the probes' rows alone."""
    for rank, rows in zip(results, cases.ROWS, strict=False):
        for name in ("hidden kernels", "hidden alone kernels", "both kernels"):
            assert_states(read(rank, name, "hidden"), kernel_model, rows)
        pack = pack_of(rows)
        for name in ("probes kernels", "both kernels", "probes alone kernels"):
            assert_probes(read(rank, name, "probes"), kernel_model, rows)
            assert rank[name]["num_logits"] == [0]
            assert rank[name]["num_head_rows"] == [len(pack.rows(all_trace_rows=False))]
            assert rank[name]["num_fused"] == [1 if "alone" in name else pack.num_trace_tokens]


# --- sequences split over ranks

SPLIT = [(size, name) for size, names in cases.SPLIT_CASES.items() for name in names]


@pytest.mark.parametrize("size, name", SPLIT)
def test_a_sequence_split_over_ranks(by_size, model, kernel_model, size, name):
    """verl's Ulysses: every rank has the results of the whole sequence, of tokens it did not compute too."""
    first, *words = name.split()
    model = kernel_model if "kernels" in words else model
    other = " ".join(["verl", *(word for word in words if word in ("by-row", "uneven", "kernels"))])
    temperatures = cases.TEMPERATURES.tolist() if "by-row" in words else TEMPERATURE_OF_ROWS
    for number, rank in enumerate(by_size[size]):
        group = number // cases.num_parts(name)
        rows = cases.rows_of(name)[group]
        if first in ("probes", "both"):
            assert_probes(read(rank, name, "probes"), model, rows, temperatures)
        if first in ("hidden", "both"):
            assert_states(read(rank, name, "hidden"), model, rows)
        if "alone" not in words:
            assert_close(rank, name, other, by_size[2][group])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_split_sequence_of_every_architecture(by_size, name):
    """Key-value heads, where there are fewer of them than ranks, are repeated."""
    model, pairs = build_model(name), zip(cases.SPLIT_TRACES, cases.SPLIT_PROBES, strict=True)
    expected = [score for trace, own in pairs for score in naive_scores(model, trace, own, cases.TEMPERATURE)]
    for rank in by_size[4]:
        assert rank["architectures"][name] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("size, name", [(2, "probes halves"), (4, "probes quarters"), (2, "probes halves alone")])
def test_tokens_and_logits_are_split(by_size, size, name):
    """No token and no row is computed twice; what pads traces and probes is less than the ranks."""
    rows = cases.ROWS[0]
    pack = pack_of(rows)
    if "alone" in name:
        # No more of a trace than its probes see.
        lengths = [max((probe.position for probe in own), default=1) for own in rows.probes]
        pack = ProbePack.build(lengths, rows.probes)
    (num_tokens,) = {tuple(rank[name]["sizes"]) for rank in by_size[size]}
    assert 0 <= size * num_tokens[0] - pack.num_tokens <= 2 * (size - 1)
    num_logits = sum(rank[name]["num_logits"][0] for rank in by_size[size])
    padding = 0 if "alone" in name else -pack.num_trace_tokens % size
    assert num_logits == len(pack.rows(all_trace_rows="alone" not in name)) + padding


def test_the_budget_is_of_one_rank(by_size):
    rows = cases.rows_of("probes uneven")[0]
    payloads = rows.fields()[FIELDS["probes"].payload]
    needed = [len(trace) + num_probe_tokens(own) for trace, own in zip(rows.traces, payloads, strict=True)]
    for rank in by_size[2]:
        sizes = rank["probes halves uneven"]["sizes"]
        assert max(sizes) <= max(cases.BUDGET, max(needed) / 2) + 2 and len(sizes) < len(rank["probes uneven"]["sizes"])


# --- attributions


@pytest.mark.parametrize("name", cases.select("attention", "gradient", "gradient-again"))
def test_weights_are_those_of_the_whole_model(results, model, name):
    function = attention_attribution if name.startswith("attention") else gradient_attribution
    result = name.split()[0].removesuffix("-again")
    for rank, rows in zip(results, cases.rows_of(name), strict=False):
        assert_weights(read(rank, name, result), weigh(model, rows, function))


def test_rows_are_as_long_as_their_plans(results):
    num_tokens = sum(plan.answer_to if plan else 1 for plan in cases.PLANS)
    for rank in results:
        sizes = {name: own["sizes"] for name, own in rank.items() if "sizes" in own}
        assert sizes["gradient"] == [num_tokens] == sizes["attention"]
        # verl balances by work, not by tokens: a micro batch may go over the budget by a row.
        for name in ("gradient small", "attention small", "gradient checkpointed"):
            assert len(sizes[name]) > 1 and sum(sizes[name]) == num_tokens
        # Training's budget holds where there is a backward pass.
        assert len(sizes["attention checkpointed"]) == 1
        assert len(sizes["gradient fixed"]) == 3 and len(sizes["gradient checkpointed fixed"]) == 6


def test_checkpointed_layers_are_computed_twice(results):
    for rank in results:
        assert rank["gradient"]["num_layer_calls"] == 1
        checkpointed = rank["gradient checkpointed"]
        assert checkpointed["num_layer_calls"] == 2 * len(checkpointed["sizes"])
