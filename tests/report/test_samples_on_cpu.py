"""Which responses are chosen, and the forms in which they are shown to people."""

import itertools
import re

import pytest

from rredcot_verl.pages.text import MOST_LINE_CHARACTERS
from rredcot_verl.report.sample_formats import (
    COLUMNS,
    MOST_PROMPT_CHARACTERS,
    MOST_RESPONSE_CHARACTERS,
    choose_samples,
    shorten,
)
from rredcot_verl.report.selection import KINDS, choose_extremes, extreme_traces, scores
from rredcot_verl.report.trace import read_trace

from .fake_run import trace

EVIL = "<script>alert(1)</script> | **bold** `code` [a](http://b)\n# heading\n\x1b[31m\u202e$x$"


def read(*arguments, **changes):
    return read_trace(trace(*arguments, **changes), "here")


class TestSelection:
    def test_scores(self):
        assert scores([0.5, 0.75], [0.25, -0.75], 0.0, -1.0) == (0.75, 0.0, 0.625)
        assert scores([0.5, 0.75], [0.25, -0.75], 0.0, 1.0) == (0.0, 0.25, 0.625)
        assert scores([0.5], [-0.5], 0.0, -1.0) is None

    def test_takes_turns_and_nothing_twice(self):
        rows = [(0.9, 0.9, 0.9), (0.8, 0.1, 0.1), (0.1, 0.2, 0.3), (0.0, 0.8, 0.0), None, (0.2, 0.0, 0.8)]
        chosen = choose_extremes(rows, list("abcdef"), 9)
        assert [(extreme.row, extreme.kind) for extreme in chosen] == [(0, 0), (3, 1), (5, 2), (1, 0), (2, 1)]
        for count in range(6):
            assert choose_extremes(rows, list("abcdef"), count) == chosen[:count]

    def test_another_prompt_comes_before_the_same_one_again(self):
        rows = [(0.9, 0.0, 0.0), (0.8, 0.0, 0.0), (0.1, 0.0, 0.0)]
        assert [extreme.row for extreme in choose_extremes(rows, ["a", "a", "b"], 3)] == [0, 2, 1]

    def test_a_fall_is_no_praise_and_a_rise_no_blame(self):
        rising = read(["a", "b"], [0.0, 0.5, 1.0], grpo_advantage=1.0)
        falling = read(["a", "b"], [1.0, 0.5, 0.0])
        kinds = [(trace.reward, KINDS[kind]) for trace, kind in extreme_traces([rising, falling], 2)]
        assert kinds == [(0.0, "worst blamed"), (1.0, "best credited")]

    def test_chosen_from_the_chosen_they_are_the_same(self):
        levels = (0.0, 0.3, 0.6, 1.0)
        rows = [scores(values, [values[1] - values[0], reward - values[1]], reward, reward - 0.5)
                for *values, reward in itertools.product(levels, levels, (0.0, 1.0))]  # fmt: skip
        groups = [place % 5 for place in range(len(rows))]
        for count in (1, 4, 7):
            chosen = choose_extremes(rows, groups, count)
            places = sorted(extreme.row for extreme in chosen)
            again = choose_extremes([rows[place] for place in places], [groups[place] for place in places], count)
            assert [(places[extreme.row], extreme.kind) for extreme in again] == [(e.row, e.kind) for e in chosen]

    def test_unscored_and_single_segments_are_not_chosen(self):
        members = [read(["a"], [0.9, 0.0]), read(["a", "b"], [0.9, 0.1, 0.0], status="uniform_group")]
        assert extreme_traces(members, 3) == [] and choose_samples(1, members, 3) is None


class TestForms:
    @pytest.fixture
    def samples(self):
        evil = read(
            [EVIL, "wrong |\n", "end"], [0.5, 0.75, 0.25, 0.0], prompt=EVIL, ground_truth=EVIL, source="vineppo"
        )
        return choose_samples(7, [evil, read(["a", "b"], [0.0, 0.25, 1.0], prompt="other", grpo_advantage=1.0)], 4)

    def test_html_is_one_safe_page(self, samples):
        page = samples.html()
        assert "<script" not in page and "&lt;script&gt;" in page and "default-src 'none'" in page
        assert not re.search(r"src=|url\(|@import|<link", page) and not set(page) & {"\x1b", "\u202e"}
        assert page.count('class="card trace"') == 2 and "vineppo, read by rollout" in page
        assert "Worst blamed: its largest fall is 0.50" in page and "−0.50" in page and page.endswith("</html>\n")

    def test_markdown_stays_a_table(self, samples):
        text = samples.markdown()
        table = [line for line in text.split("\n") if line.startswith("|")]
        assert len(table) == 2 + 3 + 2 + 2
        assert all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in table)
        assert "<script" not in text and "\\*\\*bold" in text and "\n# heading" not in text and "](http" not in text

    def test_plain_text_is_a_line_a_segment(self, samples):
        text = samples.text()
        assert not set(text) & {"\x1b", "\u202e"} and text.isprintable() is False
        lines = text.splitlines()
        assert len(lines) == 1 + (3 + 3) + (3 + 2)
        assert " −0.50   0.25" in text and "wrong |" in text

    def test_rows_have_the_columns(self, samples):
        rows = samples.rows()
        assert len(rows) == 5 and {len(row) for row in rows} == {len(COLUMNS)}
        first = dict(zip(COLUMNS, rows[1], strict=True))
        assert (first["step"], first["sample"], first["chosen as"], first["segment"]) == (7, 1, "worst blamed", 2)
        assert (first["credit"], first["self-value after"], first["tokens"]) == (-0.5, 0.25, 10)

    def test_length_is_bounded(self):
        parts = ["x" * 50_000, "y" * 20, *["z" * 9_000] * 5]
        long = read(
            parts, [0.5, 0.1, 0.9, *[0.5] * 4, 0.0], prompt="p" * 10_000 + "the question", ground_truth="g" * 9000
        )
        short = shorten(long)
        assert (
            len(short.response) < MOST_RESPONSE_CHARACTERS + 7 * 60 and len(short.prompt) < MOST_PROMPT_CHARACTERS + 60
        )
        assert short.prompt.endswith("the question") and short.text_of(1) == parts[1]
        assert short.text_of(0).startswith("x" * 100) and short.text_of(0).endswith("x" * 100)
        assert "49,144 characters left out" in short.text_of(0)
        assert [segment.segment_reward for segment in short.segments] == long.credits
        samples = choose_samples(1, [long], 1)
        assert len(samples.html()) < 40_000 and len(samples.text()) < 3_000 and len(samples.markdown()) < 5_000
        assert max(len(row[7]) for row in samples.rows()) <= MOST_LINE_CHARACTERS + 2
