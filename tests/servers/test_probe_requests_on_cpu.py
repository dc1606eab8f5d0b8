"""What every server takes as probes of a trace, and what it refuses with which words."""

import pytest

from rredcot_verl.servers.probe_requests import Probe, parse_probes

PROBE = {"position": 2, "token_ids": [7, 8, 9], "closing_token_ids": [6, 5, 6], "scored_from": 2}


def test_a_closing_token_listed_twice_is_one_outcome_and_the_likeliest_stays_first():
    probes, temperature = parse_probes({"read_probes": [PROBE, {"position": 8, "token_ids": []}]}, 8)
    assert probes == [Probe(2, (7, 8, 9), (6, 5), 2), Probe(8, (), (), 0)]
    assert temperature == 1.0
    assert parse_probes({"read_probes": [], "temperature": 0.7, "max_tokens": 1}, 8) == ([], 0.7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": 0}, r"read_probes\[0\].position must be in \[1, 8\], got 0"),
        ({"position": 9}, r"position must be in \[1, 8\], got 9"),
        ({"scored_from": 4}, r"scored_from must be in \[0, 3\], got 4"),
        ({"answer": 1}, "must have position, token_ids"),
    ],
)
def test_a_bad_probe_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_probes({"read_probes": [PROBE | changes]}, 8)
    with pytest.raises(ValueError, match="must have position, token_ids"):
        parse_probes({"read_probes": [{"position": 1, "tokens": []}]}, 8)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": 0}, "positive temperature, got 0.0"),
        ({"temperature": -1.0}, "positive temperature, got -1.0"),
        ({"top_p": 0.9}, "takes temperature, max_tokens and timeout_s beside it, got top_p"),
    ],
)
def test_bad_parameters_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        parse_probes({"read_probes": [], **params}, 8)
