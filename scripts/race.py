"""Series of real training runs on a CPU machine, and what they show: task x arm x seed, resumable.

    python scripts/race.py run recipes/race/quickstart.yaml --results docs/results/race/quickstart.jsonl
    python scripts/race.py report docs/results/race/quickstart.jsonl --out race.html --table race.md

A plan (see recipes/race/quickstart.yaml) says how a task's data and model are made, once for all its runs, and which
Hydra overrides make an arm. The seed of a run decides the order of the problems, of the updates and the sampling, so
that all arms of a seed see the same problems in the same order. Every finished run is a line of the results; a run
that is there already is not run again, one that failed is tried again next time.
"""

import argparse
import fcntl
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rredcot_verl.report import race_results  # noqa: E402
from rredcot_verl.report.files import ReportError  # noqa: E402
from rredcot_verl.report.race import BASELINE, compare  # noqa: E402
from rredcot_verl.report.race_page import chart, render, table  # noqa: E402

logger = logging.getLogger("race")

SEEDED = ("data.seed", "actor_rollout_ref.rollout.seed", "actor_rollout_ref.actor.data_loader_seed")
SOURCES = ("rredcot_verl", "recipes", "scripts")
SIZES = (
    "data.train_batch_size",
    "data.val_max_samples",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.val_kwargs.n",
)
TAIL_LINES = 25
POLL_SECONDS = 1.0
# train_on_cpu.sh gives its processes 30 s to end by themselves.
END_SECONDS = 60.0
ENDING = (signal.SIGTERM, signal.SIGINT)
TASK_KEYS = {"config_path", "config", "data_variable", "run_variable", "prepare", "overrides", "steps"}


@dataclass(frozen=True)
class Task:
    """What is learnt.

    Attributes:
        name: Its name in the results.
        config_path: Folder of the recipe, relative to the repository.
        config: Name of the config in it.
        data_variable: Environment variable by which the config knows the folder of data and model.
        run_variable: Environment variable by which the config knows the folder of a run.
        prepare: Commands that make data and model in ``{data}``; one that names ``{seed}`` makes them anew for each.
        overrides: Hydra overrides of all arms.
        steps: Optimiser steps of a run.
    """

    name: str
    config_path: str
    config: str
    data_variable: str
    run_variable: str
    prepare: tuple[str, ...]
    overrides: tuple[str, ...]
    steps: int

    def data_name(self, seed: int) -> str:
        """Name of the folder of data and model that a run of this seed takes."""
        commands = [command.format(data="{data}", seed=seed) for command in self.prepare]
        return f"{self.name}-{digest(commands)[:8]}"


@dataclass(frozen=True)
class Job:
    """One run of the series; ``overrides`` are all but those of seed, steps and folders."""

    task: Task
    arm: str
    seed: int
    overrides: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Hash of what the run is, apart from seed and steps."""
        return digest([self.task.config_path, self.task.config, self.task.prepare, self.overrides])[:12]

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it the same run as one in the results."""
        return self.task.name, self.arm, self.digest, self.seed, self.task.steps

    @property
    def name(self) -> str:
        """For folders and messages."""
        return f"{self.task.name}-{self.arm}-seed{self.seed}-{self.digest[:6]}"


@dataclass(frozen=True)
class Running:
    """A job that runs: its process, the leader of a group of its own, and when it started (monotonic seconds)."""

    job: Job
    process: subprocess.Popen[bytes]
    folder: Path
    data: Path
    started: float


