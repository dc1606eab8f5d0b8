"""One sequence for many traces and all their probes: a trace is computed once, a probe costs its own tokens.

The traces stand first, one after the other; the probes' tokens follow. The probes of a boundary form a prefix tree (two
answers share the opening they have in common), laid out in preorder, so that who sees whom is an interval test:

    a trace's token sees its own trace up to itself;
    a probe's token sees its trace up to the boundary, and in the tree its ancestors and itself.

Positions go on from the boundary. The layout is ours; the numbers are those of scoring every prefix in a sequence of
its own, up to rounding.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rredcot_verl.probes.probe import Probe

READ_AT_ONCE = 2**24
"""Most logits of which there are copies in float32 at a time; they and their exponentials take 8 bytes each."""


@dataclass(frozen=True)
class PrefixTree:
    """Token sequences with their common prefixes merged, in preorder.

    Attributes:
        token_ids: Token of each node.
        depths: Depth of each node, 0 for a root.
        ends: For each node the index after its last descendant.
        paths: For each sequence the nodes along it.
    """

    token_ids: list[int]
    depths: list[int]
    ends: list[int]
    paths: dict[tuple[int, ...], list[int]]

    @classmethod
    def build(cls, sequences: Sequence[tuple[int, ...]]) -> "PrefixTree":
        """Merge the common prefixes of some sequences; empty ones have no node."""
        token_ids: list[int] = []
        depths: list[int] = []
        paths: dict[tuple[int, ...], list[int]] = {}
        before: tuple[int, ...] = ()
        path: list[int] = []
        # In sorted order, what a sequence shares with any earlier one it shares with the one before.
        for sequence in sorted(set(sequences)):
            num_shared = len(os.path.commonprefix([before, sequence]))
            new = range(len(token_ids), len(token_ids) + len(sequence) - num_shared)
            path = [*path[:num_shared], *new]
            token_ids += sequence[num_shared:]
            depths += range(num_shared, len(sequence))
            paths[sequence] = path
            before = sequence
        return cls(token_ids, depths, _subtree_ends(depths), paths)


def _subtree_ends(depths: Sequence[int]) -> list[int]:
    ends = [len(depths)] * len(depths)
    open_nodes: list[int] = []
    for node, depth in enumerate(depths):
        while open_nodes and depths[open_nodes[-1]] >= depth:
            ends[open_nodes.pop()] = node
        open_nodes.append(node)
    return ends


def count_probe_tokens(probes: Sequence[Probe]) -> int:
    """Tokens that one trace's probes add to its sequence."""
    by_position: dict[int, list[tuple[int, ...]]] = {}
    for probe in probes:
        by_position.setdefault(probe.position, []).append(probe.token_ids)
    return sum(len(PrefixTree.build(sequences).token_ids) for sequences in by_position.values())


