"""The check for a GPU on a CPU: as a whole where verl is missing, and that it finds what is wrong."""

import functools
import importlib.util
import json
import math
import sys

import pytest
import torch

from rredcot_verl.passes import shared_attention
from rredcot_verl.passes.probe_pack import ProbePack
from tests.scripts.blocked import ROOT, run_blocked

SCRIPT = ROOT / "scripts" / "check_gpu.py"


@pytest.fixture
def check(monkeypatch):
    """The script as a module."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("check_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "check_gpu", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def world(check, tmp_path):
    return check.World(torch.device("cpu"), True, tmp_path)


def numbers_of(check, world, architecture, dtype):
    """The finding of one architecture's numbers."""
    finding = check.Finding("numbers")
    config = check.ARCHITECTURES[architecture]
    finding.run(functools.partial(check.numbers, world, config, world.packs, dtype))
    return finding


def findings_of(output: str):
    """The findings by name, and the table."""
    lines, _, table = output.partition("\n\n")
    _, *findings = [json.loads(line, parse_constant=pytest.fail) for line in lines.splitlines()]
    return {found["name"]: found for found in findings}, table


def test_all_of_it_without_verl():
    done = run_blocked(SCRIPT, "--tiny", "--minutes", "600")
    assert done.returncode == 0, done.stdout + done.stderr
    findings, table = findings_of(done.stdout)
    skipped = {name: found["reasons"][0] for name, found in findings.items() if found["verdict"] == "skipped"}
    capped = [f"numbers gemma2-capped {dtype}" for dtype in ("float32", "bfloat16")]
    assert set(skipped) == {*capped, "compilations", "verl"} and "verl" in skipped["verl"]
    others = findings.keys() - skipped
    assert {name.split()[0] for name in others} == {"numbers", "fsdp2", "passes", "naive"} and len(others) == 16
    for name in others:
        # Seconds are a busy machine's.
        judged = {figure for figure in findings[name]["limits"] if "token_over" not in figure and "naive" not in figure}
        assert judged and not any(reason.split()[0] in judged for reason in findings[name]["reasons"]), findings[name]
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [*findings]


def test_verls_engine():
    done = run_blocked(SCRIPT, "--tiny", "--only", "verl", missing=())
    findings, _ = findings_of(done.stdout)
    assert findings["verl"]["verdict"] == "ok", done.stdout + done.stderr
    assert findings["verl"]["figures"]["numbers"] > 100


@pytest.fixture
def on_a_gpu(monkeypatch):
    """FlexAttention on this device too, traced and not made into kernels."""
    torch._dynamo.reset()
    monkeypatch.setattr(shared_attention, "FLEX_DEVICE", "cpu")
    compiled = functools.cache(lambda function: torch.compile(function, dynamic=True, backend="eager"))
    monkeypatch.setattr(shared_attention, "_compiled", compiled)


def test_the_road_of_a_gpu(check, world, on_a_gpu):
    finding = check.Finding("compilations")
    finding.run(functools.partial(check.compilations, world))
    assert finding.verdict == "ok", finding
    assert finding.figures["graphs"][0] == 2 and finding.figures["tokens"] == [*check.SIZES[:4]]
    finding = check.Finding("numbers")
    finding.run(
        functools.partial(check.numbers, world, check.ARCHITECTURES["gemma2-capped"], world.packs, torch.float32)
    )
    assert finding.verdict == "ok" and finding.figures["graphs_in_all"] >= 2, finding


def test_a_mask_for_every_size_is_found(check, world, on_a_gpu, monkeypatch):
    static = functools.cache(lambda function: torch.compile(function, dynamic=False, backend="eager"))
    monkeypatch.setattr(shared_attention, "_compiled", static)
    finding = check.Finding("compilations")
    finding.run(functools.partial(check.compilations, world))
    assert finding.verdict == "suspicious" and "graphs_of_all 8 over 4" in finding.reasons


def test_a_probe_that_sees_too_much_is_found(check, world, monkeypatch):
    build = ProbePack.build

    def leaking(lengths, probes):
        pack = build(lengths, probes)
        pack.limits[pack.num_trace_tokens :] += 1
        return pack

    for dtype in (torch.float32, torch.bfloat16):
        with monkeypatch.context() as patched:
            patched.setattr(ProbePack, "build", leaking)
            finding = numbers_of(check, world, "qwen3", dtype)
        assert finding.verdict == "failed" and finding.reasons, finding


@pytest.mark.parametrize(
    "value, limits, verdict",
    [
        (1.0, (1, 2), "ok"),
        (1.5, (1, 2), "suspicious"),
        (2.5, (1, 2), "failed"),
        (2.5, (1, None), "suspicious"),
        (math.nan, (1, 2), "failed"),
        (math.nan, (1, None), "suspicious"),
    ],
)
def test_verdicts(check, value, limits, verdict):
    finding = check.Finding("one")
    finding.expect("figure", value, limits)
    assert finding.verdict == verdict and bool(finding.reasons) == (verdict != "ok")


def test_what_breaks_is_a_finding_and_the_next_one_is_made(check, monkeypatch, capsys):
    def out_of_memory(finding):
        finding.figures["before"] = 1
        raise torch.OutOfMemoryError("no room for it")

    def checks(world):
        yield "broken", out_of_memory
        yield "good", lambda finding: finding.expect("figure", 1.0, (2, 3))

    monkeypatch.setattr(check, "all_checks", checks)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tiny"])
    assert check.main() == 1
    findings, table = findings_of(capsys.readouterr().out)
    assert [found["verdict"] for found in findings.values()] == ["failed", "ok"]
    assert findings["broken"]["figures"]["before"] == 1 and "no room for it" in findings["broken"]["reasons"][0]
    assert "no room for it" in table
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--tiny", "--minutes", "0"])
    assert check.main() == 0
    findings, _ = findings_of(capsys.readouterr().out)
    assert [found["verdict"] for found in findings.values()] == ["skipped", "skipped"]
    assert "no time left" in findings["good"]["reasons"][0]
