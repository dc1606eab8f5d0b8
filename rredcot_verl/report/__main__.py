"""``python -m rredcot_verl.report RUN``: writes the report of a training run, and prompts chosen by it."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from rredcot_verl.report.data import Run, load_run
from rredcot_verl.report.export import choose_prompts, export
from rredcot_verl.report.files import ReportError
from rredcot_verl.report.learning import Twins
from rredcot_verl.report.line_checker import load_line_checker
from rredcot_verl.report.page import DEFAULT_TITLE, PER_KIND, render
from rredcot_verl.report.prompts import Prompt, prompts_of
from rredcot_verl.report.rules import NAMES, Rule, parse_rule
from rredcot_verl.report.run_files import RunFiles
from rredcot_verl.report.summary import summarise
from rredcot_verl.report.thresholds import Thresholds
from rredcot_verl.report.trace import SOLVED_AT


def build_parser() -> argparse.ArgumentParser:
    """The command line of the report."""
    parser = argparse.ArgumentParser(
        prog="python -m rredcot_verl.report",
        description="Writes the report of a training run: one self-contained HTML page, and its figures as JSON. Takes "
        "what there is: metrics, credited traces, verl's own dumps of rollouts and validation.",
    )
    add = parser.add_argument
    text = "folder of the run; its files are found below it. More of them: the same with other seeds, for the curves"
    add("run", type=Path, nargs="+", help=text)
    add("--metrics", type=Path, metavar="FILE", help="file of verl's 'file' logger")
    add("--traces", type=Path, metavar="DIR", help="credited traces (algorithm.rredcot.traces.dir)")
    add("--rollouts", type=Path, metavar="DIR", help="verl's dumps (trainer.rollout_data_dir)")
    add("--validation", type=Path, metavar="DIR", help="verl's dumps (trainer.validation_data_dir)")
    text = "steps of the traces and rollouts to read (default: all)"
    add("--steps", type=_steps, metavar="FIRST-LAST", help=text)
    text = "folder of the paired GRPO run (metrics.jsonl); more of them: with other seeds, in the order of the runs"
    add("--baseline", type=Path, nargs="+", metavar="RUN", help=text)
    add("--line-checker", metavar="MODULE:FUNCTION", help="judges the lines of a response")
    add("--title", default=DEFAULT_TITLE, help="heading of the page")
    add("--seed", type=int, default=0, help="draws the traces shown at random (default: 0)")
    text = f"worst blamed, best credited and most surprising traces shown of each (default: {PER_KIND})"
    add("--per-kind", type=int, default=PER_KIND, metavar="N", help=text)
    text = f"lowest reward of a solved response (default: {SOLVED_AT}); 1 for rewards that are fractions of tests"
    add("--solved-at", type=float, default=SOLVED_AT, metavar="REWARD", help=text)
    add("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    add("--summary", type=Path, metavar="FILE", help="the figures as JSON (default: not written)")
    add = parser.add_argument_group("lists of prompts").add_argument
    for field in fields(Thresholds):
        name, text = f"--{field.name.replace('_', '-')}", f"{field.metadata['help']} (default: {field.default})"
        add(name, type=type(field.default), default=field.default, metavar="N", help=text)
    add = parser.add_argument_group("prompts as a parquet file").add_argument
    add("--export-filtered", type=Path, metavar="FILE", help="write the prompts that --keep chooses")
    text = f"e.g. guessing, or '0.1 < mean_reward < 0.9'; it may name {', '.join(NAMES)}"
    add("--keep", metavar="RULE", help=text)
    add("--data", type=Path, metavar="PARQUET", help="training data: its rows are written, unchanged")
    text = "find the rows by the last user message (default) or by extra_info.index"
    add("--match-by", choices=("prompt", "index"), default="prompt", help=text)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 1 where the run cannot be reported on."""
    options = build_parser().parse_args(arguments)
    thresholds = Thresholds(**{field.name: getattr(options, field.name) for field in fields(Thresholds)})
    try:
        rule = parse_rule(options.keep) if options.keep is not None else None
        if (rule is None) != (options.export_filtered is None):
            raise ReportError("--export-filtered and --keep belong together: the file, and the rule that chooses")
        line_checker = load_line_checker(options.line_checker) if options.line_checker else None
        run, baseline, twins = _load(options)
        prompts = prompts_of(run, thresholds, options.seed)
        summary = summarise(run, baseline, line_checker, thresholds=thresholds, prompts=prompts, twins=twins)
        page = render(
            run,
            baseline,
            line_checker,
            title=options.title,
            seed=options.seed,
            summary=summary,
            thresholds=thresholds,
            prompts=prompts,
            per_kind=options.per_kind,
            twins=twins,
        )
        _write(options.out, page)
        if options.summary is not None:
            _write(options.summary, json.dumps(summary, indent=2) + "\n")
        if rule is not None:
            _export(options, rule, prompts, thresholds)
    except ReportError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _load(options: argparse.Namespace) -> tuple[Run, Run | None, Twins]:
    given = RunFiles(options.metrics, options.traces, options.rollouts, options.validation)
    run = load_run(options.run[0], solved_at=options.solved_at, given=given, steps=options.steps)
    # Their dumps are worth reading only where the metrics have no validation to compare.
    runs, baselines = (
        [
            load_run(folder, with_traces=run.validation_metric is None, validation_metric=run.validation_metric)
            for folder in folders
        ]
        for folders in (options.run[1:], options.baseline or ())
    )
    return run, baselines[0] if baselines else None, Twins(tuple(runs), tuple(baselines[1:]))


def _export(options: argparse.Namespace, rule: Rule, prompts: Sequence[Prompt], thresholds: Thresholds) -> None:
    file = options.export_filtered
    kept, num_unknown = choose_prompts(prompts, rule, thresholds)
    done = export(file, kept, thresholds, options.data, by=options.match_by)
    text = f"wrote {file}: {done.num_rows:,} rows; the rule keeps {len(kept):,} of {len(prompts):,} prompts"
    if num_unknown:
        text += f", {num_unknown:,} lack a figure it names"
    if options.data is not None:
        text += f"; {len(done.unmatched):,} of those kept are not in {options.data}, whose rows that the run never saw "
        text += "are left out"
        text += "".join(f"\n  not found: {prompt[-100:]!r}" for prompt in done.unmatched[:3])
    sys.stdout.write(text + "\n")


def _steps(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (last if dash else first).isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIRST-LAST, for example 100-200, or one step")
    return int(first), int(last if dash else first)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    sys.stdout.write(f"wrote {file}\n")


if __name__ == "__main__":
    sys.exit(main())
