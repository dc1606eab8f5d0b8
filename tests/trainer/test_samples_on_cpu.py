"""Samples of credited responses: which rows of a batch they are, and how each tracker gets them."""

import json
import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from rredcot_verl.config.blocks import TracesConfig
from rredcot_verl.core.credit import Credit
from rredcot_verl.core.redistribution import SegmentBatch
from rredcot_verl.report.sample_formats import COLUMNS
from rredcot_verl.report.trace import read_trace
from rredcot_verl.sources.record import Record, Status
from rredcot_verl.trainer.samples import HTML_KEY, MOST_FAILURES, TABLE_KEY, log_samples
from rredcot_verl.trainer.traces import CreditedRows, informative_rows, trace_lines, write_traces
from tests.sources.world import World, source_of

BOUNDARIES = [[0, 2, 4], [0, 1, 4], [], []]
VALUES = [[0.5, 0.75], [0.5, 0.25], [], []]
KEYS = ["b_0_0", "a_0_0", "c_0_0", "pad_0_0"]
# A fall, a rise, one that was not scored, and one without a record.
RECORDS = [
    Record(Status.SCORED, BOUNDARIES[0]),
    Record(Status.SCORED, BOUNDARIES[1]),
    Record(Status.UNIFORM_GROUP),
    None,
]


class Tokenizer:
    """One character a token."""

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(int(token)) for token in ids)


@pytest.fixture
def world(monkeypatch):
    return World(
        monkeypatch,
        RECORDS,
        KEYS,
        rewards=[0.0, 1.0, 1.0, 1.0],
        prompts=[[112, 63]] * 4,
        responses=[[ord(character) for character in f"r{key[0]}\nx"] for key in KEYS],
        reward_model=[{"ground_truth": 2}] * 4,
        raw_prompt=[({"role": "user", "content": f"Question {key}?"},) for key in KEYS],
        extra_info=[{"index": 7}, {}, {}, {}],
    )


def credited(world, source="rredcot") -> CreditedRows:
    rows = world.rows()
    segments = SegmentBatch.from_rows(BOUNDARIES, VALUES, rows.outcomes, [4] * 4)
    credit = Credit(torch.tensor([-1.0, 1, 1, 1]), torch.ones(4, 2), torch.ones(4, 2))
    world.queue.reads.clear()
    return CreditedRows(rows, segments, credit, torch.zeros(4), "actor", source_of(source), (-1.0, 1.0))


def lines_of(world, chosen, **changes) -> list[dict]:
    return trace_lines(3, Tokenizer(), world.batch, credited(world, **changes), chosen)


class TestRows:
    def test_only_scored_rows_are_informative_and_only_they_are_read(self, world, monkeypatch):
        made = credited(world)
        assert informative_rows(made, 4) == [0, 1] and informative_rows(made, 1) == [0]
        # Only numbers were read for that; and then the texts of the chosen rows alone.
        assert world.queue.reads == []
        del world.queue.rows["c_0_0"], world.queue.rows["pad_0_0"]
        assert len(trace_lines(3, Tokenizer(), world.batch, made, [0, 1])) == 2

    def test_nothing_scored_reads_nothing(self, world):
        assert lines_of(world, []) == [] and world.queue.reads == []

    def test_a_line_holds_the_response_its_credit_and_its_source(self, world):
        (line,) = lines_of(world, [0], source="vineppo")
        assert (line["source"], line["engine"], line["index"], line["uid"]) == ("vineppo", "actor", "7", "b")
        assert line["weighs"] is False and type(line["status"]) is str
        assert (line["prompt"], line["response"], line["ground_truth"]) == ("Question b_0_0?", "rb\nx", "2")
        assert [segment["segment_reward"] for segment in line["segments"]] == [0.25, -0.75]
        trace = read_trace(json.loads(json.dumps(line)), "here")
        assert [trace.text_of(k) for k in range(2)] == ["rb", "\nx"] and trace.source == "vineppo"
        assert trace.reward_range == (-1.0, 1.0)
        assert line["forecasts"] is True
        for source, weighs in (("leave_one_out", True), ("mig", False)):
            (line,) = lines_of(world, [0], source=source)
            assert (line["weighs"], line["forecasts"]) == (weighs, False)

    def test_without_the_columns_of_a_data_set_the_tokens_speak(self, world):
        for row in world.queue.rows.values():
            del row["raw_prompt"], row["extra_info"], row["reward_model"]
        (line,) = lines_of(world, [0])
        assert (line["prompt"], line["index"], line["ground_truth"]) == ("p?", None, None)

    def test_the_file_is_what_it_was(self, world, tmp_path):
        settings = TracesConfig(dir=str(tmp_path / "new"), num_traces=3)
        write_traces(settings, 5, Tokenizer(), world.batch, credited(world))
        lines = [json.loads(line) for line in (tmp_path / "new/5.jsonl").read_text().splitlines()]
        # Scored ones first, in order of their keys; a row without a record is never written.
        found = [(line["uid"], line["status"]) for line in lines]
        assert found == [("a", "scored"), ("b", "scored"), ("c", "uniform_group")]
        assert lines[0]["source"] == "rredcot" and lines[0]["index"] is None


