"""Makes the quickstart's policy: a small model trained from random weights on imperfect traces.

``python -m recipes.quickstart.warm_start --out DIR`` writes ``DIR/model``, ``DIR/train.parquet``, ``DIR/val.parquet``.

The corpus has two parts, made from the same traces:

- *Traces* with wrong results on purpose. The model then knows the right result as the most likely one, but samples
  wrong ones at temperature 1, more often where a carry or a borrow is needed. Groups of samples are mixed, and
  reinforcement has something to remove. The lines after a wrong one continue from the wrong value.
- *Answers elicited* after every line, also after wrong ones: where a continuation from the value stated last ends. Only
  the answer's own tokens are trained, so the policy does not learn to stop early. A model that was pretrained can
  answer when forced, this one has to be taught; without it a forced answer carries no information about a prefix.

Both are trained in one pass: the elicited answers are branches that hang off the trace at its line boundaries.
"""

import argparse
import hashlib
import json
import logging
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from recipes.quickstart import task
from recipes.quickstart.model import build_model, build_tokenizer

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_IGNORE = -100


@dataclass(frozen=True)
class WarmStartConfig:
    """Settings of the warm start; a finished folder is used again only when all of them are the same.

    Attributes:
        seed: Seed of the weights, the corpus and the parquet files.
        num_updates: Number of optimiser updates.
        batch_size: Traces per update.
        learning_rate: Peak rate of AdamW (vectors, embeddings).
        matrix_learning_rate: Peak rate of Muon (weight matrices).
        elicited_weight: Weight of the elicited answers' loss against the traces' loss.
        imperfect_share: Share of the elicited answers that end a continuation with errors of its own, as a sampled one
            has; the others end a faultless one. At 1 the probability of a forced answer is the chance that the policy,
            thinking on, reaches it. At 0 the policy answers better when forced than after thinking.
        hard_error_rate: Probability of a wrong result on a line with a carry or a borrow.
        easy_error_rate: Probability of a wrong result on any other line.
        hidden_size: Width of the model.
        num_layers: Depth of the model.
        num_train_rows: Rows of train.parquet.
        num_val_rows: Rows of val.parquet.
        difficulty: How hard the problems are.
    """

    seed: int = 0
    num_updates: int = 700
    batch_size: int = 32
    learning_rate: float = 3e-3
    matrix_learning_rate: float = 2e-2
    elicited_weight: float = 1.0
    imperfect_share: float = 1.0
    hard_error_rate: float = 0.35
    easy_error_rate: float = 0.04
    hidden_size: int = 128
    num_layers: int = 5
    num_train_rows: int = 2048
    num_val_rows: int = 256
    difficulty: task.Difficulty = field(default_factory=task.Difficulty)

    def digest(self) -> str:
        """Hash of the settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def is_hard(stated: int, operand: int) -> bool:
    """Whether the line needs a carry or a borrow."""
    return (stated + operand) // 10 != stated // 10


def corrupt(rng: random.Random, problem: task.Problem, config: WarmStartConfig) -> list[int]:
    """Draws the results that an imperfect trace states, one per operation.

    A wrong result on a hard line is mostly the forgotten carry (off by ten), otherwise off by one. Errors that would
    drive a later value below zero are not made, as no line of the corpus states a negative number.
    """
    stated, results = problem.start, []
    for position, operand in enumerate(problem.operands):
        right, later, reach = stated + operand, 0, 0
        for following in problem.operands[position + 1 :]:
            later += following
            reach = min(reach, later)
        hard = is_hard(stated, operand)
        shifts = [-1, 1, 10 if operand < 0 else -10] if hard else [-1, 1]
        shifts = [shift for shift in shifts if right + shift + reach >= 0]
        if shifts and rng.random() < (config.hard_error_rate if hard else config.easy_error_rate):
            right += rng.choice(shifts)
        results.append(right)
        stated = right
    return results


def make_example(
    rng: random.Random, problem: task.Problem, config: WarmStartConfig, tokenizer: PreTrainedTokenizerFast
) -> dict[str, list[int]]:
    """Builds one trace with its elicited answers as branches.

    Returns:
        Lists of one length: ``input_ids``; ``labels`` (the token to predict at this place, or -100); ``position_ids``;
        ``branch`` (0 = the trace, b > 0 = the b-th elicited answer); ``fork`` (number of trace tokens a token may see).
    """
    results = corrupt(rng, problem, config)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.expression}], add_generation_prompt=True, return_dict=False
    )
    stated, lines = [problem.start, *results], []
    for position, operand in enumerate(problem.operands):
        lines.append(tokenizer.encode(task.calculation_line(stated[position], operand, results[position])))
    answer = [*tokenizer.encode(task.answer_line(results[-1])), tokenizer.eos_token_id]
    trace = prompt + sum(lines, []) + answer

    labels = [_IGNORE] * (len(prompt) - 1) + trace[len(prompt) :]
    example = {
        "input_ids": trace[:-1],
        "labels": labels,
        "position_ids": list(range(len(labels))),
        "branch": [0] * len(labels),
        "fork": [len(labels)] * len(labels),
    }
    boundary = len(prompt)
    for position in range(len(problem.operands)):
        rest = task.Problem(stated[position], problem.operands[position:])
        imperfect = rng.random() < config.imperfect_share
        value = corrupt(rng, rest, config)[-1] if imperfect else rest.answer
        forced = [*tokenizer.encode(task.answer_line(value)), tokenizer.eos_token_id]
        size = len(forced) - 1
        example["input_ids"] += forced[:-1]
        example["labels"] += forced[1:]
        example["position_ids"] += range(boundary, boundary + size)
        example["branch"] += [position + 1] * size
        example["fork"] += [boundary] * size
        boundary += len(lines[position])
    return example


def collate(examples: list[dict[str, list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pads a batch and builds its mask.

    Returns:
        ``input_ids``, ``labels``, ``position_ids``, ``branch`` of shape ``(bs, length)`` and a boolean
        ``attention_mask`` of shape ``(bs, 1, length, length)``: a token sees its own branch up to itself, and the trace
        up to its fork.
    """
    length = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": pad_token_id, "labels": _IGNORE, "position_ids": 0, "branch": -1, "fork": 0}
    batch = {
        key: torch.tensor([example[key] + [value] * (length - len(example[key])) for example in examples])
        for key, value in fill.items()
    }
    index = torch.arange(length)
    earlier = index[:, None] >= index[None, :]
    branch, fork = batch["branch"], batch.pop("fork")
    own = branch[:, :, None] == branch[:, None, :]
    shared = (branch[:, None, :] == 0) & (index < fork[:, :, None])
    batch["attention_mask"] = (earlier & (own | shared))[:, None]
    return batch


