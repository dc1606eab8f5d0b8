"""The check for the day a GPU is at hand: what only a GPU runs, judged, in one command of at most some minutes.

Owner: the core maintainers. Has not run on a GPU yet.

    python scripts/check_gpu.py [--minutes 7] [--only WORD ...]

Needs this repository, torch and transformers; with verl installed, checks verl's engine too. Weights are random.
One JSON line a finding and a table of them all at the end. A finding is `ok`, `suspicious`,
`failed` or `skipped`, with its reasons; its `limits` are the most that a figure may be to be ok, and not to be failed.
A finding that breaks is failed, and the next one goes on; none begins after `--minutes`. Exits with 1 where one failed.

    numbers        probes read in the shared pass (FlexAttention on a GPU) against a sequence for each, several
                   architectures; in float32 the largest difference in nats; in bfloat16 the mean error to float32, over
                   the mean error of the model's own attention in bfloat16
    compilations   graphs that torch compiles and seconds, over 14 packs of different sizes
    fsdp2          the numbers of a model in FSDP2 with bfloat16 and autocast, as verl wraps it
    verl           the numbers of verl's engine, and old log-probabilities beside verl's own pass
    passes         plain, packed and fused passes at the shapes of Qwen3: seconds, graphs compiled, peak GiB over the
                   weights against the dry run's estimate, and how far the traces' own log-probabilities move
    naive          a sequence for each probe against the shared pass: seconds, difference of the numbers

`--tiny` is a trial of the script in seconds; without a GPU it takes the attention in parts of other devices.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]

from self_value_bench import passes  # noqa: E402
from self_value_bench.clock import Measured  # noqa: E402
from self_value_bench.machine import machine  # noqa: E402
from self_value_bench.work import build_model, make_traces, make_work, qwen3  # noqa: E402

from rredcot_verl.passes import shared_attention  # noqa: E402
from rredcot_verl.passes.probe_pack import ProbePack, count_probe_tokens  # noqa: E402
from rredcot_verl.passes.shared_attention import SharedPrefix, why_not_shared  # noqa: E402
from rredcot_verl.preflight.pass_memory import LogProbPass, pass_bytes  # noqa: E402
from rredcot_verl.probes.probe import Probe  # noqa: E402

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    # Wide, so that distributions depend on what a token sees.
    "initializer_range": 0.1,
    "attn_implementation": "sdpa",
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(**SMALL | {"num_attention_heads": 14}),
    "qwen3": Qwen3Config(**SMALL),
    "qwen3-moe": Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    "llama": LlamaConfig(**SMALL),
    "mistral-sliding": MistralConfig(**SMALL, sliding_window=100),
    "gemma2-capped": Gemma2Config(
        **SMALL | {"attn_implementation": "eager"}, sliding_window=100, attn_logit_softcapping=5.0
    ),
}
PACKS = ((300, 1, 77), (513, 120), (128,), (640, 200, 33, 9))
TINY_PACKS = ((60, 1, 20), (150,))
SHORT_PACKS = ((20,), (9, 1))
"""Tokens of traces that share a pass; the last are within one block of FlexAttention's, which has a kernel for that."""

SIZES = (1000, 300, 512, 1024, 25000, 640, 4096, 2000, 16384, 8192, 3000, 33000, 10000, 6000)
"""Tokens of packs, some of them whole blocks of FlexAttention's."""

OPENING, ANSWERS = 12, 4
"""Tokens of an answer's opening, and answers at a boundary."""


@dataclass(frozen=True)
class Load:
    """Traces of one length, and their probes: boundaries of a trace, and tokens of an answer."""

    num_traces: int
    num_tokens: int
    num_segments: int = 16
    num_answer_tokens: int = 4


LOADS = {"4 x 8k": Load(4, 8000), "1 x 25k": Load(1, 25000), "20 x 1k": Load(20, 1000), "code": Load(2, 4000, 8, 300)}
ONE_TRACE = Load(1, 8000)
TINY_LOADS = {"3 x 80": Load(3, 80, 4, 3), "code": Load(1, 80, 3, 20)}
SHAPES_CHECKED = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b")

Limits = tuple[float, float | None]
"""The most that a figure may be to be ok, and not to be failed; None where it cannot fail."""

FLOAT32_NATS: Limits = (2e-4, 2e-3)
ERROR_OVER_OWN: Limits = (1.5, 3.0)
SHIFT_OVER_SPREAD: Limits = (0.1, 0.3)
"""Another kernel of a model's own moves 0.03 in bfloat16 (28 layers on a CPU), one that sees nothing before it 1."""