class Tracking:
    """As verl's: a dictionary of backends."""

    def __init__(self, **backends):
        self.logger = backends


@pytest.fixture
def rows(world):
    return lines_of(world, [0, 1])


class FakeWandb:
    """Takes what wandb takes."""

    class Html:
        def __init__(self, data):
            self.data = data

    class Table:
        def __init__(self, columns, data):
            self.columns, self.data = columns, data

    def __init__(self):
        self.logged = []

    def log(self, data, step):
        self.logged.append((step, data))


class TestTrackers:
    @pytest.mark.parametrize("names", ["wandb", ["wandb"], ["tracking", "wandb"]])
    def test_wandb(self, rows, names):
        wandb = FakeWandb()
        log_samples(names, Tracking(wandb=wandb), 3, rows)
        ((step, data),) = wandb.logged
        assert step == 3 and set(data) == {HTML_KEY, TABLE_KEY}
        assert "<!DOCTYPE html>" in data[HTML_KEY].data and data[TABLE_KEY].columns == list(COLUMNS)
        assert len(data[TABLE_KEY].data) == 4

    def test_vemlp_wandb(self, rows):
        wandb = FakeWandb()
        log_samples(["vemlp_wandb"], Tracking(vemlp_wandb=wandb), 3, rows)
        assert set(wandb.logged[0][1]) == {TABLE_KEY}

    def test_tensorboard(self, rows, tmp_path):
        tensorboard = pytest.importorskip("torch.utils.tensorboard")
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        writer = tensorboard.SummaryWriter(str(tmp_path))
        log_samples(["tensorboard"], Tracking(tensorboard=SimpleNamespace(writer=writer)), 3, rows)
        writer.close()
        events = accumulator.EventAccumulator(str(tmp_path)).Reload()
        (event,) = events.Tensors(f"{HTML_KEY}/text_summary")
        assert event.step == 3 and "| −0.75 |" in event.tensor_proto.string_val[0].decode()

    def test_mlflow(self, rows, monkeypatch):
        sent = []
        monkeypatch.setitem(
            sys.modules, "mlflow", module("mlflow", log_text=lambda text, file: sent.append((text, file)))
        )
        log_samples(["mlflow"], Tracking(mlflow=object()), 3, rows)
        ((text, file),) = sent
        assert file == "rredcot_samples/step_000003.html" and text.startswith("<!DOCTYPE html>")

    @pytest.mark.parametrize("has_html", [True, False])
    def test_swanlab(self, rows, has_html):
        sent, tables = [], []
        table = SimpleNamespace(add=lambda headers, rows: tables.append((headers, rows)))
        swanlab = SimpleNamespace(
            log=lambda data, step: sent.append((data, step)),
            Text=lambda text: ("text", text),
            echarts=SimpleNamespace(Table=lambda: table),
        )
        if has_html:
            swanlab.Html = lambda html: ("html", html)
        log_samples(["swanlab"], Tracking(swanlab=swanlab), 3, rows)
        ((data, step),) = sent
        assert step == 3 and data[HTML_KEY][0] == ("html" if has_html else "text") and data[TABLE_KEY] is table
        assert tables[0][0] == list(COLUMNS) and len(tables[0][1]) == 4

    def test_trackio(self, rows):
        sent = []
        trackio = SimpleNamespace(
            log=lambda data, step: sent.append((data, step)),
            Markdown=lambda text: text,
            Table=lambda dataframe: dataframe,
        )
        log_samples(["trackio"], Tracking(trackio=SimpleNamespace(trackio=trackio)), 3, rows)
        ((data, step),) = sent
        assert step == 3 and list(data[TABLE_KEY].columns) == list(COLUMNS) and "### 1. Worst blamed" in data[HTML_KEY]

    @pytest.mark.parametrize("has_task", [True, False])
    def test_clearml(self, rows, monkeypatch, caplog, has_task):
        sent = []
        report = SimpleNamespace(report_table=lambda **fields: sent.append(fields),
                                 report_media=lambda **fields: sent.append(fields))  # fmt: skip
        task = SimpleNamespace(get_logger=lambda: report) if has_task else None
        monkeypatch.setitem(sys.modules, "clearml", module("clearml", Task=SimpleNamespace(current_task=lambda: task)))
        log_samples(["clearml"], Tracking(clearml=object()), 3, rows)
        if not has_task:
            assert sent == [] and "no current task" in caplog.text
            return
        table, page = sent
        assert (table["iteration"], len(table["table_plot"])) == (3, 4)
        assert page["file_extension"] == ".html" and page["stream"].read().startswith(b"<!DOCTYPE html>")

    def test_file_and_console(self, rows, tmp_path, capsys):
        file = SimpleNamespace(filepath=str(tmp_path / "metrics.jsonl"))
        log_samples(["console", "file"], Tracking(console=object(), file=file), 3, rows)
        assert (tmp_path / "metrics_samples/3.html").read_text(encoding="utf-8").count('class="card trace"') == 2
        assert "credited responses of step 3" in capsys.readouterr().out

    def test_number_of_responses_is_bounded(self, rows, capsys):
        log_samples(["console"], Tracking(console=object()), 3, rows, num_samples=1)
        said = capsys.readouterr().out
        assert "[1] Worst blamed" in said and "[2]" not in said


