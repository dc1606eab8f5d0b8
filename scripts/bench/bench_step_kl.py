"""How far one optimiser step moves a policy: KL(before | after) on the policy's own responses.

Owner: the core maintainers. Makes the table of steps in docs/results/race.md. Last run: 2026-11-29.

    python scripts/bench/bench_step_kl.py CHECKPOINTS val.parquet --steps 1 50 100 150 199 [--prompts 64] [--json FILE]

verl's `actor/ppo_kl` is taken before the update, so with one update a step it is rounding. CHECKPOINTS is
`trainer.default_local_dir` of a run with `trainer.save_freq=1` and
`actor_rollout_ref.actor.checkpoint.save_contents=[model,hf_model]`. For each step t the policy after it writes a
response to each prompt (temperature 1, seed 0), and the policies after t and t + 1 read it. The KL of a token is
exact, over the whole vocabulary.
"""

from pathlib import Path

import pyarrow.parquet as pq
import torch
from plumbing import machine, parser, save
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel


def load(checkpoints: Path, step: int) -> PreTrainedModel:
    """The policy after a step."""
    return AutoModelForCausalLM.from_pretrained(checkpoints / f"global_step_{step}" / "actor" / "huggingface").eval()


@torch.no_grad()
def divergence(
    before: PreTrainedModel, after: PreTrainedModel, prompts: list[list[int]], most: int
) -> list[tuple[float, int]]:
    """Of each response that `before` writes: KL(before | after) summed over its tokens, in nats, and their number."""
    found = []
    for ids in prompts:
        prompt = torch.tensor([ids])
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": most}
        written = before.generate(prompt, attention_mask=torch.ones_like(prompt), **sampling)
        own, other = (model(written).logits[0, len(ids) - 1 : -1].double().log_softmax(-1) for model in (before, after))
        found.append((float((own.exp() * (own - other)).sum()), len(own)))
    return found


def main() -> None:
    """Print a row a step."""
    options = parser(__doc__, prompts=64, max_response_tokens=128)
    options.add_argument("checkpoints", type=Path)
    options.add_argument("data", type=Path)
    options.add_argument("--steps", type=int, nargs="+", required=True)
    chosen = options.parse_args()
    rows = pq.read_table(chosen.data).to_pylist()[: chosen.prompts]
    figures = []
    print(f"{machine()}\n| step | KL of a response, nats | of a token |\n|---|---|---|")
    for step in chosen.steps:
        before, after = (load(chosen.checkpoints, number) for number in (step, step + 1))
        tokenizer = AutoTokenizer.from_pretrained(before.name_or_path)
        prompts = [
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False) for row in rows
        ]
        torch.manual_seed(0)
        found = divergence(before, after, prompts, chosen.max_response_tokens)
        whole, tokens = (sum(column) for column in zip(*found, strict=True))
        figures.append({"step": step, "response": whole / len(found), "token": whole / tokens})
        print(f"| {step} to {step + 1} | {whole / len(found):.4f} | {whole / tokens:.5f} |", flush=True)
    save(chosen.json, figures)


if __name__ == "__main__":
    main()