def digest(content: Any) -> str:
    """Hash of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_plan(file: Path, steps: int | None = None) -> tuple[list[Task], dict[str, tuple[str, ...]], list[int]]:
    """The tasks, the arms (name to overrides) and the seeds of a plan.

    Raises:
        ValueError: A key is missing or unknown.
    """
    plan = yaml.safe_load(file.read_text(encoding="utf-8"))
    _check_keys(f"{file}", plan, {"tasks", "arms", "seeds"}, {"tasks", "arms", "seeds"})
    tasks = []
    for name, entry in plan["tasks"].items():
        _check_keys(f"{file}: tasks.{name}", entry, TASK_KEYS, TASK_KEYS - {"overrides"})
        prepare, overrides = tuple(entry["prepare"]), tuple(entry.get("overrides") or ())
        texts = (entry[key] for key in ("config_path", "config", "data_variable", "run_variable"))
        tasks.append(Task(name, *texts, prepare, overrides, steps or entry["steps"]))
    return tasks, {name: tuple(overrides or ()) for name, overrides in plan["arms"].items()}, list(plan["seeds"])


def jobs_of(plan: Path, options: argparse.Namespace) -> list[Job]:
    """The runs asked for, seed by seed, so that a series that is cut off has all arms of the first seeds."""
    tasks, arms, seeds = read_plan(plan, options.steps)
    chosen_tasks = _choose("task", {task.name: task for task in tasks}, options.tasks)
    chosen_arms = _choose("arm", arms, options.arms)
    return [
        Job(task, arm, seed, (*task.overrides, *overrides, *options.set))
        for seed in (seeds if options.seeds is None else options.seeds)
        for task in chosen_tasks.values()
        for arm, overrides in chosen_arms.items()
    ]


def run_series(jobs: Sequence[Job], results: Path, work: Path, num_jobs: int, limit: float) -> int:
    """Runs what the results do not hold yet.

    Args:
        jobs: The series, in order.
        results: File of JSON lines.
        work: Folder of data, models and runs.
        num_jobs: Most runs at a time.
        limit: Seconds after which a run counts as failed.

    Returns:
        Number of runs that failed.
    """
    finished = {result.key for result in race_results.read([results])} if results.exists() else set()
    waiting = [job for job in jobs if job.key not in finished]
    logger.info("%d runs, %d of them finished before", len(jobs), len(jobs) - len(waiting))
    running: list[Running] = []
    num_failed = num_done = 0
    begun = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < num_jobs:
                job = waiting.pop(0)
                data = prepare(job.task, job.seed, work)
                if data is None:
                    num_failed += 1
                    continue
                # Or a run that was just started would be forgotten, and go on.
                with _uninterrupted():
                    running.append(_start(job, work, data))
            time.sleep(POLL_SECONDS)
            for run in running[:]:
                is_late = time.monotonic() - run.started > limit
                if run.process.poll() is None and not is_late:
                    continue
                _end(run.process)
                running.remove(run)
                if is_late or run.process.returncode or not _finish(run, results):
                    num_failed += 1
                    _tell_failure(run, f"no end after {limit:.0f} s" if is_late else f"exit {run.process.returncode}")
                else:
                    num_done += 1
                    left = (time.monotonic() - begun) / num_done * (len(waiting) + len(running))
                    logger.info("%d runs left, about %.0f minutes", len(waiting) + len(running), left / 60)
    finally:
        for run in running:
            run.process.terminate()
        for run in running:
            _end(run.process)
    return num_failed


def prepare(task: Task, seed: int, work: Path) -> Path | None:
    """The folder of a task's data and model, made unless it is finished; none where a command failed."""
    folder = work / "data" / task.data_name(seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent):
        # Written last, so that what was cut off never counts as finished.
        if (folder / "prepared").exists():
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for command in task.prepare:
            words = shlex.split(command.format(data=shlex.quote(str(folder)), seed=seed))
            logger.info("%s: %s", task.name, shlex.join(words))
            with (folder / "prepare.log").open("ab") as log:
                done = subprocess.run(words, cwd=ROOT, env=_environment(), stdout=log, stderr=log, check=False)
            if done.returncode:
                logger.error("%s failed (exit %d)\n%s", words[:3], done.returncode, _tail(folder / "prepare.log"))
                return None
        (folder / "prepared").touch()
    return folder


def command_of(job: Job, folder: Path) -> list[str]:
    """The command of a run: `scripts/train_on_cpu.sh`, with a Ray cluster of its own."""
    return [
        *("scripts/train_on_cpu.sh", str(folder), "--config-path", str(ROOT / job.task.config_path)),
        *("--config-name", job.task.config, f"trainer.total_training_steps={job.task.steps}"),
        *(f"{key}={job.seed}" for key in SEEDED),
        *job.overrides,
    ]


