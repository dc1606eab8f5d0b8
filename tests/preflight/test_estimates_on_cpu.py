"""The estimates of preflight: against real models where one is small enough, and by hand."""

import pytest
import torch
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from rredcot_verl.config.schema import parse
from rredcot_verl.passes.probe_pack import count_probe_tokens
from rredcot_verl.preflight import inspection
from rredcot_verl.preflight.composition import compose_as_main_ppo
from rredcot_verl.preflight.cpu_memory import CPUMemory, cpu_memory
from rredcot_verl.preflight.findings import Findings
from rredcot_verl.preflight.memory import GIB, server_memory, training_memory
from rredcot_verl.preflight.model_size import read_facts
from rredcot_verl.preflight.probe_budget import check_budget, probe_budget
from rredcot_verl.probes.elicitation import Elicitation
from rredcot_verl.probes.proposals import Proposal
from rredcot_verl.probes.vocabulary import Vocabulary
from tests.preflight.material import make_model_folder
from tests.probes.tiny_tokenizers import sentencepiece_like
from tests.tiny_model import make_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"), vocab_size=512)


@pytest.fixture(scope="module")
def megatron():
    return compose_as_main_ppo(["--config-path", "pkg://recipes.math", "--config-name", "qwen3_8b_megatron"])


@pytest.fixture
def fsdp(model):
    return compose_as_main_ppo(
        [
            "--config-path=pkg://recipes.math",
            "--config-name=qwen3_4b_fsdp",
            f"actor_rollout_ref.model.path={model}",
            "trainer.nnodes=1",
        ]
    )


def _config(model):
    return AutoConfig.from_pretrained(model)


def test_sizes_are_those_of_the_real_model(fsdp, model):
    facts = read_facts(fsdp.actor_rollout_ref.model)
    real = AutoModelForCausalLM.from_config(_config(model))
    assert facts.num_parameters == facts.num_trainable_parameters == sum(p.numel() for p in real.parameters())
    assert facts.largest_layer == sum(p.numel() for p in real.model.layers[0].parameters())
    assert facts.num_embedding_parameters == real.get_input_embeddings().weight.numel()
    assert facts.max_length == 40960 and facts.num_expert_parameters == 0

    cache = DynamicCache()
    real.bfloat16()(torch.zeros(1, 5, dtype=torch.int64), past_key_values=cache, use_cache=True)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert facts.kv_bytes_per_token * 5 == held


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_adapters_are_those_of_peft(fsdp, model, targets):
    fsdp.actor_rollout_ref.model.lora_rank, fsdp.actor_rollout_ref.model.target_modules = 4, targets
    adapted = get_peft_model(
        AutoModelForCausalLM.from_config(_config(model)), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    )
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert read_facts(fsdp.actor_rollout_ref.model).num_trainable_parameters == trainable


def test_the_states_of_fsdp_are_sixteen_bytes_a_parameter_over_all_gpus(fsdp):
    facts = read_facts(fsdp.actor_rollout_ref.model)
    memory = training_memory(fsdp, facts)
    states = (memory.weights + memory.gradients + memory.optimizer) * GIB
    assert states * 8 == pytest.approx(16 * facts.num_parameters)
    assert memory.resident * GIB * 8 == pytest.approx(12 * facts.num_parameters)
    # One byte too few would hide an out-of-memory error: 27648 tokens, 512 words, 4 bytes.
    assert memory.logits * GIB == pytest.approx(4 * 27648 * 512)
    actor = fsdp.actor_rollout_ref.actor
    # The budget of a pass is a GPU's share of it.
    actor.ulysses_sequence_parallel_size = 2
    assert training_memory(fsdp, facts) == memory
    actor.fsdp_config.param_offload = actor.fsdp_config.optimizer_offload = True
    assert training_memory(fsdp, facts).resident == 0.0
    fsdp.actor_rollout_ref.model.enable_gradient_checkpointing = False
    assert training_memory(fsdp, facts).activations > memory.activations


