"""The self-value benchmark at a tiny size, where verl is missing: what it reports, not how long things take."""

import json
from xml.etree import ElementTree

import pytest
import torch
from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

from tests.scripts.blocked import ROOT, run_blocked

SCRIPT = ROOT / "scripts" / "bench" / "bench_self_value.py"
LENGTHS, SEGMENTS = (48, 80), (2, 4)
TRACES, PROMPT, PROPOSALS, OPENING, ANSWER, ROLLOUTS = 2, 7, 3, 5, 2, 4
VARIANTS = ["plain", "packed", "update", "generation", "shared", "fused", "naive", "server", "monte_carlo"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    done = run_blocked(SCRIPT, "--tiny", "--json", str(folder / "out.json"), "--plot", str(folder / "out.svg"))
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text()), (folder / "out.svg").read_text(), done.stdout


@pytest.fixture
def parts(monkeypatch):
    """The benchmark's own modules."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from self_value_bench import passes, work

    return passes, work


def _boundaries(work, report, segments, length):
    """The boundaries of each trace, from the benchmark's own work."""
    vocab_size, seed = report["model"]["vocab_size"], report["options"]["seed"]
    traces = work.make_traces(TRACES, PROMPT + length, vocab_size, seed)
    return work.make_work(traces, PROMPT, segments, PROPOSALS, OPENING, ANSWER, vocab_size, seed).boundaries


def test_every_cell_has_every_variant(bench):
    report = bench[0]
    assert [(cell["length"], cell["segments"]) for cell in report["cells"]] == [
        (length, segments) for length in LENGTHS for segments in SEGMENTS
    ]
    for cell in report["cells"]:
        assert sorted(cell["variants"]) == sorted([*VARIANTS, "monte_carlo_uncached"])
        for name in VARIANTS:
            found = cell["variants"][name]
            assert found["seconds"] > 0, name
            assert found["ratio_to_plain"] > 0, name
        extrapolated = {name for name, found in cell["variants"].items() if found["extrapolated"]}
        assert extrapolated == {"generation", "monte_carlo"} | ({"naive"} if cell["segments"] == 4 else set())


def test_forward_tokens_are_those_counted_by_hand(bench, parts):
    report = bench[0]
    for cell in report["cells"]:
        length, segments = cell["length"], cell["segments"]
        boundaries = _boundaries(parts[1], report, segments, length)
        assert all(len(own) == segments and own[0] == 0 and own == sorted(set(own)) for own in boundaries)
        found = {name: variant["forward_tokens"] for name, variant in cell["variants"].items()}
        traces = TRACES * (PROMPT + length)
        # A boundary's opening is computed once, its answers one by one.
        shared = traces + TRACES * segments * (OPENING + PROPOSALS * ANSWER)
        naive, server, rollouts = 0, 0, 0
        for own in boundaries:
            naive += sum(PROPOSALS * (PROMPT + boundary + OPENING + ANSWER) for boundary in own)
            server += PROMPT + own[-1] - 1 + segments * PROPOSALS * (OPENING + ANSWER + 1)
            rollouts += PROMPT + own[-1] + sum(ROLLOUTS * (length - boundary) for boundary in own)
        expected = dict.fromkeys(("plain", "packed", "update", "generation"), traces)
        expected |= {"shared": shared, "fused": shared, "naive": naive, "server": server, "monte_carlo": rollouts}
        expected["monte_carlo_uncached"] = ROLLOUTS * segments * traces
        assert found == expected


def test_the_variants_agree_on_log_probabilities_that_differ(bench):
    found = bench[0]["equivalence"]
    assert found["probes"] < 1e-4
    assert found["traces"] < 1e-4
    assert found["spread"] > 0.5


def test_the_step_adds_up(bench):
    report = bench[0]
    for cell in report["cells"]:
        for step in cell["steps"].values():
            assert step["step"] == pytest.approx(step["generation"] + step["plain"] + step["update"])
        assumed = cell["steps"]["generation assumed"]
        assert assumed["generation"] == pytest.approx(0.6 * assumed["step"])
        variants = cell["variants"]
        for basis, step in cell["steps"].items():
            plain, fused, server = (variants[name] for name in ("plain", "fused", "server"))
            # The fused pass takes the place of `plain`, a server's scoring comes on top.
            added = (fused["seconds"] - plain["seconds"]) / step["step"]
            assert fused["added_to_step"][basis] == pytest.approx(added)
            assert server["added_to_step"][basis] == pytest.approx(server["seconds"] / step["step"])


def test_the_report_says_what_it_was_taken_on(bench):
    report = bench[0]
    assert report["machine"]["threads"] == 1
    assert {"cpu", "cores", "torch", "load_average_at_start", "load_average_at_end", "memory"} <= set(report["machine"])
    assert report["options"]["clock"] == "process"
    assert "| tokens x segments | variant |" in bench[2] and "Same numbers" in bench[2]


def test_the_chart_is_an_svg_document(bench):
    root = ElementTree.fromstring(bench[1])
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    labels = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"shared", "fused", "plain", "monte carlo"} <= labels


def test_variants_that_differ_end_in_an_error():
    done = run_blocked(SCRIPT, "--tiny", "--lengths", "48", "--segments", "2", "--tolerance", "0", "--server", "none")
    assert done.returncode == 1
    assert "differ" in done.stderr


def test_log_probabilities_and_entropies_are_verls(parts):
    passes, _ = parts
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 30, generator=generator), torch.randint(30, (50,), generator=generator)
    torch.testing.assert_close(passes.log_probs_of(logits, labels), logprobs_from_logits(logits, labels))
    torch.testing.assert_close(passes.entropies_of(logits), entropy_from_logits(logits))
