"""Where attribution puts its weight on the quickstart's traces, where it is known which line the answer is read from.

    python scripts/check_attribution.py --model CHECKPOINT/actor/huggingface --traces RUN/traces/40.jsonl

A trace is a chain of additions, one a line, and its answer is what the last line gives. Printed for each method: how
often the last line has the largest weight, and its share of the weight, beside chance (one over the number of lines);
for integrated gradients by how much the contributions of all tokens miss f(x) - f(baseline), relative to it.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rredcot_verl.answers.grammar import BUILT_IN, find_answer
from rredcot_verl.passes.attribution import (
    answer_log_probs,
    attention_attribution,
    gradient_attribution,
    leave_one_out_attribution,
)
from rredcot_verl.passes.attribution_task import AttributionTask
from rredcot_verl.passes.input_gradient import gradient_contributions
from rredcot_verl.probes.vocabulary import Vocabulary


def read_tasks(path: Path, tokenizer: Any, most: int) -> list[AttributionTask]:
    """Traces with an answer and at least two segments before it."""
    vocabulary = Vocabulary(tokenizer)
    tasks = []
    for line in path.read_text(encoding="utf-8").splitlines():
        trace = json.loads(line)
        prompt, response = (tokenizer.encode(trace[name], add_special_tokens=False) for name in ("prompt", "response"))
        cuts = list(itertools.accumulate((part["num_tokens"] for part in trace["segments"]), initial=0))
        found = find_answer(trace["response"], BUILT_IN)
        # The token that ends the turn is not part of the text.
        if found is None or cuts[-1] - len(response) not in (0, 1):
            continue
        opening, first, last = (
            vocabulary.offset_of(response, trace["response"], place)
            for place in (found.start, found.answer_start, found.end - 1)
        )
        before = [len(prompt) + cut for cut in cuts if cut <= opening]
        if len(before) > 2:
            ids = prompt + response[: last + 1]
            tasks.append(AttributionTask(ids, before, len(prompt) + first, len(ids)))
    return tasks[:most]


def change_from_baseline(model: Any, task: AttributionTask) -> float:
    """f(x) - f(baseline), nats: the answer's log-probability less that with all embeddings zero."""
    embeddings = torch.zeros(1, len(task.token_ids), model.config.hidden_size)
    with torch.no_grad():
        log_probs = model(inputs_embeds=embeddings).logits[0].log_softmax(dim=-1)
    rows = range(task.answer_from - 1, task.answer_to - 1)
    return answer_log_probs(model, [task])[0] - sum(log_probs[row, task.token_ids[row + 1]].item() for row in rows)


def main() -> None:
    """Weigh and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model and its tokenizer")
    parser.add_argument("--traces", type=Path, required=True, help="credited traces of a run, <step>.jsonl")
    parser.add_argument("--most", type=int, default=64, help="most traces")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 32], help="steps of integrated gradients")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tasks = read_tasks(options.traces, AutoTokenizer.from_pretrained(options.model), options.most)
    methods: dict[str, Callable[[], list[list[float]]]] = {
        "attention, all layers": lambda: attention_attribution(model, tasks),
        "attention, last layer": lambda: attention_attribution(model, tasks, layers="last"),
        "input x gradient": lambda: gradient_attribution(model, tasks),
        "leave one out": lambda: leave_one_out_attribution(model, tasks),
    }
    chance = statistics.mean(1 / task.num_segments for task in tasks)
    sys.stdout.write(
        f"{len(tasks)} traces, chance {chance:.2f}\n\n| method | last line first | its share |\n|---|---|---|\n"
    )
    for name, weigh in methods.items():
        _report(name, weigh())
    changes = [change_from_baseline(model, task) for task in tasks]
    for num_steps in options.steps:
        found = gradient_contributions(model, tasks, method="integrated_gradients", num_steps=num_steps)
        misses = [abs(own.sum().item() - change) / abs(change) for own, change in zip(found, changes, strict=True)]
        weights = [task.sums(own).abs().tolist() for task, own in zip(tasks, found, strict=True)]
        _report(f"integrated gradients, {num_steps} steps (median miss {statistics.median(misses):.0%})", weights)


def _report(name: str, weights: list[list[float]]) -> None:
    first = statistics.mean(own.index(max(own)) == len(own) - 1 for own in weights)
    share = statistics.mean(own[-1] / sum(own) if any(own) else 0.0 for own in weights)
    sys.stdout.write(f"| {name} | {first:.2f} | {share:.2f} |\n")


if __name__ == "__main__":
    main()
