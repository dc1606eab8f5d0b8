"""Measures whether a warm-started model is fit for the quickstart.

``python -m recipes.quickstart.inspect_model MODEL_DIR`` prints one JSON object. The questions: are sampled groups
mixed, does an answer forced early say something about the prefix, and on a failed trace, is the largest fall of that
probability at the first wrong line?
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

from recipes.quickstart import task

_BATCH_SIZE = 512
_GROUP_SIZE = 8


def encode_prompt(tokenizer: PreTrainedTokenizerBase, problem: task.Problem) -> list[int]:
    """Token ids of a problem's prompt, ready for generation."""
    messages = [{"role": "user", "content": problem.expression}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def _pad(rows: list[list[int]], pad_token_id: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    padding = [[pad_token_id] * (length - len(row)) for row in rows]
    ids = [pad + row if left else row + pad for row, pad in zip(rows, padding, strict=True)]
    mask = [
        [0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad)
        for row, pad in zip(rows, padding, strict=True)
    ]
    return torch.tensor(ids), torch.tensor(mask)


@torch.no_grad()
def sample_responses(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[task.Problem],
    temperature: float,
    max_new_tokens: int = 64,
) -> list[list[int]]:
    """Samples one response per problem (greedy at temperature 0); the end-of-sequence token is left out."""
    responses = []
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    for first in range(0, len(problems), _BATCH_SIZE):
        rows = [encode_prompt(tokenizer, problem) for problem in problems[first : first + _BATCH_SIZE]]
        ids, mask = _pad(rows, tokenizer.pad_token_id, left=True)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            **sampling,
        )
        for row in output[:, ids.shape[1] :].tolist():
            ended = tokenizer.eos_token_id in row
            responses.append(row[: row.index(tokenizer.eos_token_id)] if ended else row)
    return responses


@torch.no_grad()
def forced_answer_probabilities(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, prefixes: list[list[int]], answers: list[str]
) -> list[float]:
    """Probability that the model, made to write ``Answer:`` after a prefix, gives an answer and ends it.

    Args:
        model: The policy.
        tokenizer: Its tokenizer.
        prefixes: Token ids, the prompt included.
        answers: One answer per prefix.

    Returns:
        P(" answer", then the end of the sequence or a newline | prefix, "Answer:") per prefix, at temperature 1.
    """
    opening = tokenizer.encode(task.ANSWER_PREFIX)
    (newline,) = tokenizer.encode("\n")
    probabilities = []
    for first in range(0, len(prefixes), _BATCH_SIZE):
        rows = [prefix + opening for prefix in prefixes[first : first + _BATCH_SIZE]]
        targets = [tokenizer.encode(f" {answer}") for answer in answers[first : first + _BATCH_SIZE]]
        ids, mask = _pad([a + b for a, b in zip(rows, targets, strict=True)], tokenizer.pad_token_id, left=False)
        log_probs = model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
        for log_prob, row, target in zip(log_probs, rows, targets, strict=True):
            at = len(row) - 1
            total = sum(log_prob[at + i, token] for i, token in enumerate(target))
            ending = log_prob[at + len(target), [tokenizer.eos_token_id, newline]].logsumexp(-1)
            probabilities.append((total + ending).exp().item())
    return probabilities


def trace_values(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[task.Problem],
    responses: list[list[int]],
) -> list[list[float]]:
    """Forced-answer probability of the true answer before every line of every response.

    Returns:
        Per response the values v_0..v_{K-1}, K = number of its lines.
    """
    (newline,) = tokenizer.encode("\n")
    prefixes, answers, counts = [], [], []
    for problem, response in zip(problems, responses, strict=True):
        ends = [i + 1 for i, token in enumerate(response) if token == newline and i + 1 < len(response)]
        prompt = encode_prompt(tokenizer, problem)
        prefixes += [prompt + response[:end] for end in [0, *ends]]
        answers += [str(problem.answer)] * (1 + len(ends))
        counts.append(1 + len(ends))
    flat = iter(forced_answer_probabilities(model, tokenizer, prefixes, answers))
    return [[next(flat) for _ in range(count)] for count in counts]


def _sample_and_score(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, problems: list[task.Problem], temperature: float
) -> tuple[list[list[int]], list[str], list[dict[str, float]]]:
    responses = sample_responses(model, tokenizer, problems, temperature)
    texts = [tokenizer.decode(response) for response in responses]
    scores = [
        task.compute_score(task.DATA_SOURCE, text, str(problem.answer), {"expression": problem.expression})
        for problem, text in zip(problems, texts, strict=True)
    ]
    return responses, texts, scores


def _fall_report(failed: list[tuple[task.Problem, str, list[float]]]) -> dict:
    hits, chances, by_line = [], [], defaultdict(list)
    for problem, text, values in failed:
        wrong = task.first_wrong_line(problem, text)
        if wrong is None or len(values) < 2:
            continue
        pinned = [*values, 0.0]  # the last value is the reward itself
        falls = [pinned[k] - pinned[k + 1] for k in range(len(values))]
        hits.append(float(falls.index(max(falls)) == wrong))
        chances.append(1 / len(falls))
        by_line[wrong].append(hits[-1])
    return {
        "num_failed": len(hits),
        "largest_fall_at_first_wrong_line": fmean(hits) if hits else None,
        "chance": fmean(chances) if chances else None,
        "by_first_wrong_line": {k: [round(fmean(v), 3), len(v)] for k, v in sorted(by_line.items())},
    }


def _mean_by_boundary(values: list[list[float]]) -> list[float]:
    longest = max(map(len, values), default=0)
    return [round(fmean(v[k] for v in values if len(v) > k), 4) for k in range(longest)]


def measure(model_dir: str | Path, n: int = 512, seed: int = 0, difficulty: task.Difficulty | None = None) -> dict:
    """Measures a model on problems of the validation side.

    Args:
        model_dir: A HF folder with model and tokenizer.
        n: Number of problems, at least 8; one sample each, and 8 samples each for an eighth of them.
        seed: Seed of the problems and the samples. The global torch generator is seeded.
        difficulty: How hard the problems are.

    Returns:
        Rates in [0, 1] (a group is 8 samples of a problem, mixed when neither all nor none are solved); forced-answer
        probabilities by boundary k = 0..K-1; how often the largest fall of a failed trace is at its first wrong line,
        against the chance level 1/K; token lengths, least and most, the end of the response included.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    stream = task.iter_problems(random.Random(f"{seed}/measure"), difficulty, "validation")
    problems = [next(stream) for _ in range(n)]
    torch.manual_seed(seed)
    responses, texts, scores = _sample_and_score(model, tokenizer, problems, temperature=1.0)
    _, _, greedy_scores = _sample_and_score(model, tokenizer, problems, temperature=0.0)
    grouped = [problem for problem in problems[: n // _GROUP_SIZE] for _ in range(_GROUP_SIZE)]
    _, _, group_scores = _sample_and_score(model, tokenizer, grouped, temperature=1.0)
    accs = [score["acc"] for score in group_scores]
    groups = [accs[first : first + _GROUP_SIZE] for first in range(0, len(accs), _GROUP_SIZE)]
    values = trace_values(model, tokenizer, problems, responses)
    rows = list(zip(problems, texts, values, scores, strict=True))
    solved = [v for _, _, v, score in rows if score["acc"]]
    failed = [(problem, text, v) for problem, text, v, score in rows if not score["acc"]]
    return {
        "num_problems": n,
        "solve_rate": fmean(score["score"] for score in scores),
        "greedy_rate": fmean(score["score"] for score in greedy_scores),
        "mixed_group_rate": fmean(float(0 < sum(group) < _GROUP_SIZE) for group in groups),
        "format_rate": fmean(score["well_formed"] for score in scores),
        "forced_answer_solved": _mean_by_boundary(solved),
        "forced_answer_failed": _mean_by_boundary([v for _, _, v in failed]),
        **_fall_report(failed),
        "prompt_tokens": [f(len(encode_prompt(tokenizer, p)) for p in problems) for f in (min, max)],
        "response_tokens": [f(len(response) + 1 for response in responses) for f in (min, max)],
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": len(tokenizer),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure a warm-started model.")
    parser.add_argument("model_dir")
    parser.add_argument("--num-problems", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    for name, default in vars(task.Difficulty()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = vars(parser.parse_args())
    difficulty = task.Difficulty(**{name: options[name] for name in vars(task.Difficulty())})
    report = measure(options["model_dir"], options["num_problems"], options["seed"], difficulty)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