LAYER_GRAPHS: Limits = (4, 8)
PASS_GRAPHS: Limits = (8, 16)
PEAK_OVER_ESTIMATE: Limits = (1.2, 1.5)
ESTIMATE_OVER_PEAK: Limits = (1.2, None)
FUSED_TOKEN_OVER_PLAIN: Limits = (1.5, None)
SHARED_OVER_NAIVE: Limits = (0.5, None)
LEAST_SPREAD = 0.3


class Skipped(Exception):
    """Why a finding cannot be made here."""


@dataclass
class Finding:
    """What one check found.

    Attributes:
        figures: By name.
        limits: Of some of them, the most to be ok, and not to be failed.
        verdict: `ok`, `suspicious`, `failed` or `skipped`.
        reasons: Why it is not ok.
    """

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Limits] = field(default_factory=dict)
    verdict: str = "ok"
    reasons: list[str] = field(default_factory=list)

    def judge(self, verdict: str, reason: str) -> None:
        """Note a verdict other than ok; what has failed stays so."""
        self.verdict = self.verdict if self.verdict == "failed" else verdict
        self.reasons.append(reason)

    def expect(self, name: str, value: float, limits: Limits) -> None:
        """Note a figure and hold it against its limits; NaN is over all of them."""
        self.figures[name], self.limits[name] = value, limits
        ok, not_failed = limits
        if not_failed is not None and not value <= not_failed:
            self.judge("failed", f"{name} {value:.3g} over {not_failed:.3g}")
        elif not value <= ok:
            self.judge("suspicious", f"{name} {value:.3g} over {ok:.3g}")

    def run(self, call: Callable[["Finding"], None]) -> None:
        """Make the finding; whatever breaks is a failure of this one."""
        started, before = time.perf_counter(), num_graphs()
        try:
            call(self)
        except Skipped as error:
            self.judge("skipped", str(error))
        except Exception as error:
            self.judge("failed", " ".join(f"{type(error).__name__}: {error}".split())[:500])
            self.figures["traceback"] = traceback.format_exc(limit=-5)[-2000:]
        self.figures |= {"seconds_in_all": time.perf_counter() - started, "graphs_in_all": num_graphs() - before}
        # What an error held is free by now.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class World:
    """Where the checks run: on a device, as a trial or not, with a folder for files."""

    device: torch.device
    tiny: bool
    folder: Path

    @property
    def dtype(self) -> torch.dtype:
        """Of the large models."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def packs(self) -> Sequence[Sequence[int]]:
        """Tokens of traces that share a pass of the small models."""
        return TINY_PACKS if self.tiny else PACKS

    def synchronize(self) -> None:
        """Wait until what was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def num_graphs() -> int:
    """Graphs that torch has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


Batch = tuple[list[list[int]], list[list[Probe]]]
"""Traces and the probes of each."""


def make_batch(lengths: Sequence[int], vocab_size: int, num_segments: int, num_answers: int, num_tokens: int) -> Batch:
    """Random traces with probes after their first token and at further boundaries."""
    traces, probes = [], []
    for seed, length in enumerate(lengths):
        own = make_traces(1, length, vocab_size, seed)
        work = make_work(own, 1, num_segments, num_answers, OPENING, num_tokens, vocab_size, seed)
        traces += own
        probes += work.probes
    return traces, probes


def load_batch(load: Load, vocab_size: int) -> Batch:
    """The traces and probes of a load."""
    lengths = [load.num_tokens] * load.num_traces
    return make_batch(lengths, vocab_size, load.num_segments, ANSWERS, load.num_answer_tokens)


def small_batches(packs: Sequence[Sequence[int]]) -> list[Batch]:
    """Traces and probes of small packs."""
    return [make_batch(lengths, SMALL["vocab_size"], 5, 2, 3) for lengths in packs]


def read(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Tensor]:
    """The probes' numbers of each trace, in the shared pass."""
    return [own for traces, probes in batches for own in passes.shared(model, traces, probes, 10**6, False)[1]]


def read_naively(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Tensor]:
    """The same, with a sequence for each probe."""
    return [own for traces, probes in batches for own in passes.naive(model, traces, probes)]


