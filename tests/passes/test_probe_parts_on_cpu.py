"""A row's probes in parts: all of them, in order, within the limit, and no more of the trace than they see."""

import random

import pytest
import torch

from rredcot_verl.passes.probe_codec import decode, encode, num_probe_tokens
from rredcot_verl.passes.probe_parts import LEAST_ROOM, filler, parts_of_row
from rredcot_verl.passes.protocol import NOTHING
from tests.passes.architectures import random_probes

LENGTH = 200


def payload_of(probes) -> torch.Tensor:
    return torch.tensor(encode(probes), dtype=torch.int32)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("budget", [LENGTH, 220, 400, 10**6, None])
@pytest.mark.parametrize("seed", range(5))
def test_parts_hold_all_probes_in_order(seed, budget, whole):
    probes = random_probes(LENGTH, 30, seed)
    payload = payload_of(probes)
    parts = parts_of_row(3, LENGTH, payload, budget, whole)
    assert [probe for part in parts for probe in decode(part.payload.tolist())] == probes
    assert {part.row for part in parts} == {3} and all(part.payload.dtype == payload.dtype for part in parts)
    assert parts[0].num_tokens == LENGTH or not whole
    for part in parts[whole:]:
        assert part.num_tokens == max(probe.position for probe in decode(part.payload.tolist()))
    total = LENGTH + num_probe_tokens(payload)
    if budget is None:
        assert len(parts) == 1
        return
    limit = max(budget, LENGTH + budget // LEAST_ROOM)
    assert all(part.num_pass_tokens <= limit for part in parts)
    assert (len(parts) > 1) == (total > limit)
    # No two parts in a row would have fitted into one: no trace is computed more often than it must be.
    for one, other in zip(parts, parts[1:], strict=False):
        both = payload_of(decode(one.payload.tolist()) + decode(other.payload.tolist()))
        assert max(one.num_tokens, other.num_tokens) + num_probe_tokens(both) > limit - 8


def test_a_probe_of_more_tokens_than_there_is_room_stands_alone():
    (probe, *_) = random_probes(50, 2)
    long = [
        probe.__class__(0, 0, 10, tuple(random.Random(number).choices(range(60), k=40)), 0, 0, (1,))
        for number in range(3)
    ]
    parts = parts_of_row(0, 50, payload_of(long), 50, False)
    assert [(part.num_tokens, num_probe_tokens(part.payload)) for part in parts] == [(10, 40)] * 3


def test_rows_without_probes():
    nothing = torch.tensor(NOTHING, dtype=torch.int32)
    for whole, num_tokens in ((True, 9), (False, 1)):
        (part,) = parts_of_row(2, 9, nothing, 4, whole)
        assert (part.row, part.num_tokens, part.num_pass_tokens) == (2, num_tokens, num_tokens)
    spare = filler(payload_of(random_probes(9, 1)))
    assert (spare.row, spare.num_pass_tokens, spare.payload.tolist()) == (0, 1, list(NOTHING))
