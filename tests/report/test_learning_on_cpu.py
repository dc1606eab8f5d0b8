"""The learning curve of a run beside its twin's, over seeds."""

import json

import pytest

from rredcot_verl.report import load_run, render, summarise
from rredcot_verl.report.__main__ import main
from rredcot_verl.report.learning import Twins
from rredcot_verl.report.seeds import t_interval

from .fake_run import write_metrics, write_run

ENDS = {"run": (0.75, 0.5, 0.625), "grpo": (0.5, 0.375, 0.5)}


@pytest.fixture
def folders(tmp_path):
    """Three seeds of each; the last one of the run has no validation at step 2."""
    found = {}
    for name, ends in ENDS.items():
        found[name] = [tmp_path / f"{name}{seed}" for seed in range(3)]
        for seed, (folder, end) in enumerate(zip(found[name], ends, strict=True)):
            points = {0: 0.25, 2: 0.375, 4: end}
            if name == "run" and seed == 0:
                write_run(folder)
            else:
                write_metrics(folder, {0: 0.25, 4: end} if (name, seed) == ("run", 2) else points)
    return found


def _twins(folders):
    runs, baselines = ([load_run(folder, with_traces=False) for folder in folders[name]] for name in ENDS)
    return runs[0], baselines[0], Twins(tuple(runs[1:]), tuple(baselines[1:]))


def test_summary_has_intervals_over_seeds(folders):
    run, baseline, twins = _twins(folders)
    found = summarise(run, baseline, twins=twins)["over_seeds"]
    assert found["run"] == t_interval(ENDS["run"]) and found["baseline"] == t_interval(ENDS["grpo"])
    assert found["difference"] == t_interval([0.25, 0.125, 0.125])
    assert found["area_difference"] == t_interval([0.125, 0.0625, 0.0625]), "over steps 0 and 4, which all have"


def test_unequal_numbers_of_seeds_are_not_paired(folders):
    run, baseline, twins = _twins(folders)
    found = summarise(run, baseline, twins=Twins(twins.runs, twins.baselines[1:]))["over_seeds"]
    assert (found["run"]["num"], found["baseline"]["num"], found["difference"]) == (3, 2, None)
    assert summarise(run, baseline)["over_seeds"] is None


def test_curves_are_means_over_the_steps_that_all_have(folders):
    run, baseline, twins = _twins(folders)
    page = render(run, baseline, twins=twins)
    # Validation and training reward, each with its twin.
    assert page.count('class="band run"') == page.count('class="band baseline"') == 2
    assert "<td>4</td><td>0.6250</td>" in page and "<td>2</td><td>0.3750</td>" in page
    assert page.count("<td>2</td><td>0.3750</td>") == 1, "GRPO has step 2, one of the runs has not"
    assert "paired in the order given" in page and "one run with one seed" not in page
    assert 'class="band' not in render(run, baseline)


def test_command_line_takes_several_folders_on_either_side(folders, tmp_path):
    summary = tmp_path / "summary.json"
    arguments = [*folders["run"], "--baseline", *folders["grpo"], "--out", tmp_path / "page.html"]
    assert main([str(argument) for argument in [*arguments, "--summary", summary]]) == 0
    found = json.loads(summary.read_text())
    assert found["run"] == str(folders["run"][0]) and found["over_seeds"]["difference"]["num"] == 3
    assert found["num_traces"] == 6, "the traces are those of the first run"