def in_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same weights; rotary frequencies stay as exact as in a model loaded so."""
    low = build_model(model.config, model.device, torch.bfloat16, 0)
    low.load_state_dict(model.state_dict())
    return low


def compare(finding: Finding, truth: Sequence[Tensor], own: Sequence[Tensor] | None, found: Sequence[Tensor]) -> None:
    """Hold numbers against float32's: by themselves, or beside those of the model's own attention in bfloat16."""
    exact, numbers = torch.cat([*truth]), torch.cat([*found])
    errors = (numbers - exact).abs()
    finding.figures |= {"numbers": len(exact), "spread": exact.std().item(), "mean_error": errors.mean().item()}
    if not exact.std() >= LEAST_SPREAD:
        finding.judge("failed", f"the numbers hardly differ among themselves: spread below {LEAST_SPREAD}")
    if own is None:
        finding.expect("largest_error", errors.max().item(), FLOAT32_NATS)
    else:
        finding.figures["largest_error"] = errors.max().item()
        errors_of_own = (torch.cat([*own]) - exact).abs()
        finding.expect("error_over_own", (errors.mean() / errors_of_own.mean()).item(), ERROR_OVER_OWN)


def numbers(
    world: World, config: PreTrainedConfig, packs: Sequence[Sequence[int]], dtype: torch.dtype, finding: Finding
) -> None:
    """Probes in the shared pass against a sequence for each."""
    reason = why_not_shared(config, world.device.type)
    if reason is not None:
        raise Skipped(reason)
    torch._dynamo.reset()
    batches = small_batches(packs)
    model = build_model(config, world.device, torch.float32, 0)
    truth, own = read_naively(model, batches), None
    if dtype is torch.bfloat16:
        model = in_bfloat16(model)
        own = read_naively(model, batches)
    compare(finding, truth, own, read(model, batches))


def compilations(world: World, finding: Finding) -> None:
    """One layer's attention over packs of many sizes, its mask included."""
    if world.device.type != shared_attention.FLEX_DEVICE:
        raise Skipped(f"FlexAttention is compiled on {shared_attention.FLEX_DEVICE}")
    torch._dynamo.reset()
    num_heads, num_kv_heads, head_dim = (4, 2, 16) if world.tiny else (16, 8, 128)
    num_probe_tokens = count_probe_tokens(make_batch([9], 512, 4, 2, 3)[1][0])
    sizes, seconds, graphs = [], [], []
    for num_tokens in SIZES[:4] if world.tiny else SIZES:
        traces, probes = make_batch([num_tokens - num_probe_tokens], 512, 4, 2, 3)
        pack = ProbePack.build([len(trace) for trace in traces], probes).to(world.device)
        query, key, value = (
            # As a layer lays them out.
            torch.randn(1, pack.num_tokens, heads, head_dim, device=world.device, dtype=world.dtype).transpose(1, 2)
            for heads in (num_heads, num_kv_heads, num_kv_heads)
        )
        world.synchronize()
        started, before = time.perf_counter(), num_graphs()
        with torch.no_grad():
            SharedPrefix(pack).attend(query, key, value, scaling=head_dim**-0.5)
        world.synchronize()
        sizes.append(pack.num_tokens)
        seconds.append(time.perf_counter() - started)
        graphs.append(num_graphs() - before)
    finding.figures |= {"tokens": sizes, "seconds": seconds, "graphs": graphs}
    finding.expect("graphs_of_the_first", graphs[0], (2, LAYER_GRAPHS[1]))
    finding.expect("graphs_of_all", sum(graphs), LAYER_GRAPHS)


def process_group(world: World) -> None:
    """A process group of one rank, once."""
    if torch.distributed.is_initialized():
        return
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    try:
        torch.distributed.init_process_group(backend, init_method=f"file://{world.folder}/store", rank=0, world_size=1)
    except (RuntimeError, ValueError) as error:
        raise Skipped(f"no process group of one rank: {error}") from error


