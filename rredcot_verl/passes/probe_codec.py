"""The probes of one response as a flat row of integers: how they travel from the agent loop to the training engine."""

from collections.abc import Sequence

from rredcot_verl.passes.payload import PayloadReader
from rredcot_verl.passes.probe_pack import count_probe_tokens
from rredcot_verl.passes.protocol import NOTHING
from rredcot_verl.probes.probe import Probe


def encode(probes: Sequence[Probe]) -> list[int]:
    """Write probes as integers.

    Layout: number of tokens the probes add to a pass; number of sets of closing tokens, each as length and ids; number
    of probes, each as state, proposal, position, answer_from, scored_from, index of its set, length and ids. No probes
    are `NOTHING`.
    """
    if not probes:
        return list(NOTHING)
    sets = list(dict.fromkeys(probe.closing_token_ids for probe in probes))
    numbers = {closing: number for number, closing in enumerate(sets)}
    row = [count_probe_tokens(probes), len(sets)]
    for closing in sets:
        row += [len(closing), *closing]
    row.append(len(probes))
    for probe in probes:
        row += [probe.state, probe.proposal, probe.position, probe.answer_from, probe.scored_from]
        row += [numbers[probe.closing_token_ids], len(probe.token_ids), *probe.token_ids]
    return row


def num_probe_tokens(row: Sequence[int]) -> int:
    """Tokens that the probes of a row add to a pass."""
    # `NOTHING` is negative.
    return max(0, int(row[0]))


def decode(row: Sequence[int]) -> list[Probe]:
    """Read what `encode` wrote.

    Raises:
        ValueError: The row is cut off or too long.
    """
    if tuple(row) == NOTHING:
        return []
    reader = PayloadReader(row, "encoded probes")
    reader.take(1)
    sets = [reader.take_list() for _ in range(reader.take(1)[0])]
    probes = []
    for _ in range(reader.take(1)[0]):
        state, proposal, position, answer_from, scored_from, closing = reader.take(6)
        probes.append(Probe(state, proposal, position, reader.take_list(), answer_from, scored_from, sets[closing]))
    reader.end()
    return probes
