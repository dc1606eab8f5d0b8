"""verl's FSDP2 engine with probes, on one rank and on two: against verl's own pass and a sequence for each probe."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from rredcot_verl.passes.probe_codec import NO_PROBES, encode, num_probe_tokens
from rredcot_verl.passes.probe_pack import ProbePack
from rredcot_verl.passes.protocol import (
    FUSED,
    MODEL_TYPE,
    PASS,
    PROBE_LOG_PROBS,
    PROBES,
    PROBES_ONLY,
)
from rredcot_verl.probes.elicitation import Probe
from tests.passes.architectures import build_model, naive_scores, random_probes, random_traces

REPOSITORY = Path(__file__).parents[2]
VERLS = "language_model"
NUM_ROWS = 6
BUDGET = 200
BUCKET = 64
PLAIN = {
    "calculate_entropy": True,
    "temperature": 0.7,
    "use_dynamic_bsz": True,
    "max_token_len_per_gpu": 10**6,
    "use_remove_padding": False,
    "pad_token_id": 0,
}
FIXED = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 2}
TEMPERATURES = torch.tensor([0.5, 0.7, 1.0, 1.3, 2.0, 0.9])
# Both ways through three layers in float32.
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}


def make_rows(rank: int, with_probes: bool = True):
    """A rank's rows: one without probes, and one of a single token, as verl pads batches with."""
    traces = random_traces([30 + 20 * rank, 12, 1, 40, 25 + 5 * rank, 18], seed=rank)
    probes = [random_probes(len(trace), 3, seed) if with_probes else [] for seed, trace in enumerate(traces)]
    probes[1] = probes[2] = []
    return traces, probes