@dataclass(frozen=True)
class Reading:
    """Where one probe is read.

    Attributes:
        rows: Indices of the tokens whose next-token distribution is read: one for each counted token, and the last for
            the token that ends the answer.
        token_ids: The counted tokens, `len(rows) - 1`.
        closing_token_ids: Tokens that end the answer.
    """

    rows: tuple[int, ...]
    token_ids: tuple[int, ...]
    closing_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class ProbePack:
    """Traces and probes in one sequence of `num_tokens` tokens, the traces' tokens first.

    Attributes:
        trace_starts: Where each trace starts, and where the last one ends.
        probe_starts: Where the probes of each trace start, and where the last ones end.
        probe_token_ids: `(num_probe_tokens,)` int64, what follows the traces.
        trace_numbers: `(num_tokens,)` int64, the trace a token belongs to.
        positions: `(num_tokens,)` int64, where a token stands, or would stand, in its trace.
        limits: `(num_tokens,)` int64, how many tokens of its trace a token sees.
        subtree_ends: `(num_tokens,)` int64, index after the last descendant of a probe's token; 0 for a trace's.
        readings: For each trace its probes, in the order given.
    """

    trace_starts: tuple[int, ...]
    probe_starts: tuple[int, ...]
    probe_token_ids: Tensor
    trace_numbers: Tensor
    positions: Tensor
    limits: Tensor
    subtree_ends: Tensor
    readings: tuple[tuple[Reading, ...], ...]

    @classmethod
    def build(cls, trace_lengths: Sequence[int], probes: Sequence[Sequence[Probe]]) -> "ProbePack":
        """Lay out traces and their probes.

        Args:
            trace_lengths: Tokens of each trace, prompt included.
            probes: For each trace its probes, in any order.

        Raises:
            ValueError: A probe starts before the first token of its trace or after its last.
        """
        trace_starts = (0, *itertools.accumulate(trace_lengths))
        num_trace_tokens = trace_starts[-1]
        probe_starts = [num_trace_tokens]
        tokens: list[int] = []
        boundaries: list[int] = []
        depths: list[int] = []
        ends: list[int] = []
        readings = []
        for start, length, own in zip(trace_starts, trace_lengths, probes, strict=False):
            rows_of: dict[tuple[int, tuple[int, ...]], list[int]] = {}
            for position in sorted({probe.position for probe in own}):
                if not 1 <= position <= length:
                    raise ValueError(f"a probe at position {position} lies outside its trace of {length} tokens")
                tree = PrefixTree.build([probe.token_ids for probe in own if probe.position == position])
                base = num_trace_tokens + len(tokens)
                for sequence, path in tree.paths.items():
                    # The distribution of a token is read where the one before it stands.
                    rows_of[position, sequence] = [start + position - 1, *(base + node for node in path)]
                tokens += tree.token_ids
                boundaries += [position] * len(tree.token_ids)
                depths += tree.depths
                ends += [base + end for end in tree.ends]
            readings.append(tuple(_reading(probe, rows_of[probe.position, probe.token_ids]) for probe in own))
            probe_starts.append(num_trace_tokens + len(tokens))
        traces = torch.arange(len(trace_lengths))
        trace_positions = torch.cat([torch.arange(length) for length in trace_lengths])
        limits = torch.tensor(boundaries, dtype=torch.int64)
        return cls(
            trace_starts,
            tuple(probe_starts),
            torch.tensor(tokens, dtype=torch.int64),
            torch.cat([_repeat(traces, trace_starts), _repeat(traces, probe_starts)]),
            torch.cat([trace_positions, limits + torch.tensor(depths, dtype=torch.int64)]),
            torch.cat([trace_positions + 1, limits]),
            torch.cat([torch.zeros_like(trace_positions), torch.tensor(ends, dtype=torch.int64)]),
            tuple(readings),
        )

    @property
    def num_trace_tokens(self) -> int:
        """Tokens of all traces."""
        return self.trace_starts[-1]

    @property
    def num_tokens(self) -> int:
        """Tokens of all traces and probes."""
        return self.probe_starts[-1]

    def to(self, device: torch.device) -> "ProbePack":
        """The same pack on another device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return ProbePack(**{**vars(self), **tensors})

    def sees(self, query: Tensor, key: Tensor, sliding_window: int | None = None) -> Tensor:
        """Whether tokens see tokens.

        Args:
            query, key: int64 indices in the sequence, of shapes that broadcast.
            sliding_window: How far back a token sees, itself included, in tokens; None for any.

        Returns:
            bool, of the broadcast shape.
        """
        # Tensors only: compiled for a GPU, a number such as `num_trace_tokens` would mean compiling for every pack.
        of_trace = self.subtree_ends[key] == 0
        same_trace = self.trace_numbers[query] == self.trace_numbers[key]
        in_trace = of_trace & same_trace & (self.positions[key] < self.limits[query])
        in_tree = (key <= query) & (query < self.subtree_ends[key])
        seen = in_trace | in_tree
        if sliding_window is None:
            return seen
        return seen & (self.positions[query] - self.positions[key] < sliding_window)

    def rows(self, all_trace_rows: bool) -> Tensor:
        """Indices, ascending, of the tokens whose next-token distribution is needed.

        Args:
            all_trace_rows: Those of every token of the traces too, for the traces' own log-probabilities.
        """
        needed = {row for own in self.readings for reading in own for row in reading.rows}
        if all_trace_rows:
            needed.update(range(self.num_trace_tokens))
        return torch.tensor(sorted(needed), dtype=torch.int64)


def _repeat(numbers: Tensor, starts: Sequence[int]) -> Tensor:
    return numbers.repeat_interleave(torch.tensor(starts).diff())


def _reading(probe: Probe, rows: Sequence[int]) -> Reading:
    return Reading(
        tuple(rows[probe.scored_from :]), probe.token_ids[probe.scored_from :], tuple(probe.closing_token_ids)
    )


class Vocabulary:
    """Logits of every token, `(num_rows, vocab_size)`; see `megatron_model.VocabularyShard` for some of them."""

    def logsumexp(self, logits: Tensor) -> Tensor:
        """`(num_rows,)`, over all tokens."""
        return logits.logsumexp(dim=1)

    def take(self, logits: Tensor, rows: Tensor, token_ids: Tensor) -> Tensor:
        """The logits of tokens at rows, of shapes that broadcast."""
        return logits[rows, token_ids]


def read_probes(
    pack: ProbePack, rows: Tensor, logits: Tensor, temperatures: Tensor, vocabulary: Vocabulary | None = None
) -> list[list[float]]:
    """Log-probabilities of all probes.

    Args:
        pack: The sequence that was computed.
        rows: `(num_rows,)` int64, ascending, at least one: the tokens that `logits` belong to.
        logits: `(num_rows, vocab_size)`, at temperature 1.
        temperatures: `(num_traces,)`, the rollout temperature of each trace.
        vocabulary: Which tokens the logits are of, if not all.

    Returns:
        For each trace, probe by probe: the counted tokens' log-probabilities and that of the answer's end, summed over
        the closing tokens; nats. 0 for what is read at none of the rows.
    """
    flat = [reading for own in pack.readings for reading in own]
    if not flat:
        return [[] for _ in pack.readings]
    device, vocabulary = logits.device, vocabulary or Vocabulary()
    rows = rows.to(device)
    read_rows = torch.tensor([row for reading in flat for row in reading.rows], device=device)
    here = torch.isin(read_rows, rows)
    unique_rows, place = torch.where(here, read_rows, rows[0]).unique(return_inverse=True)
    at = torch.searchsorted(rows, unique_rows)
    scale = temperatures.to(device, torch.float32)[pack.trace_numbers.to(device)[unique_rows]].unsqueeze(1)
    normalizer = _normalizers(logits, at, scale, vocabulary)
    scores = torch.zeros(len(read_rows), device=device)
    ends = torch.tensor([len(reading.rows) for reading in flat], device=device).cumsum(0)
    is_token = torch.ones(len(read_rows), dtype=torch.bool, device=device)
    is_token[ends - 1] = False

    def log_prob(where: Tensor, token_ids: Tensor) -> Tensor:
        """Of any of the tokens `(num, k)`, at places `(num,)`."""
        own = vocabulary.take(logits, at[where].unsqueeze(1), token_ids).float() / scale[where]
        return own.logsumexp(dim=1) - normalizer[where]

    tokens = torch.tensor([token for reading in flat for token in reading.token_ids], dtype=torch.int64, device=device)
    scores[is_token] = log_prob(place[is_token], tokens.unsqueeze(1))
    by_closing: dict[tuple[int, ...], list[int]] = {}
    for reading, end in zip(flat, ends.tolist(), strict=True):
        by_closing.setdefault(reading.closing_token_ids, []).append(end - 1)
    for closing_ids, indices in by_closing.items():
        # A token listed twice is still one outcome.
        closing = torch.tensor(sorted(set(closing_ids)), device=device)
        for part in torch.tensor(indices, device=device).split(max(1, READ_AT_ONCE // len(closing))):
            scores[part] = log_prob(place[part], closing)
    scores[~here] = 0.0
    values = iter(scores.tolist())
    return [list(itertools.islice(values, sum(len(reading.rows) for reading in own))) for own in pack.readings]


def _normalizers(logits: Tensor, rows: Tensor, scale: Tensor, vocabulary: Vocabulary) -> Tensor:
    """`(num_rows,)` float32 normalizers of some rows of the logits over `scale`, `READ_AT_ONCE` of them at a time."""
    parts = torch.arange(len(rows), device=logits.device).split(max(1, READ_AT_ONCE // logits.shape[1]))
    # Indexed, so a copy: divided in place.
    return torch.cat([vocabulary.logsumexp(logits[rows[part]].float().div_(scale[part])) for part in parts])
