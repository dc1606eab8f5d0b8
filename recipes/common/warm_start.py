"""Supervised training of a policy: what the warm starts of the CPU recipes share.

An example is one response with elicited answers as probes that hang off it; see `make_example` of a recipe.
"""

import argparse
import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recipes.common.policy import build_model
from recipes.common.problems import iter_problems, write_parquet

logger = logging.getLogger(__name__)

Example = dict[str, list[int]]
Policy = tuple[PreTrainedModel, PreTrainedTokenizerFast]

MANIFEST = "manifest.json"
IGNORE = -100
"""Label of a place at which nothing is predicted."""
LOG_INTERVAL = 5.0
"""Seconds between two progress lines."""


class Muon(torch.optim.Muon):
    """torch's Muon in float32, at its default `nesterov` and `adjust_lr_fn` whatever is given.

    Its own products are in bfloat16, for which many a CPU has no instructions.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every matrix that has a gradient."""
        del closure
        for group in self.param_groups:
            a, b, c = group["ns_coefficients"]
            for weight in [weight for weight in group["params"] if weight.grad is not None]:
                buffer = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(buffer, group["momentum"])
                wide = update.T if update.shape[0] > update.shape[1] else update
                wide = wide / wide.norm().clamp(min=group["eps"])
                for _ in range(group["ns_steps"]):
                    gram = wide @ wide.T
                    wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
                update = wide.T if update.shape[0] > update.shape[1] else wide
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)


@dataclass(frozen=True)
class TrainingConfig:
    """What all warm starts have; a finished folder is used again only when all settings of its recipe are the same.

    Attributes:
        seed: Seed of the weights, the corpus and the parquet files.
        num_updates: Number of optimiser updates.
        batch_size: Traces per update.
        learning_rate: Peak rate of AdamW.
        num_train_rows: Rows of train.parquet.
        num_val_rows: Rows of val.parquet.
        elicited_weight: Weight of the elicited answers' loss against the traces' loss; None: every token counts alike.
        dtype: Of the products: float32, or bfloat16 beside weights in float32.
    """

    seed: int = 0
    num_updates: int = 700
    batch_size: int = 32
    learning_rate: float = 3e-3
    num_train_rows: int = 2048
    num_val_rows: int = 256
    elicited_weight: ClassVar[float | None] = None
    dtype: ClassVar[str] = "float32"

    def digest(self) -> str:
        """Hash of the settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def optimizers(self, model: PreTrainedModel) -> list[torch.optim.Optimizer]:
        """What trains a model."""
        return [torch.optim.AdamW(model.parameters(), lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)]


@dataclass(frozen=True)
class RandomStartConfig(TrainingConfig):
    """Of the warm starts from random weights.

    Attributes:
        learning_rate: Peak rate of AdamW (vectors, embeddings).
        matrix_learning_rate: Peak rate of Muon (weight matrices).
        elicited_weight: See `TrainingConfig`.
        hidden_size: Width of the model.
        num_layers: Depth of the model.
    """

    matrix_learning_rate: float = 2e-2
    elicited_weight: float = 1.0
    hidden_size: int = 128
    num_layers: int = 5

    def optimizers(self, model: PreTrainedModel) -> list[torch.optim.Optimizer]:
        """See `TrainingConfig`."""
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        vectors = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        # Muon reaches a given loss in far fewer updates than AdamW here, and updates are what a CPU is short of.
        return [
            Muon(matrices, lr=self.matrix_learning_rate, weight_decay=0.01),
            torch.optim.AdamW(vectors, lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def random_policy(self, tokenizer: PreTrainedTokenizerFast) -> Policy:
        """A model with random weights, and its tokenizer."""
        return build_model(tokenizer, self.seed, self.hidden_size, self.num_layers), tokenizer


def pack_example(prompt: list[int], response: list[int], elicited: Iterable[tuple[int, int, list[int]]]) -> Example:
    """Lays out one response with its elicited answers as probes.

    Args:
        prompt: Token ids.
        response: Token ids, the end of the sequence included.
        elicited: Of each answer the boundary at which it is elicited (tokens of the response before it), the number of
            its tokens that are given, not learnt (at least 1), and its token ids, what ends it included. At -1, with
            the prompt's last token given, it is another response to the prompt.

    Returns:
        Lists of one length: ``input_ids``; ``labels`` (the token to predict at this place, or -100); ``position_ids``;
        ``probe`` (0 = the response, b > 0 = the b-th elicited answer); ``fork`` (number of tokens of prompt and
        response that a token may see).
    """
    labels = [IGNORE] * (len(prompt) - 1) + response
    example = {
        "input_ids": (prompt + response)[:-1],
        "labels": labels,
        "position_ids": list(range(len(labels))),
        "probe": [0] * len(labels),
        "fork": [len(labels)] * len(labels),
    }
    for index, (boundary, num_given, forced) in enumerate(elicited, start=1):
        fork, size = len(prompt) + boundary, len(forced) - 1
        example["input_ids"] += forced[:-1]
        example["labels"] += [IGNORE] * (num_given - 1) + forced[num_given:]
        example["position_ids"] += range(fork, fork + size)
        example["probe"] += [index] * size
        example["fork"] += [fork] * size
    return example


def collate(examples: list[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pads a batch and builds its mask.

    Returns:
        ``input_ids``, ``labels``, ``position_ids``, ``probe`` of shape ``(bs, length)`` and a boolean
        ``attention_mask`` of shape ``(bs, 1, length, length)``: a token sees its own probe up to itself, and the trace
        up to its fork.
    """
    length = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": pad_token_id, "labels": IGNORE, "position_ids": 0, "probe": -1, "fork": 0}
    batch = {
        key: torch.tensor([example[key] + [value] * (length - len(example[key])) for example in examples])
        for key, value in fill.items()
    }
    index = torch.arange(length)
    earlier = index[:, None] >= index[None, :]
    probe, fork = batch["probe"], batch.pop("fork")
    own = probe[:, :, None] == probe[:, None, :]
    shared = (probe[:, None, :] == 0) & (index < fork[:, :, None])
    batch["attention_mask"] = (earlier & (own | shared))[:, None]
    return batch


