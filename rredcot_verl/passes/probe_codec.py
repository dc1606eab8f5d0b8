"""The probes of one response as a flat row of integers: how they travel from the agent loop to the training engine."""

import itertools
from collections.abc import Sequence

from rredcot_verl.passes.probe_pack import count_probe_tokens
from rredcot_verl.probes.elicitation import Probe

NO_PROBES = (0, 0, 0)
"""The row of a response without probes."""


def encode(probes: Sequence[Probe]) -> list[int]:
    """Write probes as integers.

    Layout: number of tokens the probes add to a pass; number of sets of closing tokens, each as length and ids; number
    of probes, each as state, proposal, position, answer_from, scored_from, index of its set, length and ids.
    """
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
    return int(row[0])


def decode(row: Sequence[int]) -> list[Probe]:
    """Read what `encode` wrote.

    Raises:
        ValueError: The row is cut off or too long.
    """
    numbers = iter(row)

    def take(count: int) -> tuple[int, ...]:
        taken = tuple(itertools.islice(numbers, count))
        if len(taken) != count:
            raise ValueError(f"a row of encoded probes ends early: {len(row)} integers")
        return taken

    take(1)
    sets = [take(take(1)[0]) for _ in range(take(1)[0])]
    probes = []
    for _ in range(take(1)[0]):
        state, proposal, position, answer_from, scored_from, closing, length = take(7)
        probes.append(Probe(state, proposal, position, take(length), answer_from, scored_from, sets[closing]))
    if list(numbers):
        raise ValueError(f"a row of encoded probes is too long: {len(row)} integers")
    return probes
