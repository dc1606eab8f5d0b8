"""verl's FSDP2 engine with attribution, on one rank and on two: against the plain functions on the whole model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rredcot_verl.passes.attribution import attention_attribution, gradient_attribution
from rredcot_verl.passes.attribution_protocol import ATTENTION, GRADIENT, OPTIONS, PLANS, WEIGHTS
from rredcot_verl.passes.attribution_task import NO_PLAN, AttributionPlan, AttributionTask, encode_plan
from rredcot_verl.passes.protocol import PASS
from tests.passes.architectures import build_model, random_traces
from tests.passes.test_actor_engine_on_cpu import adapted_model

REPOSITORY = Path(__file__).parents[2]
TEMPERATURE = 0.7
TEMPERATURES = torch.tensor([0.5, 0.7, 1.0, 1.3, 2.0, 0.9])
INPUT_X_GRADIENT, INTEGRATED = ("input_x_gradient", 1), ("integrated_gradients", 3)
SMALL_BUDGET = 60
PLAIN = {
    "calculate_entropy": False,
    "temperature": TEMPERATURE,
    "use_dynamic_bsz": True,
    "max_token_len_per_gpu": 10**6,
    "use_remove_padding": False,
    "pad_token_id": 0,
}
FIXED = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2}


def make_rows(rank: int, with_plans: bool = True):
    """A rank's traces and plans: answers of their own, one appended, and rows without any."""
    traces = random_traces([30 + 20 * rank, 12, 1, 40, 25 + 5 * rank, 18], seed=rank)
    plans: list[AttributionPlan | None] = [
        AttributionPlan(28, (), (3, 9, 9, 20), 23, 28),
        AttributionPlan(9, (7, 8, 9, 10), (2, 5, 8), 11, 13),
        None,
        AttributionPlan(40, (), (1, 10, 20, 30, 39), 39, 40),
        None,
        AttributionPlan(18, (), (4, 15), 15, 18),
    ]
    return traces, plans if with_plans else [None] * len(plans)


def tasks_of(traces, plans) -> list[AttributionTask]:
    """The tasks; of a rank without any, one that has nothing to weigh."""
    own = [plan.task(trace) for trace, plan in zip(traces, plans, strict=True) if plan is not None]
    return own or [AttributionTask(traces[0][:1], (), 1, 1)]


def as_fields(traces, plans):
    rows = [torch.tensor(NO_PLAN if plan is None else encode_plan(plan)) for plan in plans]
    return {"input_ids": [torch.tensor(trace) for trace in traces], PLANS: rows}


ROWS = [make_rows(rank) for rank in range(2)]
SIDED = [make_rows(0), make_rows(1, with_plans=False)]
NONE_AT_ALL = [make_rows(rank, with_plans=False) for rank in range(2)]


def passes() -> dict[str, tuple[str, list, dict]]:
    """Name -> engine, rows of each rank, settings."""
    attention = PLAIN | {PASS: ATTENTION, OPTIONS: ("all",)}
    gradient = PLAIN | {PASS: GRADIENT, OPTIONS: INPUT_X_GRADIENT}
    integrated = gradient | {OPTIONS: INTEGRATED}
    by_row = {"temperature": TEMPERATURES}
    plan = {
        "attention": ("plain", ROWS, attention),
        "attention, last layer": ("plain", ROWS, attention | {OPTIONS: ("last",)}),
        "attention, small": ("plain", ROWS, attention | {"max_token_len_per_gpu": SMALL_BUDGET}),
        "attention, fixed": ("plain", ROWS, attention | FIXED),
        "attention, one-sided": ("plain", SIDED, attention),
        "attention, none at all": ("plain", NONE_AT_ALL, attention),
        "attention, adapter": ("adapter", ROWS, attention),
        "attention, half": ("half", ROWS, attention),
        "gradient": ("plain", ROWS, gradient),
        "gradient, by row": ("plain", ROWS, gradient | by_row),
        "gradient, small": ("plain", ROWS, gradient | {"max_token_len_per_gpu": SMALL_BUDGET}),
        "gradient, fixed": ("plain", ROWS, gradient | FIXED),
        "gradient, one-sided": ("plain", SIDED, gradient),
        "gradient, none at all": ("plain", NONE_AT_ALL, gradient),
        "gradient, adapter": ("adapter", ROWS, gradient),
        "gradient, half": ("half", ROWS, gradient),
        "gradient, budget of training": ("checkpointed", ROWS, gradient),
        "attention, budget of training": ("checkpointed", ROWS, attention),
        "gradient, rows of training": ("checkpointed", ROWS, gradient | FIXED),
        "integrated": ("plain", ROWS, integrated),
        "integrated, one-sided": ("plain", SIDED, integrated),
        "integrated, checkpointed": ("checkpointed", ROWS, integrated),
        "gradient again": ("plain", ROWS, gradient),
    }
    return {name: (engine, [as_fields(*rows) for rows in ranks], how) for name, (engine, ranks, how) in plan.items()}


