"""Traces and probes in one sequence: the layout against brute force, the readings against hand-made logits."""

import itertools
import random

import pytest
import torch
import torch._dynamo.testing

from rredcot_verl.passes import probe_pack
from rredcot_verl.passes.probe_codec import decode, encode, num_probe_tokens
from rredcot_verl.passes.probe_pack import PrefixTree, ProbePack, count_probe_tokens, read_probes
from rredcot_verl.passes.protocol import NOTHING
from rredcot_verl.probes.probe import Probe
from tests.passes.architectures import random_probes
from tests.peak_memory import peak_bytes

VOCAB_SIZE = 5
SEEDS = range(20)


def probe(position: int, token_ids: tuple[int, ...] = (), scored_from: int = 0, closing: tuple[int, ...] = (0,)):
    return Probe(0, 0, position, token_ids, scored_from, scored_from, closing)


def random_case(seed: int) -> tuple[list[int], list[list[Probe]]]:
    """A few traces, some without probes; few distinct tokens, so that probes share what they can."""
    generator = random.Random(seed)
    lengths = [generator.randint(1, 9) for _ in range(generator.randint(1, 4))]
    probes = []
    for length in lengths:
        own = []
        for _ in range(generator.choice([0, 1, 6])):
            tokens = tuple(generator.choices(range(VOCAB_SIZE), k=generator.randint(0, 4)))
            closing = tuple(generator.choices(range(VOCAB_SIZE), k=generator.randint(1, 3)))
            own.append(probe(generator.randint(1, length), tokens, generator.randint(0, len(tokens)), closing))
        probes.append(own)
    return lengths, probes


def nodes_of(pack: ProbePack, trace: int, probe: Probe) -> list[int]:
    """Where the tokens of a probe stand, found by what they may follow and not by the pack's own bookkeeping."""
    path: list[int] = []
    first, last = pack.probe_starts[trace : trace + 2]
    tokens = pack.probe_token_ids.tolist()
    for depth, token in enumerate(probe.token_ids):
        (node,) = [
            node
            for node in range(first, last)
            if tokens[node - pack.num_trace_tokens] == token
            and pack.limits[node] == probe.position
            and pack.positions[node] == probe.position + depth
            and (not path or path[-1] < node < pack.subtree_ends[path[-1]])
        ]
        path.append(node)
    return path


# --- tree


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tree_holds_every_prefix_once(seed):
    generator = random.Random(seed)
    sequences = [tuple(generator.choices(range(3), k=generator.randint(0, 5))) for _ in range(generator.randint(0, 9))]
    tree = PrefixTree.build(sequences)
    prefixes = {sequence[: end + 1] for sequence in sequences for end in range(len(sequence))}
    assert len(tree.token_ids) == len(tree.depths) == len(tree.ends) == len(prefixes)
    assert set(tree.paths) == set(sequences)
    below: dict[int, set[int]] = {node: set() for node in range(len(tree.token_ids))}
    for sequence, path in tree.paths.items():
        assert tuple(tree.token_ids[node] for node in path) == sequence
        assert [tree.depths[node] for node in path] == list(range(len(sequence)))
        for node, later in itertools.combinations(path, 2):
            below[node].add(later)
    for node, descendants in below.items():
        assert set(range(node + 1, tree.ends[node])) == descendants


def test_a_tree_of_nothing():
    assert PrefixTree.build([]) == PrefixTree([], [], [], {})
    assert PrefixTree.build([()]).paths == {(): []}


# --- layout


@pytest.mark.parametrize("seed", SEEDS)
def test_the_layout(seed):
    lengths, probes = random_case(seed)
    pack = ProbePack.build(lengths, probes)
    assert pack.num_trace_tokens == sum(lengths)
    assert pack.num_tokens == sum(lengths) + sum(count_probe_tokens(own) for own in probes)
    assert pack.trace_starts == (0, *itertools.accumulate(lengths))
    for trace, (start, length) in enumerate(zip(pack.trace_starts, lengths, strict=False)):
        span = slice(start, start + length)
        assert pack.positions[span].tolist() == list(range(length))
        assert pack.trace_numbers[span].tolist() == [trace] * length
        probes = slice(*pack.probe_starts[trace : trace + 2])
        assert pack.trace_numbers[probes].tolist() == [trace] * (probes.stop - probes.start)
    assert pack.probe_token_ids.dtype == torch.int64 and len(pack.probe_token_ids) == pack.num_tokens - sum(lengths)
    for name in ("trace_numbers", "positions", "limits", "subtree_ends"):
        assert len(getattr(pack, name)) == pack.num_tokens