def compute_loss(model: Qwen3ForCausalLM, batch: dict[str, torch.Tensor], elicited_weight: float) -> torch.Tensor:
    """Mean cross-entropy (nats per token) of the traces plus the weighted one of the elicited answers."""
    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=batch["attention_mask"]
    ).logits
    losses = F.cross_entropy(logits.transpose(1, 2).float(), batch["labels"], ignore_index=_IGNORE, reduction="none")
    labelled = batch["labels"] != _IGNORE
    on_trace, elicited = labelled & (batch["branch"] == 0), labelled & (batch["branch"] > 0)
    return losses[on_trace].mean() + elicited_weight * losses[elicited].mean()


def train(config: WarmStartConfig, log_interval: float = 5.0) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Trains the model.

    Args:
        config: The settings.
        log_interval: Seconds between two progress lines.

    Returns:
        The model in evaluation mode, and its tokenizer.
    """
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, config.seed, config.hidden_size, config.num_layers).train()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    vectors = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    # Muon reaches a given loss in far fewer updates than AdamW here, and updates are what a CPU is short of.
    optimizers = [
        torch.optim.Muon(matrices, lr=config.matrix_learning_rate, weight_decay=0.01),
        torch.optim.AdamW(vectors, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    warmup = max(1, config.num_updates // 30)

    def rate(update: int) -> float:
        return min((update + 1) / warmup, 1.0) * (1.0 - update / config.num_updates)

    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    rng = random.Random(f"{config.seed}/corpus")
    problems = task.iter_problems(rng, config.difficulty, "train")
    start = logged = time.monotonic()
    for update in range(1, config.num_updates + 1):
        examples = [make_example(rng, next(problems), config, tokenizer) for _ in range(config.batch_size)]
        loss = compute_loss(model, collate(examples, tokenizer.pad_token_id), config.elicited_weight)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        if time.monotonic() - logged > log_interval or update == config.num_updates:
            logged = time.monotonic()
            logger.info(
                "warm start %d/%d, loss %.3f nats, %.0f s", update, config.num_updates, loss.item(), logged - start
            )
    return model.eval(), tokenizer


def is_finished(out: Path, config: WarmStartConfig) -> bool:
    """Whether the folder holds a finished warm start of the same settings."""
    manifest = out / MANIFEST
    return manifest.exists() and json.loads(manifest.read_text()).get("digest") == config.digest()


def warm_start(out: str | Path, config: WarmStartConfig | None = None) -> Path:
    """Makes the model and the parquet files, unless they are there already.

    Args:
        out: Target folder.
        config: The settings.

    Returns:
        The folder of the model.
    """
    out, config = Path(out), config or WarmStartConfig()
    if is_finished(out, config):
        logger.info("warm start: %s is finished, nothing to do", out)
        return out / "model"
    out.mkdir(parents=True, exist_ok=True)
    # Removed first and written last, so a run that was cut off never counts as finished.
    (out / MANIFEST).unlink(missing_ok=True)
    start = time.monotonic()
    task.write_parquet(out / "train.parquet", config.num_train_rows, "train", config.seed, config.difficulty)
    task.write_parquet(out / "val.parquet", config.num_val_rows, "validation", config.seed, config.difficulty)
    model, tokenizer = train(config)
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


def main() -> None:
    """Command line: every setting of the warm start is an option."""
    parser = argparse.ArgumentParser(description="Make the quickstart's model and data.")
    parser.add_argument("--out", required=True, help="target folder")
    for name, default in asdict(WarmStartConfig()).items():
        group = default.items() if name == "difficulty" else [(name, default)]
        for key, value in group:
            parser.add_argument(f"--{key.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    options = vars(parser.parse_args())
    out = options.pop("out")
    difficulty = task.Difficulty(**{key: options.pop(key) for key in asdict(task.Difficulty())})
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    warm_start(out, WarmStartConfig(**options, difficulty=difficulty))


if __name__ == "__main__":
    main()