def start(folder: Path, num_ranks: int) -> list[dict]:
    """Results of all passes, rank by rank."""
    for name in ("qwen3-untied", "qwen2-tied"):
        build_model(name).save_pretrained(folder / name)
    adapted_model().save_pretrained(folder / "adapter")
    untied, tied = {"path": str(folder / "qwen3-untied")}, {"path": str(folder / "qwen2-tied")}
    training = {"max_token_len_per_gpu": SMALL_BUDGET, "micro_batch_size_per_gpu": 1}
    engines = {
        "untouched": untied,
        "plain": untied,
        "checkpointed": untied | {"checkpointing": True} | training,
        "half": untied | {"param_dtype": "bf16"},
        "adapter": tied | {"adapter": str(folder / "adapter")},
        "untouched adapter": tied | {"adapter": str(folder / "adapter")},
    }
    of_training = ([as_fields(*rows) for rows in ROWS], PLAIN)
    plan = {
        "engines": engines,
        "passes": passes(),
        "training": of_training,
        "FSDP1": [tasks_of(*rows) for rows in SIDED],
    }
    torch.save(plan, folder / "passes.pt")
    environment = os.environ | {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.passes.attribution_ranks", str(folder), str(rank), str(num_ranks)],
            env=environment | {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": "0"},
            cwd=REPOSITORY,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(num_ranks)
    ]
    outputs = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * num_ranks, "\n".join(output[-4000:] for output in outputs)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(num_ranks)]


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def results(request, tmp_path_factory):
    return start(tmp_path_factory.mktemp("attribution"), request.param)


@pytest.fixture(scope="module")
def model():
    return build_model("qwen3-untied")


def expected(model, rows, function, temperatures=(TEMPERATURE,) * 6, **options) -> list[list[float]]:
    """Each row alone on the whole model."""
    weights = []
    for trace, plan, temperature in zip(*rows, temperatures, strict=True):
        if function is gradient_attribution:
            options["temperature"] = float(temperature)
        weights.append(function(model, [plan.task(trace)], **options)[0] if plan else [0.0])
    return weights