def append(results: Path, line: dict[str, Any]) -> None:
    """Adds a line to the results: the file is replaced as a whole, so it holds the line or does not."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with _locked(results.parent):
        text = results.read_text(encoding="utf-8") if results.exists() else ""
        unfinished = results.with_name(f".{results.name}.{os.getpid()}")
        unfinished.write_text(text + json.dumps(line, separators=(",", ":")) + "\n", encoding="utf-8")
        unfinished.replace(results)


def _start(job: Job, work: Path, data: Path) -> Running:
    folder = work / "runs" / job.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    own = {job.task.data_variable: str(data), job.task.run_variable: str(folder)}
    with (folder / "launch.log").open("wb") as log:
        process = subprocess.Popen(
            command_of(job, folder),
            cwd=ROOT,
            env=_environment() | own,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING),
        )
    logger.info("started %s", job.name)
    return Running(job, process, folder, data, time.monotonic())


def _finish(run: Running, results: Path) -> bool:
    """Appends a run that trained for all its steps, and removes its folder."""
    job, task = run.job, run.job.task
    start = next((run.data / "model").glob("*.safetensors"), None)
    head = {"task": task.name, "arm": job.arm, "seed": job.seed, "steps": task.steps, "digest": job.digest}
    about = {
        "overrides": list(job.overrides),
        "start": hashlib.sha256(start.read_bytes()).hexdigest()[:12] if start else None,
        **_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "torch": version("torch")},
        "wall_seconds": round(time.monotonic() - run.started, 1),
    }
    config = OmegaConf.load(run.folder / "hydra" / ".hydra" / "config.yaml")
    size, val_size, samples, val_samples = (OmegaConf.select(config, key) for key in SIZES)
    num_validated = val_size * val_samples if val_size > 0 else None
    try:
        measured = race_results.measure(run.folder, size * samples, num_validated)
    except ReportError as error:
        logger.error("%s", error)
        return False
    if not measured["series"]["step"] or measured["series"]["step"][-1] != task.steps:
        logger.error("%s ended after %s of %d steps", job.name, measured["series"]["step"][-1:], task.steps)
        return False
    append(results, {**head, **about, **measured})
    rewards = measured["series"]["reward"]
    logger.info(
        "finished %s: training reward %.3f -> %.3f, validation %s, %.0f s",
        *(job.name, rewards[0], rewards[-1], measured["validation"]["accuracy"], about["wall_seconds"]),
    )
    shutil.rmtree(run.folder)
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a run and what it started; the script's own clean-up goes first."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _tell_failure(run: Running, why: str) -> None:
    log = next(file for name in ("train.log", "launch.log") if (file := run.folder / name).exists())
    logger.error("%s failed (%s); its folder stays: %s\n%s", run.job.name, why, run.folder, _tail(log))


def _tail(file: Path) -> str:
    return "\n".join(file.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    modules = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    own = {"PATH": path, "PYTHONPATH": modules, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return {**os.environ, **own}


def _commit() -> dict[str, Any]:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", *SOURCES))}


def _check_keys(where: str, entry: Any, allowed: set[str], needed: set[str]) -> None:
    if not isinstance(entry, dict) or set(entry) - allowed or needed - set(entry):
        found = sorted(entry) if isinstance(entry, dict) else entry
        raise ValueError(f"{where}: has {found}; needed: {sorted(needed)}, allowed: {sorted(allowed)}")


def _choose(kind: str, known: dict[str, Any], wanted: Sequence[str] | None) -> dict[str, Any]:
    for name in wanted or ():
        if name not in known:
            raise ValueError(f"no {kind} {name!r}; there is {', '.join(known)}")
    return known if wanted is None else {name: known[name] for name in wanted}


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals that end the series wait until it is left."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Held by one process at a time; the system lets it go when the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Series of training runs on a CPU machine, and what they show.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = (run := commands.add_parser("run", help="run what the results do not hold yet")).add_argument
    add("plan", type=Path, help="YAML; see recipes/race/quickstart.yaml")
    add("--results", type=Path, required=True, help="file of JSON lines, one a finished run")
    add("--tasks", nargs="+", help="of the plan (default: all)")
    add("--arms", nargs="+", help="of the plan (default: all)")
    add("--seeds", nargs="+", type=int, help="instead of the plan's")
    add("--steps", type=int, help="optimiser steps, instead of the plan's")
    add("--set", nargs="+", default=[], metavar="OVERRIDE", help="Hydra overrides of all arms, the last word")
    add("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    add(
        "--work", type=Path, default=ROOT / "runs" / "race", help="folder of data, models and runs (default: runs/race)"
    )
    add("--limit", type=float, default=180.0, help="minutes after which a run has failed (default: 180)")
    add("--list", action="store_true", help="list the runs and stop")
    run.set_defaults(function=_run)
    add = (report := commands.add_parser("report", help="page and table of finished runs")).add_argument
    add("results", type=Path, nargs="+", help="files of results")
    add("--out", type=Path, required=True, help="the page")
    add("--table", type=Path, help="the figures as a Markdown table (default: not written)")
    add("--chart", type=Path, help="the learning curves as an SVG file (default: not written)")
    add("--tasks", nargs="+", help="of the results (default: all)")
    add("--arms", nargs="+", help="of the results, the baseline too (default: all)")
    add("--baseline", default=BASELINE, help=f"the arm that others are compared with (default: {BASELINE})")
    add("--levels", type=float, nargs="+", default=[], help="accuracies to reach, besides those of the baseline's gain")
    text = "the learning curve; by default training where no problem came twice, else validation"
    add("--curve", choices=("training", "validation"), help=text)
    add("--title", default="Race", help="heading of the page")
    report.set_defaults(function=_report)
    return parser


def _run(options: argparse.Namespace) -> int:
    jobs = jobs_of(options.plan, options)
    if options.list:
        sys.stdout.writelines(f"{job.name} {job.task.steps} steps: {' '.join(job.overrides)}\n" for job in jobs)
        return 0
    # Asked to end, it ends its runs too.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return min(run_series(jobs, options.results, options.work.resolve(), options.jobs, 60 * options.limit), 1)
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(options: argparse.Namespace) -> int:
    results = race_results.read(options.results)
    tasks, arms = ({name: name for name in {getattr(run, kind) for run in results}} for kind in ("task", "arm"))
    chosen_tasks, chosen_arms = _choose("task", tasks, options.tasks), _choose("arm", arms, options.arms)
    results = [run for run in results if run.task in chosen_tasks and run.arm in chosen_arms]
    comparisons = compare(results, options.baseline, options.levels, options.curve)
    options.out.write_text(render(comparisons, options.title), encoding="utf-8")
    for file, made in ((options.table, table), (options.chart, chart)):
        if file is not None:
            file.write_text(made(comparisons), encoding="utf-8")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    options = build_parser().parse_args(arguments)
    try:
        return int(options.function(options))
    except (ReportError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
