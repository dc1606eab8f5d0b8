"""Who sees whom is compiled on a GPU, FlexAttention's kernel with it: once for all packs, not for every one."""

import torch
import torch._dynamo.testing

from rredcot_verl.passes.probe_pack import ProbePack
from tests.passes.architectures import random_probes


def _mask_function(pack):
    """As `make_block_mask` writes it."""

    def sees(query, key):
        return pack.sees(query, key)

    return sees


def test_packs_of_many_shapes_share_one_compiled_mask():
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    for lengths in ((30,), (41,), (30, 20), (9, 50, 33), (20, 20, 20, 20), (12, 5, 8, 40, 30), (9, 9), (64,)):
        pack = ProbePack.build(lengths, [random_probes(length, 3, seed=length) for length in lengths])

        index = torch.arange(pack.num_tokens)
        compiled = torch.compile(_mask_function(pack), backend=counter)(index.unsqueeze(1), index.unsqueeze(0))
        assert torch.equal(compiled, pack.sees(index.unsqueeze(1), index.unsqueeze(0)))
    # One for the first shape, one for all others.
    assert counter.frame_count <= 2