def test_the_states_of_megatron_divide_over_tensor_and_data_parallel_ranks(megatron, fsdp):
    facts = read_facts(fsdp.actor_rollout_ref.model)
    # Two ways, tensor 2 and data 4: weights and gradients are halved, the optimizer is divided by eight.
    memory = training_memory(megatron, facts)
    assert (memory.weights + memory.gradients) * GIB * 2 == pytest.approx(6 * facts.num_parameters)
    assert memory.optimizer * GIB * 8 == pytest.approx(12 * facts.num_parameters)
    assert memory.resident == 0.0


def test_the_servers_cache_is_what_the_weights_leave(fsdp):
    facts = read_facts(fsdp.actor_rollout_ref.model)
    memory = server_memory(fsdp, facts, 80.0)
    assert memory.budget == pytest.approx(0.7 * 80)
    assert memory.cache == pytest.approx(56 - 3 - 2 * facts.num_parameters / GIB)
    assert memory.cache_tokens == int(memory.cache * GIB / facts.kv_bytes_per_token)
    # Two heads for four GPUs: each keeps one.
    fsdp.actor_rollout_ref.rollout.tensor_model_parallel_size = 4
    per_gpu = facts.kv_bytes_per_token / 2
    split = server_memory(fsdp, facts, 80.0)
    assert split.cache_tokens == int(split.cache * GIB / per_gpu)
    assert server_memory(fsdp, facts, 4.0).cache_tokens == 0


PROGRAM = "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    "block, answers",
    [
        ({"elicitation": {"format": "boxed"}, "self_value": {"proposals": "union"}}, ["\\frac{1}{2}", "0.5", "12"]),
        (
            {
                "elicitation": {"format": "code"},
                "self_value": {"form": "geometric", "reference_key": "extra_info.solutions"},
            },
            [PROGRAM, "print(1)\n"],
        ),
        ({"elicitation": {"format": "answer"}, "self_value": {}}, ["15", "\\frac{12}{35}"]),
    ],
    ids=["math", "code", "tags"],
)
def test_no_trace_has_more_probe_tokens_than_the_bound(block, answers):
    tokenizer = make_tokenizer()
    longest = max(len(tokenizer.encode(answer)) for answer in answers)
    block["segmentation"] = {"num_segments": 4}
    block["self_value"] |= {"max_proposals": len(answers), "max_answer_tokens": longest}
    settings = parse(block)
    elicitation = Elicitation(Vocabulary(tokenizer), settings)
    response = tokenizer.encode("First this.\n```python\nx = 1\ny = 2\nThen that, and so on", add_special_tokens=False)
    boundaries = [0, 12, 30, 40, len(response)]
    (name,) = elicitation.formats
    proposals = [Proposal(answer, 1.0) for answer in answers]
    probes = elicitation.probes([], response, boundaries, proposals, name)
    budget = probe_budget(settings, tokenizer, [answers], shared=True, separate=False)
    used = count_probe_tokens(probes)
    assert used <= budget.most
    # And the bound is not idle: the same probes fill most of it but for the short answers.
    assert used > budget.most / 4
    assert budget.typical is not None and budget.typical <= budget.most
    apart = probe_budget(settings, tokenizer, [answers], shared=False, separate=True)
    assert apart.most > budget.most
    # Half of 4 boundaries, for each answer and each of 4 closing tokens.
    assert apart.prefix_passes == 2 * len(answers) * 4
    assert apart.share_of_training(0, 100) == pytest.approx(apart.prefix_passes / 5)


def test_without_references_nothing_is_typical():
    settings = parse({})
    budget = probe_budget(settings, make_tokenizer(), [None, "", True], shared=True, separate=False)
    assert budget.typical is None and budget.most > 0


