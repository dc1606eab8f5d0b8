"""The policy from a HuggingFace folder, and its log-probability passes over packed traces."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from rredcot_verl.passes.probe_pack import READ_AT_ONCE, ProbePack
from rredcot_verl.passes.shared_attention import shared_prefix, why_not_shared
from rredcot_verl.probes.probe import Probe
from rredcot_verl.probes.vocabulary import ends_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACK_TOKENS, _MOST_PACK_TOKENS = 4096, 32768
"""Tokens of a forward pass unless told otherwise, and at most where a GPU has room for more."""


@dataclass
class Policy:
    """A model that is measured.

    Attributes:
        model: In evaluation mode, on its device.
        tokenizer: Its tokenizer.
        eos_token_ids: Tokens that end a response.
        max_length: Longest sequence it takes, in tokens; None where its config does not say.
    """

    model: PreTrainedModel
    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    max_length: int | None

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.model.device

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.model.config.get_text_config(decoder=True).num_hidden_layers)

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def check_folder(path: str) -> Path:
    """The folder of a model.

    Raises:
        ValueError: It is not a folder with a `config.json`.
    """
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        found = "no such folder" if not folder.is_dir() else "no config.json in it"
        raise ValueError(f"--model {path}: {found}; expected a HuggingFace folder with model and tokenizer")
    return folder


def fingerprint(folder: Path) -> str:
    """Tells one model from another without reading all of it: config, sizes, and the ends of the weights."""
    digest = 0
    for file in sorted(folder.glob("*")):
        if file.suffix not in (".json", ".safetensors", ".bin"):
            continue
        size = file.stat().st_size
        digest = zlib.crc32(f"{file.name} {size}".encode(), digest)
        with file.open("rb") as opened:
            digest = zlib.crc32(opened.read(1 << 20), digest)
            opened.seek(max(0, size - (1 << 20)))
            digest = zlib.crc32(opened.read(), digest)
    return f"{digest:08x}"


def load_policy(folder: Path, device: str, dtype: str) -> Policy:
    """Load model and tokenizer.

    Args:
        folder: A HuggingFace folder.
        device: E.g. `cpu` or `cuda:0`.
        dtype: A key of `DTYPES`, or `auto`: float32 on a CPU, bfloat16 elsewhere.

    Raises:
        ValueError: The device is not there, or the folder cannot be loaded.
    """
    chosen = DTYPES[dtype if dtype != "auto" else default_dtype(device)]
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=chosen)
        model = model.to(device).eval()
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"--model {folder}: cannot be loaded on {device}: {error}") from error
    eos = ends_of(tokenizer, model.generation_config)
    if not eos:
        raise ValueError(f"--model {folder}: neither tokenizer nor generation config names an end-of-sequence token")
    # What is sampled goes by the command line alone.
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return Policy(model, tokenizer, tuple(eos), positions)


def default_dtype(device: str) -> str:
    """The numbers of `--dtype auto`."""
    return "float32" if device.startswith("cpu") else "bfloat16"


@dataclass(frozen=True)
class PackedPass:
    """One forward pass over packed traces with their probes.

    Attributes:
        pack: The layout.
        rows: Indices of the tokens whose logits were computed.
        logits: `(num_rows, vocab_size)`, at temperature 1.
    """

    pack: ProbePack
    rows: Tensor
    logits: Tensor

    def log_probs(self, traces: Sequence[Sequence[int]], temperature: float) -> list[Tensor]:
        """For each trace `(num_tokens - 1,)` log-probabilities of its tokens but the first; needs all its rows."""
        found = []
        for start, trace in zip(self.pack.trace_starts, traces, strict=False):
            scaled = self.logits[start : start + len(trace) - 1].float() / temperature
            targets = torch.tensor(list(trace[1:]), device=scaled.device).unsqueeze(1)
            found.append((scaled.gather(1, targets).squeeze(1) - scaled.logsumexp(1)).cpu())
        return found

    def entropies(self, traces: Sequence[Sequence[int]], temperature: float) -> list[Tensor]:
        """For each trace `(num_tokens - 1,)`, the policy's entropy before each of its tokens but the first, nats."""
        found = []
        for start, trace in zip(self.pack.trace_starts, traces, strict=False):
            rows = torch.arange(start, start + len(trace) - 1, device=self.logits.device)
            # Some rows at a time, as copies in float32 are made.
            parts: Any = rows.split(max(1, READ_AT_ONCE // self.logits.shape[1]))  # type: ignore[no-untyped-call]
            of = [Categorical(logits=self.logits[part].float() / temperature) for part in parts]
            found.append(torch.cat([each.entropy() for each in of]).cpu())  # type: ignore[no-untyped-call]
        return found


@torch.no_grad()
def run_pack(
    model: PreTrainedModel, traces: Sequence[Sequence[int]], probes: Sequence[Sequence[Probe]] | None = None
) -> PackedPass:
    """Traces, one after the other in one sequence, each seeing itself alone; probes share their trace.

    Args:
        model: A model that attends through transformers' attention interface.
        traces: Token ids of each.
        probes: Probes of each; None for none.
    """
    pack = ProbePack.build([len(trace) for trace in traces], probes or [[] for _ in traces])
    rows = pack.rows(all_trace_rows=True)
    ids = torch.cat([torch.tensor([token for trace in traces for token in trace]), pack.probe_token_ids])
    device = model.device
    with shared_prefix(model.config) as current:
        current.pack = pack.to(device)
        logits = model(
            input_ids=ids[None].to(device),
            position_ids=current.pack.positions[None],
            use_cache=False,
            logits_to_keep=rows.to(device),
        ).logits[0]
    return PackedPass(pack, rows, logits)


def default_pack_tokens(policy: Policy) -> int:
    """Most tokens of a pass without gradients: of logits, with two copies in float32, half of a GPU's free memory."""
    if policy.device.type != "cuda":
        return PACK_TOKENS
    free, _ = torch.cuda.mem_get_info(policy.device)
    per_token = policy.model.config.get_text_config(decoder=True).vocab_size * (policy.model.dtype.itemsize + 8)
    return int(min(max(PACK_TOKENS, free // 2 // per_token), _MOST_PACK_TOKENS))


def split_by_size(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Places of consecutive entries that together do not exceed a limit; an entry above it stands alone."""
    parts: list[list[int]] = []
    room = 0
    for place, size in enumerate(sizes):
        if not parts or size > room:
            parts.append([])
            room = limit
        parts[-1].append(place)
        room -= size
    return parts


def require_packing(policy: Policy) -> None:
    """Refuse a model whose traces cannot be packed: the bench reads everything in such passes.

    Raises:
        ValueError: With the reason.
    """
    obstacle = why_not_shared(policy.model.config, policy.device.type)
    if obstacle is not None:
        raise ValueError(f"--model: {obstacle}, and the bench computes traces and probes in shared passes only")