def uneven_rows(rank: int):
    """Short traces with many probes, long ones without any, and a budget that holds one of the latter."""
    traces = random_traces([BUDGET - 10, 8] * (NUM_ROWS // 2), seed=rank)
    return traces, [random_probes(8, 60, seed) if len(trace) == 8 else [] for seed, trace in enumerate(traces)]


def as_fields(traces, probes):
    probes = [torch.tensor(encode(own) if own else NO_PROBES) for own in probes]
    return {"input_ids": [torch.tensor(trace) for trace in traces], PROBES: probes}


ROWS = [make_rows(rank) for rank in range(2)]
UNEVEN = [uneven_rows(rank) for rank in range(2)]
ONE_SIDED = [make_rows(0), make_rows(1, with_probes=False)]
NONE_AT_ALL = [make_rows(rank, with_probes=False) for rank in range(2)]


def passes() -> dict[str, tuple[str, list, dict]]:
    """Name -> engine, rows of each rank, settings."""
    fused, alone = PLAIN | {PASS: FUSED}, PLAIN | {PASS: PROBES_ONLY, "calculate_entropy": False}
    by_row = {"temperature": TEMPERATURES}
    small, packed = {"max_token_len_per_gpu": BUDGET}, {"use_remove_padding": True}
    plan = {
        "verl": ("verl", ROWS, PLAIN),
        "verl packed": ("verl", ROWS, PLAIN | packed),
        "verl by row": ("verl", ROWS, PLAIN | by_row),
        "verl at 1": ("verl", ROWS, PLAIN | {"temperature": 1.0}),
        "verl uneven": ("verl", UNEVEN, PLAIN | small),
        "verl lora": ("verl lora", ROWS, PLAIN),
        "verl half": ("verl half", ROWS, PLAIN),
        "plain": ("ours", ROWS, PLAIN),
        "fused": ("ours", ROWS, fused),
        "fused packed": ("ours", ROWS, fused | packed),
        "fused small": ("ours", ROWS, fused | {"max_token_len_per_gpu": 60}),
        "fused fixed": ("ours", ROWS, fused | FIXED),
        "fused by row": ("ours", ROWS, fused | by_row),
        "fused at 1": ("ours", ROWS, fused | {"temperature": 1.0}),
        "fused uneven": ("ours", UNEVEN, fused | small),
        "fused lora": ("ours lora", ROWS, fused),
        "fused half": ("ours half", ROWS, fused),
        "fused padded": ("ours padded", ROWS, fused | packed),
        "one-sided": ("ours", ONE_SIDED, fused),
        "none at all": ("ours", NONE_AT_ALL, fused),
        "alone": ("ours", ROWS, alone),
        "alone small": ("ours", ROWS, alone | {"max_token_len_per_gpu": 60}),
        "alone fixed": ("ours", ROWS, alone | FIXED),
        "alone, one-sided": ("ours", ONE_SIDED, alone | FIXED),
        "alone, none at all": ("ours", NONE_AT_ALL, alone),
        "plain again": ("ours", ROWS, PLAIN),
    }
    return {name: (engine, [as_fields(*rows) for rows in ranks], how) for name, (engine, ranks, how) in plan.items()}


def adapted_model() -> PeftModel:
    """A model with a tied head and an adapter that is not nothing."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(build_model("qwen2-tied"), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def start(folder: Path, num_ranks: int) -> list[dict]:
    """Results of all passes, rank by rank."""
    for name in ("qwen3-untied", "qwen2-tied"):
        build_model(name).save_pretrained(folder / name)
    adapted_model().save_pretrained(folder / "adapter")
    untied, tied, adapter = str(folder / "qwen3-untied"), str(folder / "qwen2-tied"), str(folder / "adapter")
    engines = {
        "verl": {"model_type": VERLS, "path": untied},
        "ours": {"model_type": MODEL_TYPE, "path": untied},
        "ours padded": {
            "model_type": MODEL_TYPE,
            "path": untied,
            "pad_to_length": True,
            "pad_to_length_bucket": BUCKET,
        },
        "verl half": {"model_type": VERLS, "path": untied, "param_dtype": "bf16"},
        "ours half": {"model_type": MODEL_TYPE, "path": untied, "param_dtype": "bf16"},
        "verl lora": {"model_type": VERLS, "path": tied, "adapter": adapter},
        "ours lora": {"model_type": MODEL_TYPE, "path": tied, "adapter": adapter},
    }
    torch.save({"engines": engines, "passes": passes()}, folder / "passes.pt")
    environment = os.environ | {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.passes.engine_ranks", str(folder), str(rank), str(num_ranks)],
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
    return start(tmp_path_factory.mktemp("engine"), request.param)


@pytest.fixture(scope="module")
def model():
    return build_model("qwen3-untied")


@functools.cache
def naive(model, trace: tuple[int, ...], probes: tuple[Probe, ...], temperature: float) -> list[float]:
    return naive_scores(model, trace, probes, temperature) if probes else [0.0]


def assert_probes(found, model, rows, temperatures) -> None:
    for scores, trace, own, temperature in zip(found, *rows, temperatures, strict=True):
        expected = naive(model, tuple(trace), tuple(own), temperature)
        assert scores.tolist() == pytest.approx(expected, abs=1e-4)


FUSED_AGAINST = {
    "fused": "verl",
    "fused packed": "verl",
    "fused small": "verl",
    "fused fixed": "verl",
    "fused padded": "verl",
    "fused by row": "verl by row",
    "fused at 1": "verl at 1",
    "fused uneven": "verl uneven",
    "fused lora": "verl lora",
    "one-sided": "verl",
    "none at all": "verl",
}


@pytest.mark.parametrize("name", FUSED_AGAINST)
def test_a_fused_pass_gives_verls_own_numbers(results, name):
    for rank in results:
        ours, theirs = rank[name], rank[FUSED_AGAINST[name]]
        assert set(ours) == {"sizes", "num_logits", "log_probs", "entropy", PROBE_LOG_PROBS}
        for field in ("log_probs", "entropy"):
            for row, expected in zip(ours[field], theirs[field], strict=True):
                # The last token of a row predicts the next row's first one: verl cuts it off.
                torch.testing.assert_close(row[:-1], expected[:-1], **TOLERANCE)
                assert row.dtype == expected.dtype and row.shape == expected.shape


def test_half_precision(results, model):
    """bfloat16 has 8 bits: errors of a few hundredths of a nat on average, in verl's two passes as in ours."""
    for rank, (traces, probes) in zip(results, ROWS, strict=False):
        for field in ("log_probs", "entropy"):
            ours, theirs = (torch.cat([row[:-1] for row in rank[name][field]]) for name in ("fused half", "verl half"))
            assert ours.dtype == theirs.dtype and (ours - theirs).abs().mean() < 0.05
        read = torch.cat([row for row in rank["fused half"][PROBE_LOG_PROBS] if len(row) > 1])
        exact = [
            value
            for trace, own in zip(traces, probes, strict=True)
            if own
            for value in naive(model, tuple(trace), tuple(own), 0.7)
        ]
        assert (read - torch.tensor(exact)).abs().mean() < 0.1


PROBED = {
    "fused": ROWS,
    "fused packed": ROWS,
    "fused small": ROWS,
    "fused fixed": ROWS,
    "fused padded": ROWS,
    "fused uneven": UNEVEN,
    "one-sided": ONE_SIDED,
    "none at all": NONE_AT_ALL,
    "alone": ROWS,
    "alone small": ROWS,
    "alone fixed": ROWS,
    "alone, one-sided": ONE_SIDED,
    "alone, none at all": NONE_AT_ALL,
}


@pytest.mark.parametrize("name", PROBED)
def test_the_probes_are_those_of_a_sequence_each(results, model, name):
    for rank, rows in zip(results, PROBED[name], strict=False):
        assert_probes(rank[name][PROBE_LOG_PROBS], model, rows, [0.7] * NUM_ROWS)


def test_every_row_has_its_temperature(results, model):
    for rank, rows in zip(results, ROWS, strict=False):
        assert_probes(rank["fused by row"][PROBE_LOG_PROBS], model, rows, TEMPERATURES.tolist())
        assert_probes(rank["fused at 1"][PROBE_LOG_PROBS], model, rows, [1.0] * NUM_ROWS)


@pytest.mark.parametrize("name", [name for name in PROBED if name.startswith("alone")])
def test_a_pass_for_probes_gives_nothing_else(results, name):
    for rank in results:
        assert set(rank[name]) == {"sizes", "num_logits", PROBE_LOG_PROBS}


def test_logits_are_made_where_they_are_read(results):
    for rank, (traces, probes) in zip(results, ROWS, strict=False):
        pack = ProbePack.build([len(trace) for trace in traces], probes)
        assert rank["alone"]["num_logits"] == [len(pack.rows(all_trace_rows=False))]
        assert rank["fused"]["num_logits"] == [len(pack.rows(all_trace_rows=True))]


def test_without_probes_the_pass_is_verls_own(results):
    for rank in results:
        for name in ("plain", "plain again"):
            assert set(rank[name]) == set(rank["verl"]) and rank[name]["sizes"] == rank["verl"]["sizes"]
            for field in ("log_probs", "entropy"):
                for row, expected in zip(rank[name][field], rank["verl"][field], strict=True):
                    assert torch.equal(row, expected)


def test_the_adapter_is_part_of_the_policy(results):
    """On a model with a tied head."""
    model = adapted_model()
    for rank, rows in zip(results, ROWS, strict=False):
        assert_probes(rank["fused lora"][PROBE_LOG_PROBS], model, rows, [0.7] * NUM_ROWS)


def test_the_budget_holds_with_probes(results):
    for rank, rows in zip(results, UNEVEN, strict=False):
        fields = as_fields(*rows)
        needed = [
            len(ids) + num_probe_tokens(probes.tolist())
            for ids, probes in zip(fields["input_ids"], fields[PROBES], strict=True)
        ]
        sizes = rank["fused uneven"]["sizes"]
        assert sum(sizes) == sum(needed)
        assert max(sizes) <= max(BUDGET, max(needed))


def test_ranks_make_the_same_number_of_passes(results):
    for name in results[0]:
        assert len({len(rank[name]["sizes"]) for rank in results}) == 1, name


def test_padded_passes_have_whole_buckets_of_trace_tokens(results):
    for rank, (traces, _) in zip(results, ROWS, strict=False):
        padding = -sum(len(trace) for trace in traces) % BUCKET
        assert padding and rank["fused padded"]["sizes"] == [rank["fused packed"]["sizes"][0] + padding]