@pytest.mark.parametrize("sliding_window", [None, 1, 2, 4, 100])
@pytest.mark.parametrize("seed", SEEDS)
def test_who_sees_whom(seed, sliding_window):
    """A pair of tokens sees each other as in the plain sequences: trace up to the boundary, then the probe."""
    lengths, probes = random_case(seed)
    pack = ProbePack.build(lengths, probes)
    expected = torch.zeros(pack.num_tokens, pack.num_tokens, dtype=torch.bool)
    for trace, (start, length) in enumerate(zip(pack.trace_starts, lengths, strict=False)):
        sequences = [list(range(start, start + length))]
        sequences += [[*range(start, start + probe.position), *nodes_of(pack, trace, probe)] for probe in probes[trace]]
        for sequence in sequences:
            for place, query in enumerate(sequence):
                first = 0 if sliding_window is None else max(0, place - sliding_window + 1)
                expected[query, sequence[first : place + 1]] = True
    index = torch.arange(pack.num_tokens)
    assert torch.equal(pack.sees(index.unsqueeze(1), index.unsqueeze(0), sliding_window), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_rows_are_the_ones_read(seed):
    lengths, probes = random_case(seed)
    pack = ProbePack.build(lengths, probes)
    expected = set()
    for trace, own in enumerate(probes):
        for probe, reading in zip(own, pack.readings[trace], strict=True):
            before = [pack.trace_starts[trace] + probe.position - 1, *nodes_of(pack, trace, probe)]
            assert list(reading.rows) == before[probe.scored_from :]
            assert reading.token_ids == probe.token_ids[probe.scored_from :]
            assert len(reading.rows) == len(reading.token_ids) + 1
            expected |= set(reading.rows)
    assert pack.rows(all_trace_rows=False).tolist() == sorted(expected)
    assert pack.rows(all_trace_rows=True).tolist() == sorted(expected | set(range(sum(lengths))))


def test_positions_outside_the_trace_are_named():
    for position in (0, 4, -1):
        with pytest.raises(ValueError, match=rf"position {position} lies outside its trace of 3 tokens"):
            ProbePack.build([5, 3], [[probe(5)], [probe(1), probe(position)]])


def test_a_pack_moves_as_a_whole():
    pack = ProbePack.build([3], [[probe(2, (1, 2))]])
    moved = pack.to(torch.device("meta"))
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.readings == pack.readings and moved.trace_starts == pack.trace_starts


def test_packs_of_many_shapes_share_one_compiled_mask():
    """Who sees whom is compiled on a GPU, FlexAttention's kernel with it: once for all packs, not for every one."""

    def mask_function(pack):
        # As `make_block_mask` writes it.
        def sees(query, key):
            return pack.sees(query, key)

        return sees

    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    for lengths in ((30,), (41,), (30, 20), (9, 50, 33), (20, 20, 20, 20), (12, 5, 8, 40, 30), (9, 9), (64,)):
        pack = ProbePack.build(lengths, [random_probes(length, 3, seed=length) for length in lengths])
        index = torch.arange(pack.num_tokens)
        compiled = torch.compile(mask_function(pack), backend=counter)(index.unsqueeze(1), index.unsqueeze(0))
        assert torch.equal(compiled, pack.sees(index.unsqueeze(1), index.unsqueeze(0)))
    # One for the first shape, one for all others.
    assert counter.frame_count <= 2


# --- reading


@pytest.mark.parametrize("all_trace_rows", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_reading(seed, all_trace_rows):
    """Logits that depend on the token alone; each probe is read by hand."""
    lengths, probes = random_case(seed)
    pack = ProbePack.build(lengths, probes)
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(pack.num_tokens, VOCAB_SIZE, generator=generator)
    temperatures = 0.5 + torch.rand(len(lengths), generator=generator)
    rows = pack.rows(all_trace_rows)
    found = read_probes(pack, rows, logits[rows], temperatures)
    for trace, own in enumerate(probes):
        log_probs = (logits.double() / temperatures[trace]).log_softmax(-1)
        expected = []
        for probe in own:
            before = [pack.trace_starts[trace] + probe.position - 1, *nodes_of(pack, trace, probe)]
            counted = range(probe.scored_from, len(probe.token_ids))
            expected += [log_probs[before[index], probe.token_ids[index]].item() for index in counted]
            expected.append(log_probs[before[-1], sorted(set(probe.closing_token_ids))].logsumexp(0).item())
        assert found[trace] == pytest.approx(expected, abs=1e-5)


def test_reading_takes_half_precision_logits_apart_in_float32():
    pack = ProbePack.build([2], [[probe(2, (1,), closing=(0, 2))]])
    logits = torch.randn(2, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = pack.rows(all_trace_rows=False)
    half = read_probes(pack, rows, logits, torch.tensor([0.7]))
    single = read_probes(pack, rows, logits.float(), torch.tensor([0.7], dtype=torch.float64))
    assert half == single


def unchunked(pack: ProbePack, logits: torch.Tensor, temperature: float) -> list[list[float]]:
    """All rows in float32 at once."""
    scaled = logits.float() / temperature
    normalizer = scaled.logsumexp(1)
    values = []
    for own in pack.readings:
        rows = [row for reading in own for row in reading.rows]
        sets = [[token] for reading in own for token in (*reading.token_ids, None)]
        closings = iter([sorted(set(reading.closing_token_ids)) for reading in own])
        sets = [next(closings) if ids == [None] else ids for ids in sets]
        values.append(
            [(scaled[row, ids].logsumexp(0) - normalizer[row]).item() for row, ids in zip(rows, sets, strict=True)]
        )
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 7 * 1009, 2**24])
def test_reading_in_parts_is_reading_at_once(monkeypatch, dtype, at_once):
    """To the bit."""
    vocab_size = 1009
    pack = ProbePack.build([40, 25], [random_probes(40, 8), random_probes(25, 8, seed=1)])
    logits = (3 * torch.randn(pack.num_tokens, vocab_size, generator=torch.Generator().manual_seed(0))).to(dtype)
    monkeypatch.setattr(probe_pack, "READ_AT_ONCE", at_once)
    rows = pack.rows(all_trace_rows=True)
    found = read_probes(pack, rows, logits[rows], torch.full((2,), 0.7))
    assert found == unchunked(pack, logits, 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_takes_no_copy_of_all_logits(monkeypatch, dtype):
    """Eight bytes for each of the logits of a part, however many rows there are."""
    monkeypatch.setattr(probe_pack, "READ_AT_ONCE", 2**20)
    peaks = []
    for num_boundaries in (20, 80):
        pack = ProbePack.build([400], [random_probes(400, num_boundaries)])
        rows = pack.rows(all_trace_rows=False)
        logits = torch.randn(len(rows), 16384, dtype=dtype, generator=torch.Generator().manual_seed(0))
        assert logits.numel() > 2 * 2**20
        peaks.append(peak_bytes(lambda: read_probes(pack, rows, logits, torch.ones(1))))  # noqa: B023
    assert max(peaks) < 1.05 * 8 * 2**20


def test_reading_nothing():
    pack = ProbePack.build([2, 1], [[], []])
    assert read_probes(pack, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 3), torch.ones(2)) == [[], []]


# --- codec


@pytest.mark.parametrize("seed", SEEDS)
def test_probes_survive_the_way_as_integers(seed):
    for own in (*random_case(seed)[1], random_probes(7, 2, seed)):
        row = encode(own)
        assert all(type(number) is int for number in row)
        assert decode(row) == own
        assert decode(torch.tensor(row).tolist()) == own
        assert num_probe_tokens(row) == count_probe_tokens(own)


def test_no_probes():
    assert encode([]) == list(NOTHING) and decode(NOTHING) == [] and num_probe_tokens(NOTHING) == 0


def test_a_row_that_is_cut_off_or_too_long_is_refused():
    row = encode(random_probes(5, 1))
    for length in range(len(row)):
        with pytest.raises(ValueError, match=f"ends early: {length} integers"):
            decode(row[:length])
    with pytest.raises(ValueError, match=f"too long: {len(row) + 1} integers"):
        decode([*row, 0])
