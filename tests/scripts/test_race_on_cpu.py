"""The series of a race: what runs, what runs again, and what is left when it is stopped. The runs are stand-ins."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rredcot_verl.report.race_results import read
from rredcot_verl.run.settings import active_settings
from tests import PATIENCE_S

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "race.py"
_SPEC = importlib.util.spec_from_file_location("race", SCRIPT)
race = importlib.util.module_from_spec(_SPEC)
sys.modules["race"] = race
_SPEC.loader.exec_module(race)

# Logs as many steps as it was told, says what it saw, and fails where the file FAIL stands beside its data.
STAND_IN = """
import json, os, pathlib, sys, time
run, arguments = pathlib.Path(sys.argv[1]), dict(part.split("=", 1) for part in sys.argv[2:] if "=" in part)
data = pathlib.Path(os.environ["TOY_DATA"])
with (data.parent / "seen").open("a") as seen:
    seen.write(json.dumps([arguments, os.environ["OMP_NUM_THREADS"], os.environ["TOY_RUN"] == str(run)]) + "\\n")
(data.parent / f"running-{os.getpid()}").touch()
time.sleep(float(arguments.get("sleep", 0.3)))
print("the last words of a run", flush=True)
if (data.parent / f"FAIL-{arguments['data.seed']}-{arguments['arm']}").exists():
    sys.exit("it broke")
config = run / "hydra" / ".hydra"
config.mkdir(parents=True)
(config / "config.yaml").write_text(
    "data: {train_batch_size: 4, val_max_samples: 8}\\n"
    "actor_rollout_ref: {rollout: {n: 2, val_kwargs: {n: 3}}}\\n"
)
rows = [{"step": 0, "data": {"val-core/toy/acc/mean@3": 0.5}}]
for step in range(1, int(arguments["trainer.total_training_steps"]) + 1):
    rows.append({"step": step, "data": {"critic/score/mean": 0.5, "timing_s/step": 1.0, "response_length/mean": 5.0}})
