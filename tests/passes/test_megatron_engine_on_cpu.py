"""verl's Megatron engine with our pass, on four ranks of a CPU in every layout, against a sequence for each probe.

The truth is transformers' model with the same weights, which also says whether the stand-ins of `megatron_cpu` are
right: verl's own pass has to give its log-probabilities.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rredcot_verl.passes.probe_codec import num_probe_tokens
from rredcot_verl.passes.protocol import FIELDS
from tests import PATIENCE_S
from tests.passes import cases
from tests.passes.architectures import naive_scores, plain_log_probs

pytest.importorskip("megatron.core", reason="needs megatron-core: pip install '.[megatron]'")

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Of every rank what each case gave in each layout."""
    folder = tmp_path_factory.mktemp("megatron")
    environment = os.environ | {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "tests.passes.megatron_ranks", str(folder)]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY, text=True, capture_output=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return [torch.load(path, weights_only=False) for path in sorted(folder.glob("megatron-*.pt"))]


def layouts() -> list[str]:
    from tests.passes.megatron_ranks import LAYOUTS

    return list(LAYOUTS)


@functools.cache
def model(layout: str):
    from tests.passes.megatron_ranks import build_model

    return build_model(layout.split()[0])


@functools.cache
def naive(layout: str, number: int, temperatures: tuple[float, ...]) -> list[list[float]]:
    rows = cases.ROWS[number]
    return [
        naive_scores(model(layout), trace, own, temperature) if own else [0.0]
        for trace, own, temperature in zip(rows.traces, rows.probes, temperatures, strict=True)
    ]


def outputs(ranks, layout: str, name: str):
    """Of each rank that has results, its data-parallel number and the fields."""
    found = [(rank[layout]["dp"] % 2, rank[layout][name]["fields"]) for rank in ranks]
    with_results = [(number, fields) for number, fields in found if fields]
    # Every rank of the last pipeline stage.
    assert len(with_results) == len(ranks) // (2 if "pp2" in layout else 1)
    return with_results


@pytest.mark.parametrize("layout", layouts())
def test_verls_own_pass_is_that_of_the_model(ranks, layout):
    for number, fields in outputs(ranks, layout, "verl"):
        for trace, row in zip(cases.ROWS[number].traces, fields["log_probs"], strict=True):
            expected = plain_log_probs(model(layout), trace, cases.TEMPERATURE)
            torch.testing.assert_close(row[:-1], expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("words", ["", "small", "fixed", "by-row", "one-sided", "none"])
def test_probes_are_those_of_a_sequence_each(ranks, layout, words):
    name = f"probes alone {words}".strip()
    temperatures = cases.TEMPERATURES.tolist() if words == "by-row" else [cases.TEMPERATURE] * cases.NUM_ROWS
    for number, fields in outputs(ranks, layout, name):
        assert list(fields) == [FIELDS["probes"].result]
        asked = cases.rows_of(name)[number].probes
        expected = naive(layout, number, tuple(temperatures))
        for found, own, truth in zip(fields[FIELDS["probes"].result], asked, expected, strict=True):
            assert found.dtype == torch.float32
            assert found.tolist() == pytest.approx(truth if own else [0.0], abs=1e-4)


@pytest.mark.parametrize("layout", layouts())
def test_a_pass_costs_its_traces_and_probes(ranks, layout):
    """And on every rank as many calls of the model, padded to what tensor parallelism divides."""
    parallel = 2 if "tp2" in layout else 1
    for rank in ranks:
        rows = cases.ROWS[rank[layout]["dp"] % 2]
        payloads = rows.fields()[FIELDS["probes"].payload]
        seen = [max((probe.position for probe in own), default=1) for own in rows.probes]
        needed = sum(map(sum, zip(seen, map(num_probe_tokens, payloads), strict=True)))
        assert rank[layout]["probes alone"]["sizes"] == [needed + -needed % parallel]
        sizes = rank[layout]["probes alone small"]["sizes"]
        assert sum(sizes) >= needed and not any(size % parallel for size in sizes)
    for name in ("probes alone small", "probes alone one-sided", "probes alone fixed"):
        assert len({len(rank[layout][name]["sizes"]) for rank in ranks}) == 1
    assert len(ranks[0][layout]["probes alone small"]["sizes"]) > 1