def assert_weights(found, wanted, tolerance: float = 1e-4) -> None:
    assert len(found) == len(wanted)
    for row, own in zip(found, wanted, strict=True):
        assert row.dtype == torch.float32
        assert row.tolist() == pytest.approx(own, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", ["", ", small", ", fixed", ", one-sided", ", none at all", ", budget of training"])
def test_attention_is_that_of_the_whole_model(results, model, name):
    sided = {", one-sided": SIDED, ", none at all": NONE_AT_ALL}.get(name, ROWS)
    for rank, rows in zip(results, sided, strict=False):
        assert_weights(rank["attention" + name][WEIGHTS], expected(model, rows, attention_attribution))


def test_the_last_layer_alone(results, model):
    for rank, rows in zip(results, ROWS, strict=False):
        wanted = expected(model, rows, attention_attribution, layers="last")
        assert_weights(rank["attention, last layer"][WEIGHTS], wanted)


@pytest.mark.parametrize(
    "name",
    [
        "gradient",
        "gradient, small",
        "gradient, fixed",
        "gradient, one-sided",
        "gradient, none at all",
        "gradient, budget of training",
        "gradient, rows of training",
        "gradient again",
    ],
)
def test_gradients_are_those_of_the_whole_model(results, model, name):
    sided = {"gradient, one-sided": SIDED, "gradient, none at all": NONE_AT_ALL}.get(name, ROWS)
    for rank, rows in zip(results, sided, strict=False):
        assert_weights(rank[name][WEIGHTS], expected(model, rows, gradient_attribution))


@pytest.mark.parametrize("name", ["integrated", "integrated, one-sided", "integrated, checkpointed"])
def test_integrated_gradients_are_those_of_the_whole_model(results, model, name):
    for rank, rows in zip(results, SIDED if "one-sided" in name else ROWS, strict=False):
        wanted = expected(model, rows, gradient_attribution, method=INTEGRATED[0], num_steps=INTEGRATED[1])
        assert_weights(rank[name][WEIGHTS], wanted)


def test_every_row_has_its_temperature(results, model):
    for rank, rows in zip(results, ROWS, strict=False):
        wanted = expected(model, rows, gradient_attribution, TEMPERATURES.tolist())
        assert_weights(rank["gradient, by row"][WEIGHTS], wanted)


def test_the_adapter_is_part_of_the_policy(results):
    model = adapted_model()
    for rank, rows in zip(results, ROWS, strict=False):
        assert_weights(rank["attention, adapter"][WEIGHTS], expected(model, rows, attention_attribution))
        assert_weights(rank["gradient, adapter"][WEIGHTS], expected(model, rows, gradient_attribution))


def test_half_precision(results, model):
    """bfloat16 has 8 bits; weights of a random model with sharp distributions move by some hundredths of their size."""
    for rank, rows in zip(results, ROWS, strict=False):
        for name, function, limit in (
            ("attention", attention_attribution, 0.02),
            ("gradient", gradient_attribution, 0.2),
        ):
            found = torch.cat(rank[f"{name}, half"][WEIGHTS])
            exact = torch.tensor([weight for own in expected(model, rows, function) for weight in own])
            assert found.isfinite().all() and (found - exact).abs().mean() < limit * exact.abs().mean()


def test_a_training_step_afterwards_is_the_same(results):
    """To the last bit: nothing of a pass is left in gradients, hooks or optimiser."""
    for rank in results:
        steps = rank["steps"]
        for touched, untouched in (("plain", "untouched"), ("adapter", "untouched adapter")):
            assert steps[touched]["norm"] == steps[untouched]["norm"] > 0
            for name, parameter in steps[untouched]["parameters"].items():
                assert torch.equal(steps[touched]["parameters"][name], parameter), name


def test_fsdp1_gives_the_same(results, model):
    """torch's own, on a model alone: verl's engine of that strategy needs a GPU."""
    for rank, rows in zip(results, SIDED, strict=False):
        tasks = tasks_of(*rows)
        for attention, gradient in (rank["FSDP1"]["first"], rank["FSDP1"]["second"]):
            for found, expected in (
                (attention, attention_attribution(model, tasks)),
                (gradient, gradient_attribution(model, tasks)),
            ):
                for own, other in zip(found, expected, strict=True):
                    assert own == pytest.approx(other, rel=1e-4, abs=1e-4)


def test_ranks_make_the_same_number_of_passes(results):
    for name in passes():
        assert len({len(rank[name]["sizes"]) for rank in results}) == 1, name


def test_rows_are_as_long_as_their_plans(results):
    for rank, (_, plans) in zip(results, ROWS, strict=False):
        num_tokens = sum(plan.num_tokens if plan else 1 for plan in plans)
        assert rank["gradient"]["sizes"] == [num_tokens] == rank["attention"]["sizes"]
        assert rank["integrated"]["sizes"] == [num_tokens] * INTEGRATED[1]
        # verl balances by work, not by tokens: a micro batch may go over the budget by a row.
        for name in ("gradient, small", "attention, small", "gradient, budget of training"):
            assert len(rank[name]["sizes"]) > 1 and sum(rank[name]["sizes"]) == num_tokens
        assert len(rank["attention, budget of training"]["sizes"]) == 1
        assert len(rank["gradient, fixed"]["sizes"]) == 3 and len(rank["gradient, rows of training"]["sizes"]) == 6


def test_checkpointed_layers_are_computed_twice(results):
    for rank in results:
        assert rank["gradient"]["num_layer_calls"] == 1
        read = rank["gradient, budget of training"]
        assert read["num_layer_calls"] == 2 * len(read["sizes"])