(run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
most = len(list(data.parent.glob("running-*")))
(data.parent / f"running-{os.getpid()}").unlink()
with (data.parent / "most").open("a") as file:
    file.write(f"{most}\\n")
"""
TASK = {
    "config_path": "recipes/toy",
    "config": "toy",
    "data_variable": "TOY_DATA",
    "run_variable": "TOY_RUN",
    "prepare": ["sh -c 'echo {data} >> {data}/../prepared; mkdir {data}/model; echo m > {data}/model/a.safetensors'"],
    "overrides": ["common=1"],
    "steps": 3,
}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A plan, and the stand-in in the place of train_on_cpu.sh."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump({"tasks": {"toy": TASK}, "arms": {"a": ["arm=a"], "b": ["arm=b"]}, "seeds": [0, 1]}))
    command_of = race.command_of

    def stand_in(job, folder):
        return [sys.executable, str(tmp_path / "stand_in.py"), *command_of(job, folder)[1:]]

    monkeypatch.setattr(race, "command_of", stand_in)
    monkeypatch.setattr(race, "POLL_SECONDS", 0.02)
    return tmp_path


def run(world, *options):
    arguments = ["run", str(world / "plan.yaml"), "--results", str(world / "results" / "r.jsonl")]
    return race.main([*arguments, "--work", str(world / "work"), *options])


def results(world):
    return read([world / "results" / "r.jsonl"])


def seen(world):
    return [json.loads(line) for line in (world / "work" / "data" / "seen").read_text().splitlines()]


class TestSeries:
    def test_every_run_is_a_line(self, world):
        handler = signal.getsignal(signal.SIGTERM)
        assert run(world) == 0 and signal.getsignal(signal.SIGTERM) == handler
        found = results(world)
        assert {(one.arm, one.seed, one.num_steps) for one in found} == {(a, s, 3) for a in "ab" for s in (0, 1)}
        line = found[0].line
        assert line["overrides"] == ["common=1", f"arm={found[0].arm}"] and len(line["start"]) == 12
        assert line["totals"] == {"seconds": 3.0, "tokens": 120, "samples": 24}
        assert line["validation"]["num_responses"] == 24 and len(line["commit"]) == 40
        assert not list((world / "work" / "runs").iterdir()), "what a finished run wrote is not kept"
        most = [int(number) for number in (world / "work" / "data" / "most").read_text().split()]
        assert max(most) == 2

    def test_modules_are_looked_for_here_first_and_where_the_caller_says(self, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", "/theirs")
        assert race._environment()["PYTHONPATH"] == f"{ROOT}:/theirs"
        monkeypatch.delenv("PYTHONPATH")
        assert race._environment()["PYTHONPATH"] == str(ROOT)

    def test_seeds_steps_and_threads_reach_the_runs(self, world):
        assert run(world, "--seeds", "7", "--arms", "b", "--steps", "2", "--set", "lr=1", "lr=2") == 0
        ((arguments, threads, is_own_folder),) = seen(world)
        assert {arguments[key] for key in race.SEEDED} == {"7"} and len(race.SEEDED) == 3
        assert (arguments["trainer.total_training_steps"], arguments["lr"]) == ("2", "2")
        assert (threads, is_own_folder) == ("1", True)

    def test_data_and_model_are_made_once(self, world):
        assert run(world) == run(world, "--set", "more=1") == 0
        assert len((world / "work" / "data" / "prepared").read_text().split()) == 1
        assert {one.line["start"] for one in results(world)} == {results(world)[0].line["start"]}

    def test_a_plan_may_ask_for_a_model_a_seed(self, world):
        plan = yaml.safe_load((world / "plan.yaml").read_text())
        plan["tasks"]["toy"]["prepare"][0] += " # {seed}"
        (world / "plan.yaml").write_text(yaml.safe_dump(plan))
        assert run(world) == 0
        assert len(set((world / "work" / "data" / "prepared").read_text().split())) == 2

    def test_only_what_is_missing_runs_again(self, world):
        assert run(world, "--seeds", "0") == 0
        assert run(world) == 0 and len(seen(world)) == 4
        assert run(world) == 0 and len(seen(world)) == 4
        # Other steps and other overrides are other runs.
        assert run(world, "--steps", "2", "--seeds", "0") == 0 and len(seen(world)) == 6
        assert run(world, "--set", "lr=1", "--seeds", "0") == 0 and len(seen(world)) == 8
        assert len(results(world)) == 8

    def test_a_failed_run_stops_nothing_and_is_tried_again(self, world, caplog):
        (world / "work" / "data").mkdir(parents=True)
        fail = world / "work" / "data" / "FAIL-0-a"
        fail.touch()
        assert run(world) == 1
        assert {(one.arm, one.seed) for one in results(world)} == {("b", 0), ("a", 1), ("b", 1)}
        assert "toy-a-seed0" in caplog.text and "the last words of a run\nit broke" in caplog.text
        fail.unlink()
        assert run(world) == 0 and len(results(world)) == 4 and len(seen(world)) == 5

    def test_a_preparation_that_fails_is_told(self, world, caplog):
        plan = yaml.safe_load((world / "plan.yaml").read_text())
        plan["tasks"]["toy"]["prepare"] = ["sh -c 'echo no model today; exit 3'"]
        (world / "plan.yaml").write_text(yaml.safe_dump(plan))
        assert run(world, "--seeds", "0", "--arms", "a") == 1
        assert "exit 3" in caplog.text and "no model today" in caplog.text

    def test_a_run_without_end_is_ended(self, world, caplog):
        assert run(world, "--seeds", "0", "--arms", "a", "--limit", "0.02", "--set", "sleep=60") == 1
        assert "no end after 1 s" in caplog.text and not (world / "results").exists()


def test_ended_from_outside_it_ends_its_runs(world):
    program = f"""
import sys; sys.argv[0] = "race"
import importlib.util
spec = importlib.util.spec_from_file_location("race", {str(SCRIPT)!r})
race = importlib.util.module_from_spec(spec); sys.modules["race"] = race; spec.loader.exec_module(race)
of = race.command_of
race.command_of = lambda job, folder: [sys.executable, {str(world / "stand_in.py")!r}, *of(job, folder)[1:]]
sys.exit(race.main(sys.argv[1:]))
"""
    arguments = ["run", str(world / "plan.yaml"), "--results", str(world / "r.jsonl"), "--work", str(world / "work")]
    command = [sys.executable, "-c", program, *arguments, "--set", "sleep=600"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    data = world / "work" / "data"
    deadline = time.monotonic() + PATIENCE_S
    while len(list(data.glob("running-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = [int(file.name.partition("-")[2]) for file in data.glob("running-*")]
    assert len(pids) == 2
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


class TestPlan:
    def test_seeds_come_first(self, world):
        options = race.build_parser().parse_args(["run", str(world / "plan.yaml"), "--results", "r"])
        jobs = race.jobs_of(world / "plan.yaml", options)
        assert [(job.seed, job.arm) for job in jobs] == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
        assert len({job.key for job in jobs}) == 4 and jobs[0].digest == jobs[2].digest != jobs[1].digest

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda plan: plan.pop("seeds"), ["needed", "seeds"]),
            (lambda plan: plan["tasks"]["toy"].update(step=3), ["tasks.toy", "'step'"]),
            (lambda plan: plan["tasks"]["toy"].pop("prepare"), ["tasks.toy", "prepare"]),
        ],
    )
    def test_mistakes_are_named(self, world, capsys, change, words):
        plan = yaml.safe_load((world / "plan.yaml").read_text())
        change(plan)
        (world / "plan.yaml").write_text(yaml.safe_dump(plan))
        assert run(world) == 2
        error = capsys.readouterr().err
        assert all(word in error for word in words), error

    def test_unknown_arm(self, world, capsys):
        assert run(world, "--arms", "c") == 2
        assert "no arm 'c'; there is a, b" in capsys.readouterr().err


def test_page_table_and_chart_of_the_chosen_arms(tmp_path, capsys):
    rows = [
        {"task": "toy", "arm": arm, "seed": seed, "steps": 2, "digest": arm, "overrides": [], "num_epochs": 1}
        | {"start": "", "commit": "abc", "dirty": False, "machine": {}, "samples_per_step": 4, "totals": {}}
        | {"series": {"step": [1, 2], "reward": [0.1 * seed, 0.2]}, "validation": {"step": [], "accuracy": []}}
        for arm in ("grpo", "left_out", "chosen")
        for seed in (0, 1)
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {name: tmp_path / name for name in ("out", "table", "chart")}
    command = ["report", str(tmp_path / "r.jsonl"), "--baseline", "grpo"]
    command += [word for name, file in files.items() for word in (f"--{name}", str(file))]
    assert race.main([*command, "--arms", "grpo", "chosen"]) == 0
    for file in files.values():
        text = file.read_text()
        assert "chosen" in text and "left_out" not in text
    assert ElementTree.parse(files["chart"]).getroot().tag.endswith("svg")
    assert race.main([*command, "--tasks", "words"]) == 2
    assert "no task 'words'; there is toy" in capsys.readouterr().err


@pytest.mark.parametrize("plan", sorted((ROOT / "recipes" / "race").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_plans_compose(plan, monkeypatch, tmp_path):
    options = race.build_parser().parse_args(["run", str(plan), "--results", "r", "--seeds", "3"])
    jobs = race.jobs_of(plan, options)
    for task in {job.task for job in jobs}:
        for variable in (task.data_variable, task.run_variable):
            monkeypatch.setenv(variable, str(tmp_path))
        shared = race.Job(task, "", 3, task.overrides)
        with initialize_config_dir(str(ROOT / task.config_path), version_base=None):
            config = compose(task.config, overrides=race.command_of(shared, tmp_path)[6:])
        assert config.data.seed == config.actor_rollout_ref.rollout.seed == 3
        # Composed once, because it takes seconds; an unknown key is refused here as it is there.
        for job in (job for job in jobs if job.task == task):
            own = OmegaConf.from_dotlist(list(job.overrides[len(task.overrides) :]))
            active_settings(OmegaConf.merge(config, own))
    assert any(job.arm == "grpo" for job in jobs)