def test_through_verls_own_tracking(rows, tmp_path, monkeypatch, capsys):
    """The objects that verl holds have what is used of them."""
    pytest.importorskip("tensorboard")
    from verl.utils.tracking import Tracking as VerlTracking

    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "metrics.jsonl"))
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "tensorboard"))
    names = ["console", "file", "tensorboard"]
    tracking = VerlTracking("project", "experiment", names)
    log_samples(names, tracking, 3, rows)
    tracking.finish()
    assert (tmp_path / "metrics_samples/3.html").exists() and "Worst blamed" in capsys.readouterr().out
    assert any(b"Credited responses" in file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())


class TestFailures:
    def test_a_tracker_that_fails_is_reported_once_left_alone_and_stops_nothing(self, rows, caplog, capsys):
        wandb = FakeWandb()
        tries = []

        def fail(data, step):
            tries.append(step)
            raise ConnectionError("no server")

        wandb.log = fail
        tracking = Tracking(wandb=wandb, console=object())
        for step in range(5):
            log_samples(["wandb", "console"], tracking, step, [row | {"step": step} for row in rows])
        assert tries == [0, 1, 2] and MOST_FAILURES == 3
        assert caplog.text.count("could not be sent to wandb: ConnectionError: no server") == 1
        assert caplog.text.count("wandb failed 3 times in a row") == 1
        assert capsys.readouterr().out.count("credited responses of step") == 5
        log_samples(["wandb"], Tracking(wandb=FakeWandb()), 5, rows)  # another run is not blamed for it

    def test_a_success_forgets_failures(self, rows):
        wandb = FakeWandb()
        outcomes = iter([OSError, OSError, None, OSError, OSError, None])
        reached = []

        def log(data, step):
            reached.append(step)
            error = next(outcomes)
            if error is not None:
                raise error("busy")

        wandb.log = log
        tracking = Tracking(wandb=wandb)
        for step in range(6):
            log_samples("wandb", tracking, step, rows)
        assert reached == list(range(6))

    def test_a_tracker_for_numbers_only_is_reported_once(self, rows, caplog):
        tracking = Tracking(rl_insight=object())
        for step in range(3):
            log_samples(["rl_insight"], tracking, step, rows)
        assert caplog.text.count("rl_insight takes numbers only") == 1

    def test_a_tracker_that_did_not_start_is_passed_over(self, rows, caplog):
        log_samples(["mlflow"], Tracking(), 3, rows)
        assert caplog.text == ""

    def test_nothing_to_show_sends_nothing(self, rows, caplog):
        wandb = FakeWandb()
        broken = rows[0] | {"reward": float("nan")}
        with caplog.at_level(logging.WARNING):
            log_samples(["wandb"], Tracking(wandb=wandb), 3, [broken])
        log_samples(["wandb"], Tracking(wandb=wandb), 3, [])
        assert wandb.logged == [] and "'reward' must be a finite number" in caplog.text


def module(name: str, **attributes) -> ModuleType:
    fake = ModuleType(name)
    vars(fake).update(attributes)
    return fake
