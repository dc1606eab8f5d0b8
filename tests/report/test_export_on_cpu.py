"""Rules that choose prompts, and the parquet file they are written to."""

import pytest

from rredcot_verl.report import ReportError, Thresholds, load_run, prompts_of
from rredcot_verl.report.__main__ import main
from rredcot_verl.report.export import choose_prompts, export
from rredcot_verl.report.prompts import Prompt
from rredcot_verl.report.rules import figures, parse_rule

from .fake_run import response, trace, write_dump, write_run

pq = pytest.importorskip("pyarrow.parquet")
pa = pytest.importorskip("pyarrow")


def prompt(**changes):
    fields = {"text": "Question a?", "uids": ("u",), "index": "7", "num_responses": 8, "num_scored": 8}
    fields |= {"mean_reward": 0.5, "solved": 0.5, "start_value": 0.25, "mean_value": 0.3, "spread": 0.02}
    return Prompt(**(fields | changes))


def write_data(file, questions):
    rows = [
        {
            "data_source": "toy",
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(row)},
            "extra_info": {"split": "train", "index": row},
        }
        for row, question in enumerate(questions)
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file


class TestRules:
    @pytest.mark.parametrize(
        ("text", "holds"),
        [
            ("0.1 < mean_reward < 0.9", True),
            ("0.5 < mean_reward <= 0.9", False),
            ("guessing", True),
            ("learnable and not shared_blame", True),
            ("not learnable or (start_value >= 0.25 and spread != 0)", True),
            ("start_value > -1", True),
            ("num_responses == 8 and blame_share == 0", True),
            ("entropy < 1", False),
        ],
    )
    def test_holds(self, text, holds):
        assert parse_rule(text)(figures(prompt(), Thresholds())) is holds

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("__import__('os').system('true')", "not allowed"),
            ("mean_reward.__class__", "not allowed"),
            ("[x for x in (1,)]", "not allowed"),
            ("mean_reward + 1 > 2", "neither a figure nor a number"),
            ("mean_reward in (1, 2)", "only < <= >"),
            ("'text' == mean_reward", "not allowed"),
            ("reward > 1", "unknown figure 'reward'"),
            ("mean_reward >", "not a rule"),
            ("", "not a rule"),
            ("(" * 500 + "1" + ")" * 500, "not a rule"),
        ],
    )
    def test_refuses(self, text, word):
        with pytest.raises(ReportError) as caught:
            parse_rule(text)
        assert word in str(caught.value) and "--keep" in str(caught.value)

    def test_prompts_without_the_figure_are_left_out_and_counted(self):
        members = [prompt(), prompt(start_value=None), prompt(start_value=0.9)]
        assert choose_prompts(members, parse_rule("start_value < 0.5"), Thresholds()) == ([members[0]], 1)


class TestExport:
    def test_rows_of_the_data_are_unchanged_and_in_order(self, tmp_path):
        data = write_data(tmp_path / "train.parquet", ["Question c?", "Question a?", "Question b?", "Question a?"])
        kept = [prompt(text="Question b?"), prompt(), prompt(text="Question z?")]
        done = export(tmp_path / "new/kept.parquet", kept, Thresholds(), data)
        assert (done.num_rows, done.unmatched) == (3, ("Question z?",))
        source, result = pq.read_table(data), pq.read_table(tmp_path / "new/kept.parquet")
        assert result.schema.equals(source.schema)
        assert result.to_pylist() == [source.to_pylist()[row] for row in (1, 2, 3)]

    def test_prompts_inside_a_chat_template_are_found(self, tmp_path):
        data = write_data(tmp_path / "train.parquet", [f"Question {name}?" for name in "abcd"])
        write_dump(tmp_path / "run/rollouts", [response(1, name, 1.0) for name in "acx"])
        kept = prompts_of(load_run(tmp_path / "run"))
        done = export(tmp_path / "kept.parquet", kept, Thresholds(), data)
        assert (done.num_rows, len(done.unmatched)) == (2, 1)

    def test_by_index(self, tmp_path):
        data = write_data(tmp_path / "train.parquet", ["same"] * 9)
        done = export(tmp_path / "kept.parquet", [prompt(), prompt(index=None)], Thresholds(), data, by="index")
        assert (done.num_rows, len(done.unmatched)) == (1, 1)
        assert pq.read_table(tmp_path / "kept.parquet").to_pylist()[0]["extra_info"]["index"] == 7

    def test_without_data_prompts_and_figures(self, tmp_path):
        export(tmp_path / "kept.parquet", [prompt(), prompt(text="other", start_value=None)], Thresholds())
        first, second = pq.read_table(tmp_path / "kept.parquet").to_pylist()
        assert (first["prompt"], first["uids"], first["start_value"], first["guessing"]) == (
            "Question a?",
            ["u"],
            0.25,
            True,
        )
        assert second["start_value"] is None

    @pytest.mark.parametrize(
        ("kept", "by", "word"),
        [
            ([], "prompt", "keeps no prompt"),
            ([prompt(text="z")], "prompt", "none of the 1 prompts"),
            ([prompt(index=None)], "index", "traces hold no index"),
        ],
    )
    def test_nothing_to_write(self, tmp_path, kept, by, word):
        data = write_data(tmp_path / "train.parquet", ["Question a?"])
        with pytest.raises(ReportError, match=word):
            export(tmp_path / "kept.parquet", kept, Thresholds(), data, by=by)
        assert not (tmp_path / "kept.parquet").exists()

    def test_data_that_is_none(self, tmp_path):
        (tmp_path / "data.parquet").write_text("no parquet")
        pq.write_table(pa.table({"question": ["a"]}), tmp_path / "other.parquet")
        for name, word in (("no", "cannot be read"), ("data", "cannot be read"), ("other", "no column 'prompt'")):
            with pytest.raises(ReportError, match=word):
                export(tmp_path / "kept.parquet", [prompt()], Thresholds(), tmp_path / f"{name}.parquet")

    def test_command_line(self, tmp_path, capsys):
        rows = [
            trace(["a\n", "b"], [0.5, 0.5, reward], prompt=f"Question {name}?")
            for name in "ab"
            for reward in (0.0, 1.0)
        ]
        folder = write_run(tmp_path / "run", [*rows, trace(["a\n", "b"], [0.5, 0.5, 1.0], prompt="Question c?")])
        data = write_data(tmp_path / "train.parquet", ["Question a?", "Question c?"])
        kept = tmp_path / "kept.parquet"
        options = ["--out", tmp_path / "page.html", "--export-filtered", kept, "--data", data, "--keep", "learnable"]
        assert main([str(option) for option in [folder, *options]]) == 0
        said = capsys.readouterr().out
        assert "1 rows; the rule keeps 2 of 3 prompts; 1 of those kept are not in" in said and "Question b?" in said
        assert pq.read_table(kept).num_rows == 1
        assert main([str(folder), "--export-filtered", str(kept)]) == 1
        assert "belong together" in capsys.readouterr().err