@pytest.mark.parametrize(
    "elicitation, told",
    [
        ({"think_close": "<思考>"}, "elicitation.think_close='<思考>': this tokenizer cannot write it"),
        (
            {"format": "custom", "opening": "\nx:", "pattern": "x:(.+)", "closing": ["日"]},
            "elicitation.format=custom: this tokenizer cannot write ['日']",
        ),
    ],
)
def test_what_the_tokenizer_cannot_write_is_a_fault(elicitation, told):
    findings = Findings()
    check_budget(parse({"elicitation": elicitation}), sentencepiece_like(), ["15"], 128, None, {}, findings)
    (fault,) = findings.faults
    assert told in f"{fault.message} {fault.way_out}"


def test_a_cpu_run_is_estimated_as_it_was_measured(tmp_path, monkeypatch):
    """The run of docs/results/bench.md: 5.07 and 1.61 GiB, 8.7 in all."""
    shape = {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 2048, "num_attention_heads": 8}
    monkeypatch.setenv("QUICKSTART_DATA", str(tmp_path))
    monkeypatch.setenv("QUICKSTART_RUN", str(tmp_path))
    config = compose_as_main_ppo(
        [
            *("--config-path=pkg://recipes.quickstart", "--config-name=rredcot"),
            f"actor_rollout_ref.model.path={make_model_folder(tmp_path, vocab_size=151936, head_dim=64, **shape)}",
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1024",
        ]
    )
    memory = cpu_memory(config, read_facts(config.actor_rollout_ref.model))
    assert memory.training == pytest.approx(5.07, rel=0.2)
    assert memory.server == pytest.approx(1.61, rel=0.2)
    assert memory.total == pytest.approx(8.7, rel=0.2)
    fits = memory.tokens_within(memory.total)
    assert fits == pytest.approx(1024, abs=1) and memory.tokens_within(1.0) < 0
    facts = read_facts(config.actor_rollout_ref.model)
    config.actor_rollout_ref.rollout.dtype = "bfloat16"
    assert cpu_memory(config, facts).server == pytest.approx(memory.server - 2 * facts.num_parameters / GIB)


def test_a_run_of_half_a_billion_parameters_too(tmp_path):
    """As well, with chunks of logits and recomputed activations; its passes held 16 x (11 + 128) tokens."""
    shape = {"hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864, "num_attention_heads": 14}
    folder = make_model_folder(tmp_path, vocab_size=151936, head_dim=64, num_key_value_heads=2, **shape)
    config = compose_as_main_ppo(
        [
            *("--config-path=pkg://rredcot_verl.config", "--config-name=rredcot_trainer", "+backend=cpu"),
            f"actor_rollout_ref.model.path={folder}",
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=2224",
        ]
    )
    facts = read_facts(config.actor_rollout_ref.model)
    memory = cpu_memory(config, facts)
    assert facts.num_parameters == pytest.approx(494e6, rel=0.05)
    assert memory.training == pytest.approx(9.41, rel=0.2)
    assert memory.server == pytest.approx(3.24, rel=0.2)
    assert memory.total == pytest.approx(15.27, rel=0.2)


@pytest.mark.parametrize("machine, words", [(24.0, ""), (8.0, "fits"), (2.0, "not even one full-length response")])
def test_a_pass_that_cannot_fit_into_a_machine_is_warned_of(monkeypatch, machine, words):
    monkeypatch.setattr(inspection, "machine_gib", lambda: machine)
    config = OmegaConf.create(
        {
            "data": {"max_prompt_length": 32, "max_response_length": 200},
            "actor_rollout_ref": {"actor": {"ppo_max_token_len_per_gpu": 8192}},
        }
    )
    findings = Findings()
    memory = CPUMemory(states=0.5, token=0.001, head=0.2, num_tokens=8192, server=1.0, num_ranks=1)
    inspection._cpu_row(memory, config, findings)
    warning = " ".join(finding.message for finding in findings.warnings)
    assert words in warning and bool(words) == ("ppo_max_token_len_per_gpu" in warning)