def compute_loss(model: PreTrainedModel, batch: dict[str, torch.Tensor], elicited_weight: float | None) -> torch.Tensor:
    """Cross-entropy (nats per token): mean of the traces plus weighted mean of the elicited answers, or mean of all."""
    inputs = {key: batch[key] for key in ("input_ids", "position_ids", "attention_mask")}
    labelled = batch["labels"] != IGNORE
    if elicited_weight is None:
        # A pretrained vocabulary is wide: logits where something is learnt, and nowhere else.
        hidden = model.base_model(**inputs).last_hidden_state[labelled]
        return F.cross_entropy(model.get_output_embeddings()(hidden).float(), batch["labels"][labelled])
    logits = model(**inputs).logits
    losses = F.cross_entropy(logits.transpose(1, 2).float(), batch["labels"], ignore_index=IGNORE, reduction="none")
    on_trace, elicited = labelled & (batch["probe"] == 0), labelled & (batch["probe"] > 0)
    return losses[on_trace].mean() + elicited_weight * losses[elicited].mean()


def fit(
    config: TrainingConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    draw_example: Callable[[], Example],
) -> None:
    """Trains a model, and leaves it in evaluation mode.

    Args:
        config: The settings.
        model: What is trained.
        tokenizer: Its tokenizer.
        draw_example: Gives one example of the corpus.
    """
    model.train()
    optimizers = config.optimizers(model)
    warmup = max(1, config.num_updates // 30)

    def rate(update: int) -> float:
        return min((update + 1) / warmup, 1.0) * (1.0 - update / config.num_updates)

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    start = logged = time.monotonic()
    for update in range(1, config.num_updates + 1):
        examples = [draw_example() for _ in range(config.batch_size)]
        with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = compute_loss(model, collate(examples, tokenizer.pad_token_id), config.elicited_weight)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        if time.monotonic() - logged > LOG_INTERVAL or update == config.num_updates:
            logged = time.monotonic()
            logger.info(
                "warm start %d/%d, loss %.3f nats, %.0f s", update, config.num_updates, loss.item(), logged - start
            )
    model.eval()


def is_finished(out: Path, config: TrainingConfig) -> bool:
    """Whether the folder holds a finished warm start of the same settings."""
    manifest = out / MANIFEST
    return manifest.exists() and json.loads(manifest.read_text()).get("digest") == config.digest()


def make_folder(
    out: str | Path,
    config: Any,
    task: Any,
    load_policy: Callable[[], Policy],
    make_example: Callable[..., Example],
    rows: Any = None,
) -> Path:
    """Makes the model and the parquet files, unless they are there already.

    Args:
        out: Target folder.
        config: A recipe's settings: a `TrainingConfig` with a `difficulty`.
        task: The recipe's task, see `recipes.common.problems`.
        load_policy: Gives the model to train and its tokenizer.
        make_example: Makes an example of the corpus from a random generator, a problem, the settings and the tokenizer.
        rows: How hard the problems of the parquet files are; None: as those of the corpus.

    Returns:
        The folder of the model.
    """
    out = Path(out)
    if is_finished(out, config):
        logger.info("warm start: %s is finished, nothing to do", out)
        return out / "model"
    out.mkdir(parents=True, exist_ok=True)
    # Removed first and written last, so a run that was cut off never counts as finished.
    (out / MANIFEST).unlink(missing_ok=True)
    start = time.monotonic()
    model, tokenizer = load_policy()
    write_parquet(out / "train.parquet", task, config.num_train_rows, "train", config.seed, rows or config.difficulty)
    write_parquet(out / "val.parquet", task, config.num_val_rows, "validation", config.seed, rows or config.difficulty)
    rng = random.Random(f"{config.seed}/corpus")
    problems = iter_problems(task, rng, config.difficulty, "train")
    fit(config, model, tokenizer, lambda: make_example(rng, next(problems), config, tokenizer))
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    manifest = {
        "digest": config.digest(),
        "config": asdict(config),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": len(tokenizer),
        "seconds": round(time.monotonic() - start, 1),
    }
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return out / "model"


def read_options(description: str, config_class: Any) -> tuple[str, Any]:
    """Command line of a warm start: the target folder, and every setting as an option."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", required=True, help="target folder")
    settings = asdict(config_class())
    difficulty = settings.pop("difficulty")
    for name, default in (settings | difficulty).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default {default}"
        )
    options = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    chosen = type(config_class().difficulty)(**{name: options[name] for name in difficulty})
    return options["out"], config_class(**{name: options[name] for name in settings}, difficulty=chosen)
