"""A pack whose tokens are split over the ranks of verl's Ulysses, which attends a share of the heads on each rank.

Every rank computes the traces' tokens that verl gives it, so verl's own numbers stay where they are, and behind them an
equal share of the probes' tokens. For attention the heads are dealt out and the sequence is put together, as verl does
around flash attention; the tokens then stand in the order of the pack, and everything that knows packs works as ever.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad
from verl.utils.ulysses import gather_heads_scatter_seq, gather_seq_scatter_heads

from rredcot_verl.passes.probe_pack import ProbePack


@dataclass(frozen=True)
class SequenceSplit:
    """Which tokens of a pack a rank computes.

    Attributes:
        group: The ranks that share a sequence.
        rank: This one's number among them.
        num_tokens: Tokens of each rank, those that pad the probes to a multiple of the ranks included.
        order: `(pack.num_tokens,)` int64, where each token of the pack stands among all ranks' tokens laid end to end.
    """

    group: ProcessGroup
    rank: int
    num_tokens: int
    order: Tensor

    @classmethod
    def build(cls, pack: ProbePack, group: ProcessGroup) -> "SequenceSplit":
        """The split of a pack whose traces verl has padded to a multiple of the ranks."""
        num_ranks, num_probe_tokens = group.size(), len(pack.probe_token_ids)
        num_of_traces = pack.num_trace_tokens // num_ranks
        num_tokens = num_of_traces + -(-num_probe_tokens // num_ranks)
        places = torch.arange(num_ranks * num_tokens, device=pack.positions.device).view(num_ranks, num_tokens)
        of_probes = places[:, num_of_traces:].flatten()[:num_probe_tokens]
        return cls(group, group.rank(), num_tokens, torch.cat([places[:, :num_of_traces].flatten(), of_probes]))

    def own(self, probes: Tensor) -> Tensor:
        """This rank's share of `(1, num_probe_tokens)` entries, padded with 0."""
        num_ranks = self.group.size()
        return pad(probes, (0, -probes.shape[1] % num_ranks)).tensor_split(num_ranks, dim=1)[self.rank]

    def here(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of some tokens of the pack, ascending, those of this rank and where they stand among its tokens.

        Its first token where there are none: a model must be called all the same.
        """
        places = self.order[rows.to(self.order.device)]
        mine = (places // self.num_tokens == self.rank).to(rows.device)
        if not mine.any():
            first = self.order == self.rank * self.num_tokens
            return first.nonzero()[:, 0].to(rows), rows.new_zeros(1)
        return rows[mine], places.to(rows)[mine] % self.num_tokens

    def gather(self, heads: Tensor) -> Tensor:
        """The whole pack for this rank's share of the heads.

        Args:
            heads: `(1, num_heads, num_tokens, head_dim)`, this rank's tokens; fewer heads than ranks are repeated.

        Returns:
            `(1, max(num_heads, num_ranks) / num_ranks, pack.num_tokens, head_dim)`.
        """
        num_ranks = self.group.size()
        if heads.shape[1] < num_ranks:
            heads = heads.repeat_interleave(num_ranks // heads.shape[1], dim=1)
        together: Tensor = gather_seq_scatter_heads(heads, seq_dim=2, head_dim=1, group=self.group)
        return together[:, :, self.order]

    def scatter(self, output: Tensor) -> Tensor:
        """Take `(1, pack.num_tokens, heads_of_a_rank, dim)` back to `(1, num_tokens, num_heads, dim)`."""
        together = output.new_zeros(1, self.group.size() * self.num_tokens, *output.shape[2:])
        together[:, self.order] = output
        scattered: Tensor = gather_heads_scatter_seq(together, head_dim=2, seq_dim=1, group=self.group)
        return scattered