def fsdp2(world: World, finding: Finding) -> None:
    """The shared pass of a model that FSDP2 wraps, in bfloat16 with autocast."""
    process_group(world)
    torch._dynamo.reset()
    batches = small_batches(world.packs)
    model = build_model(ARCHITECTURES["qwen3"], world.device, torch.float32, 0)
    truth, own = read_naively(model, batches), read_naively(in_bfloat16(model), batches)
    mesh = torch.distributed.init_device_mesh(world.device.type, (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=True)
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    with torch.autocast(world.device.type, torch.bfloat16):
        compare(finding, truth, own, read(model, batches))


def verls_engine(world: World, finding: Finding) -> None:
    """A fused pass of verl's FSDP2 engine in bfloat16; the engines are the ones of `tests/passes`."""
    if world.device.type == "cpu":
        os.environ["VERL_PLATFORM"] = "cpu"
    try:
        import rredcot_verl.register  # noqa: F401
        from rredcot_verl.passes.protocol import ALONE, FIELDS, MODEL_TYPE, PASSES
        from tests.passes.cases import PLAIN, Rows
        from tests.passes.ranks import build_engine, run_pass
    except ImportError as error:
        raise Skipped(f"verl's engine cannot be imported: {error}") from error
    process_group(world)
    torch._dynamo.reset()
    batches = small_batches(world.packs)
    model = build_model(ARCHITECTURES["qwen3"], world.device, torch.float32, 0)
    truth, own = read_naively(model, batches), read_naively(in_bfloat16(model), batches)
    model.save_pretrained(world.folder / "model")
    traces, probes = ([each for batch in batches for each in batch[part]] for part in (0, 1))
    rows = Rows(traces, probes, [[]] * len(traces), [None] * len(traces))
    settings = PLAIN | {"temperature": 1.0, "max_token_len_per_gpu": 1000}
    asked = {PASSES: (("probes", ()),), ALONE: False}
    ours, verls = (
        run_pass(build_engine(model_type, {"path": str(world.folder / "model")}, "bf16"), rows, settings | more)
        for model_type, more in ((MODEL_TYPE, asked), ("language_model", {}))
    )
    compare(finding, truth, own, [each.cpu().float() for each in ours["fields"][FIELDS["probes"].result]])
    shift(finding, "old_log_prob", verls["fields"]["log_probs"], ours["fields"]["log_probs"])


def shift(finding: Finding, name: str, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """How far log-probabilities of traces have moved, over how far they differ among themselves."""
    # The last token's label is not its own.
    one, other = (torch.cat([own[:-1].float().cpu() for own in each]) for each in (before, after))
    moved = (one - other).abs()
    finding.figures |= {f"{name}_shift_mean": moved.mean().item(), f"{name}_shift_largest": moved.max().item()}
    finding.expect(f"{name}_shift_over_spread", (moved.mean() / one.std()).item(), SHIFT_OVER_SPREAD)


@functools.lru_cache(maxsize=1)
def model_of(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of Qwen3's shape, kept until another is asked for."""
    torch._dynamo.reset()
    return build_model(qwen3(shape), device, dtype, 0)


def estimated_gib(model: PreTrainedModel, of: LogProbPass) -> float:
    """What the dry run expects a pass to take beside the weights, at temperature 1 with compiled entropies."""
    actor = SimpleNamespace(fsdp_config=SimpleNamespace(use_torch_compile=True))
    rollout, kernels = SimpleNamespace(temperature=1.0), SimpleNamespace(use_fused_kernels=False)
    run = SimpleNamespace(actor_rollout_ref=SimpleNamespace(actor=actor, rollout=rollout, model=kernels))
    return max(pass_bytes(run, model.config, of)) / 2**30


def run_passes(world: World, shape: str, load: Load, finding: Finding) -> None:
    """A plain pass for each trace, all traces in one pack, and the same with their probes."""
    model = model_of(shape, world.device, world.dtype)
    traces, probes = load_batch(load, model.config.vocab_size)
    num_tokens, none = sum(map(len, traces)), [[] for _ in traces]
    num_read = len(ProbePack.build([len(trace) for trace in traces], probes).rows(all_trace_rows=False))
    fused = LogProbPass(num_tokens, 0, sum(map(count_probe_tokens, probes)), num_read)
    variants: Mapping[str, tuple[LogProbPass, Callable[[], Any]]] = {
        "plain": (LogProbPass(load.num_tokens), lambda: (passes.plain(model, traces), [])),
        "packed": (LogProbPass(num_tokens), lambda: passes.shared(model, traces, none, num_tokens, True)),
        "fused": (fused, lambda: passes.shared(model, traces, probes, num_tokens, True)),
    }
    finding.figures |= {"tokens": num_tokens, "probe_tokens": fused.num_probe_tokens, "read_rows": num_read}
    found = {}
    for name, (of, call) in variants.items():
        first, found[name] = Measured(), Measured()
        before = num_graphs()
        for measured in (first, found[name]):
            measured.run(0, call, world.device, "wall")
        estimate, peak = estimated_gib(model, of), (found[name].peak_mib or 0) / 2**10
        finding.figures |= {
            f"{name}_first_s": first.median,
            f"{name}_s": found[name].median,
            f"{name}_graphs": num_graphs() - before,
            f"{name}_gib": peak,
            f"{name}_estimated_gib": estimate,
        }
        if world.device.type == "cuda":
            finding.expect(f"{name}_peak_over_estimate", peak / estimate, PEAK_OVER_ESTIMATE)
            finding.expect(f"{name}_estimate_over_peak", estimate / peak, ESTIMATE_OVER_PEAK)
        if name != "plain":
            shift(finding, name, found["plain"].result[0], found[name].result[0])
    finding.expect("graphs", sum(finding.figures[f"{name}_graphs"] for name in variants), PASS_GRAPHS)
    per_token = found["fused"].median / fused.num_tokens / (found["plain"].median / num_tokens)
    finding.expect("fused_token_over_plain", per_token, FUSED_TOKEN_OVER_PLAIN)


def naive_against_shared(world: World, shape: str, load: Load, finding: Finding) -> None:
    """Seconds and numbers of a sequence for each probe, and of the shared pass that reads them only."""
    model = model_of(shape, world.device, world.dtype)
    traces, probes = load_batch(load, model.config.vocab_size)
    naive, first, shared = Measured(), Measured(), Measured()
    for measured in (first, shared):
        measured.run(0, lambda: passes.shared(model, traces, probes, load.num_tokens, False)[1], world.device, "wall")
    naive.run(0, lambda: passes.naive(model, traces, probes), world.device, "wall")
    finding.figures |= {"naive_s": naive.median, "shared_s": shared.median, "shared_first_s": first.median}
    finding.expect("shared_over_naive", shared.median / naive.median, SHARED_OVER_NAIVE)
    moved, exact = (torch.cat(shared.result) - torch.cat(naive.result)).abs(), torch.cat(naive.result)
    finding.figures |= {"difference_mean": moved.mean().item(), "difference_largest": moved.max().item()}
    finding.expect("difference_over_spread", (moved.mean() / exact.std()).item(), SHIFT_OVER_SPREAD)


def all_checks(world: World) -> Iterator[tuple[str, Callable[[Finding], None]]]:
    """Every finding's name and how it is made, what is quick and most telling first."""
    models = [(name, config, world.packs) for name, config in ARCHITECTURES.items()]
    models.append(("qwen2-short", ARCHITECTURES["qwen2"], SHORT_PACKS))
    for (name, config, packs), dtype in itertools.product(models, (torch.float32, torch.bfloat16)):
        yield f"numbers {name} {str(dtype)[6:]}", functools.partial(numbers, world, config, packs, dtype)
    yield "compilations", functools.partial(compilations, world)
    yield "fsdp2", functools.partial(fsdp2, world)
    yield "verl", functools.partial(verls_engine, world)
    loads = TINY_LOADS if world.tiny else LOADS
    for shape in ("tiny",) if world.tiny else SHAPES_CHECKED:
        for name, load in loads.items():
            yield f"passes {shape} {name}", functools.partial(run_passes, world, shape, load)
        one = TINY_LOADS["code"] if world.tiny else ONE_TRACE
        yield f"naive {shape}", functools.partial(naive_against_shared, world, shape, one)


def table(findings: Sequence[Finding]) -> str:
    """The findings for people."""
    rows = [("finding", "verdict", "seconds", "graphs", "why, or what was judged"), ("---",) * 5]
    for each in findings:
        judged = [f"{name} {each.figures[name]:.3g}" for name in each.limits]
        timing = [f"{each.figures.get(name, 0):.4g}" for name in ("seconds_in_all", "graphs_in_all")]
        rows.append((each.name, each.verdict, *timing, "; ".join(each.reasons or judged)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main() -> int:
    """Make all findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7, help="after this long no finding begins")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="findings whose name has one of these words in it")
    parser.add_argument("--tiny", action="store_true", help="a trial in seconds, on a CPU too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        parser.error("no GPU is found; --tiny tries the script without one")
    started, findings = time.monotonic(), []
    # Beyond its limit of compilations torch would go on uncompiled, slowly and in more memory.
    limit = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
    with limit, tempfile.TemporaryDirectory() as folder:
        world = World(torch.device(options.device), options.tiny, Path(folder))
        sys.stdout.write(json.dumps(machine(world.device)) + "\n")
        for name, call in all_checks(world):
            if options.only and not any(word in name for word in options.only):
                continue
            finding = Finding(name)
            if time.monotonic() - started > 60 * options.minutes:
                finding.judge("skipped", f"no time left of {options.minutes:g} minutes")
            else:
                # Other libraries print.
                with contextlib.redirect_stdout(sys.stderr):
                    finding.run(call)
            findings.append(finding)
            sys.stdout.write(json.dumps(vars(finding)) + "\n")
            sys.stdout.flush()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    sys.stdout.write("\n" + table(findings))
    return int(any(finding.verdict == "failed" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
