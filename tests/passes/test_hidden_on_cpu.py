"""Hidden states read by a hook: what transformers gives at those tokens, projected; and nothing else kept."""

import hashlib

import pytest
import torch
from torch import nn

from rredcot_verl.passes.hidden_states import decoder_layers, hidden_states, layer_index, project, random_projection
from tests.passes.architectures import ARCHITECTURES, build_model, random_traces

DIM = 8
SEED = 3
TRACES = random_traces([12, 7, 20])
POSITIONS = [[0, 5, 11], [], [3, 19]]
# float32 through three layers, in sequences packed in two ways.
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


def expected(model, trace, positions, layer, dim=DIM, seed=SEED):
    """The same by transformers' own way, one trace at a time, the arithmetic in float64."""
    with torch.no_grad():
        outputs = model(torch.tensor([trace]), output_hidden_states=True)
    # Entry 0 is the embeddings; the last one has been through the final norm, so the hook is not checked against it.
    states = outputs.hidden_states[layer + 1][0, positions].double()
    states = states / (states.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    return (states @ random_projection(states.shape[1], dim, seed).double()).float()


def collect(model, input_ids, rows, layer, **kwargs):
    with torch.no_grad(), hidden_states(model, layer, DIM, SEED) as collected:
        collected.rows = torch.tensor(rows, dtype=torch.int64)
        output = model(input_ids, **kwargs)
    (states,) = collected.collected
    return states, output


def packed():
    """The traces end to end, as verl packs them, and where the wanted tokens are."""
    ids = torch.tensor([[token for trace in TRACES for token in trace]])
    position_ids = torch.cat([torch.arange(len(trace)) for trace in TRACES]).unsqueeze(0)
    rows = [sum(map(len, TRACES[:number])) + position for number, own in enumerate(POSITIONS) for position in own]
    return ids, position_ids, rows


def every_expected(model, layer):
    return torch.cat([expected(model, *pair, layer) for pair in zip(TRACES, POSITIONS, strict=True) if pair[1]])


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("layer", [0, 1])
def test_states_are_those_of_transformers(name, layer):
    model = build_model(name)
    for trace, positions in zip(TRACES, POSITIONS, strict=True):
        states, _ = collect(model, torch.tensor([trace]), positions, layer)
        assert states.shape == (len(positions), DIM) and states.dtype == torch.float32
        if positions:
            torch.testing.assert_close(states, expected(model, trace, positions, layer), **TOLERANCE)


@pytest.mark.parametrize("name", ["qwen3-untied", "qwen3-moe", "gemma3-sliding"])
def test_packed_as_one_by_one(name):
    model = build_model(name)
    ids, position_ids, rows = packed()
    states, _ = collect(model, ids, rows, 1, position_ids=position_ids, use_cache=False)
    torch.testing.assert_close(states, every_expected(model, 1), **TOLERANCE)


def test_negative_layers_count_from_the_end_and_the_last_is_before_the_final_norm():
    model = build_model("llama")
    trace, positions = TRACES[0], POSITIONS[0]
    for layer in range(3):
        from_end, _ = collect(model, torch.tensor([trace]), positions, layer - 3)
        from_start, _ = collect(model, torch.tensor([trace]), positions, layer)
        assert torch.equal(from_end, from_start)
    model.model.norm = nn.Identity()
    states, _ = collect(model, torch.tensor([trace]), positions, -1)
    torch.testing.assert_close(states, expected(model, trace, positions, 2), **TOLERANCE)


def test_the_pass_is_what_it_was():
    """To the bit, and the hook is gone afterwards, also when the pass fails."""
    model = build_model("qwen3-untied")
    ids, position_ids, rows = packed()
    with torch.no_grad():
        before = model(ids, position_ids=position_ids).logits
    _, output = collect(model, ids, rows, 1, position_ids=position_ids)
    assert torch.equal(output.logits, before)
    with pytest.raises(RuntimeError, match="`rows` does not say"), hidden_states(model, 0, DIM, SEED):
        model(ids)
    assert not any(layer._forward_hooks for layer in decoder_layers(model))


def test_gradients_are_what_they_were_and_none_come_from_the_states():
    model = build_model("qwen3-untied")
    ids = torch.tensor([TRACES[0]])
    gradients = []
    for read in (False, True):
        model.zero_grad()
        if read:
            with hidden_states(model, 1, DIM, SEED) as collected:
                collected.rows = torch.tensor([0, 4])
                model(ids, labels=ids).loss.backward()
            assert not collected.collected[0].requires_grad
        else:
            model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_several_layers_at_once():
    model = build_model("qwen3-untied")
    ids, rows = torch.tensor([TRACES[0]]), POSITIONS[0]
    with torch.no_grad(), hidden_states(model, 0, DIM, SEED) as first, hidden_states(model, -2, DIM, SEED) as second:
        first.rows = second.rows = torch.tensor(rows)
        model(ids)
    assert torch.equal(first.collected[0], collect(model, ids, rows, 0)[0])
    assert torch.equal(second.collected[0], collect(model, ids, rows, 1)[0])


def test_nothing_of_the_sequence_is_kept():
    """The only tensors of the collector are `(num_rows, dim)`, and no view of anything larger."""
    model = build_model("qwen3-untied")
    ids, position_ids, rows = packed()
    with torch.no_grad(), hidden_states(model, 1, DIM, SEED) as collected:
        for _ in range(3):
            collected.rows = torch.tensor(rows)
            model(ids, position_ids=position_ids)
    assert [tuple(states.shape) for states in collected.collected] == [(len(rows), DIM)] * 3
    held = [value for value in vars(collected).values() if isinstance(value, torch.Tensor)] + collected.collected
    for tensor in held:
        assert tensor.untyped_storage().nbytes() <= max(len(rows) * DIM * 4, len(rows) * 8)


def test_shards_of_a_sequence_sum_to_the_whole():
    """As sequence parallelism cuts it: every rank has its stretch of the tokens, the others' states are 0 there.

    Whatever stands behind a stretch, as probes do.
    """
    stream = torch.randn(1, 12, 32)
    model = build_model("qwen3-untied")
    rows = torch.tensor([0, 5, 6, 11])

    def read(part, shard):
        with hidden_states(model, 0, DIM, SEED) as collected:
            collected.rows, collected.shard = rows, shard
            collected.read(nn.Identity(), (), part)
        return collected.collected[0]

    whole, probes = read(stream, None), torch.randn(1, 3, 32)
    for behind in (probes[:, :0], probes):
        stretches = [torch.cat([stretch, behind], dim=1) for stretch in stream.split(4, dim=1)]
        parts = [read(stretch, (rank, 3, 4)) for rank, stretch in enumerate(stretches)]
        torch.testing.assert_close(sum(parts), whole)
        assert [int((part != 0).any(dim=1).sum()) for part in parts] == [1, 2, 1]


def test_the_scale_of_a_state_does_not_count():
    states = torch.randn(5, 32)
    projection = random_projection(32, DIM, SEED)
    torch.testing.assert_close(project(1e3 * states, projection), project(states, projection), atol=1e-5, rtol=1e-5)
    assert torch.isfinite(project(torch.zeros(1, 32), projection)).all()


def test_autocast_does_not_round_the_projection():
    states, projection = torch.randn(5, 64), random_projection(64, DIM, SEED)
    exact = project(states, projection)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(project(states, projection), exact)
    half = states.bfloat16()
    assert torch.equal(project(half, projection), project(half.float(), projection))


def digest(projection) -> str:
    return hashlib.sha256(projection.contiguous().numpy().astype("<f4").tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    "sizes, checksum",
    [((896, 64, 0), "4678aac96e4db4e2"), ((32, 8, 3), "b75c7b8675193204"), ((5, 3, 12345), "c776754828ab2b6a")],
)
def test_the_projection_of_a_seed_is_always_the_same(sizes, checksum):
    projection = random_projection(*sizes)
    assert projection.shape == sizes[:2] and projection.dtype == torch.float32
    assert digest(projection) == checksum
    # In any process, whatever anyone has drawn, and whatever torch's defaults are.
    torch.manual_seed(sum(sizes))
    torch.set_default_dtype(torch.float64)
    try:
        assert digest(random_projection.__wrapped__(*sizes)) == checksum
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_projection_keeps_lengths():
    """Johnson-Lindenstrauss: of states of root mean square 1 every feature has about a variance of 1."""
    projection = random_projection(1024, 256, 0)
    states = project(torch.randn(200, 1024, generator=torch.Generator().manual_seed(0)), projection)
    assert states.square().mean().item() == pytest.approx(1.0, abs=0.05)
    assert states.square().sum(dim=1).div(256).std() < 0.2
    assert projection.mean(dim=0).abs().max() < 5 / 1024
    assert not torch.equal(projection, random_projection(1024, 256, 1))


@pytest.mark.parametrize("sizes", [(0, 1, 0), (1, 0, 0), (4, 4, -1)])
def test_a_projection_of_nothing_is_refused(sizes):
    with pytest.raises(ValueError, match="at least"):
        random_projection(*sizes)


def test_experts_are_not_taken_for_layers():
    """As many experts as layers, in lists, one of them before the layers' own end."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    model = build_model("qwen3-untied")
    model.model.layers = nn.ModuleList(Layer() for _ in range(3))
    assert decoder_layers(model) is model.model.layers


def test_a_model_without_layers_is_refused():
    model = build_model("qwen3-untied")
    del model.model.layers[2]
    with pytest.raises(ValueError, match="no list of its 3 decoder layers"):
        decoder_layers(model)
    with pytest.raises(ValueError, match="no config"):
        decoder_layers(nn.Linear(2, 2))


@pytest.mark.parametrize("layer", [-4, 3, 28])
def test_a_layer_out_of_range_is_refused(layer):
    message = rf"algorithm.rredcot.readout.layer={layer} .* the model has 3 decoder layers"
    with pytest.raises(ValueError, match=message):
        layer_index(layer, 3)
    with pytest.raises(ValueError, match=message), hidden_states(build_model("llama"), layer, DIM, SEED):
        pass


def test_a_layer_without_a_residual_stream_is_refused():
    with hidden_states(build_model("llama"), 0, DIM, SEED) as collected:
        collected.rows = torch.tensor([0])
        with pytest.raises(RuntimeError, match=r"shape \(4, 1, 5, 32\)"):
            collected.read(nn.Identity(), (), torch.zeros(4, 1, 5, 32))


@pytest.mark.parametrize("row", [-1, 12])
def test_a_token_outside_the_pass_is_refused(row):
    model = build_model("llama")
    with pytest.raises(RuntimeError, match=rf"tokens \[0, {row}\] of a pass of 12 tokens"):
        collect(model, torch.tensor([TRACES[0]]), [0, row], 0)
