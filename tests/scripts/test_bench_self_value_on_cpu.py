"""The self-value benchmark at a tiny size: what it reports, not how long things take."""

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "bench" / "bench_self_value.py"
LENGTHS, SEGMENTS = (48, 80), (2, 4)
TRACES, PROMPT, PROPOSALS, OPENING, ANSWER, ROLLOUTS = 2, 7, 3, 5, 2, 4
VARIANTS = ["plain", "packed", "update", "generation", "shared", "fused", "naive", "server", "monte_carlo"]
SIZE = f"""--model tiny --device cpu --threads 1 --clock process --num-traces {TRACES} --prompt-tokens {PROMPT}
    --proposals {PROPOSALS} --opening-tokens {OPENING} --answer-tokens {ANSWER} --rollouts {ROLLOUTS} --repeats 1
    --decode-tokens 2 --naive-boundaries 3 --server cpu""".split()


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *SIZE, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    lengths, segments = map(str, LENGTHS), map(str, SEGMENTS)
    files = ["--json", str(folder / "out.json"), "--plot", str(folder / "out.svg")]
    done = _run("--lengths", *lengths, "--segments", *segments, *files)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out.json").read_text()), (folder / "out.svg").read_text(), done.stdout


def _boundaries(report, segments, length):
    """The boundaries of each trace, from the benchmark's own work."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from self_value_bench.work import make_traces, make_work
    finally:
        sys.path.remove(str(SCRIPT.parent))
    vocab_size, seed = report["model"]["vocab_size"], report["options"]["seed"]
    traces = make_traces(TRACES, PROMPT + length, vocab_size, seed)
    return make_work(traces, PROMPT, segments, PROPOSALS, OPENING, ANSWER, vocab_size, seed).boundaries


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


def test_forward_tokens_are_those_counted_by_hand(bench):
    report = bench[0]
    for cell in report["cells"]:
        length, segments = cell["length"], cell["segments"]
        boundaries = _boundaries(report, segments, length)
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
    done = _run(
        "--lengths", "48", "--segments", "2", "--tolerance", "0", "--skip", "generation", "monte_carlo", "update"
    )
    assert done.returncode == 1
    assert "differ" in done.stderr
