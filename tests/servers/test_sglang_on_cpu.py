"""SGLang is not run here: its fields are taken from its source (0.5.12), and a fake follows that source.

The server class itself runs in a process of its own, on verl's own SGLang server, with `sglang` replaced by modules
that hold only what verl's server imports.
"""

import asyncio
import dataclasses
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from rredcot_verl.servers.probe_queue import ProbeQueue
from rredcot_verl.servers.sglang_requests import parse_request, probe_request, read_answer, read_probes
from tests import PATIENCE_S
from tests.passes.table_model import TableModel
from tests.servers.fake_vllm import check

VOCAB_SIZE = 20
REPOSITORY = Path(__file__).parents[2]


@dataclasses.dataclass
class FakeGenerateReqInput:
    """The fields of `io_struct.GenerateReqInput` that verl's server and ours set."""

    input_ids: list[int] | None = None
    sampling_params: dict[str, Any] | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    token_ids_logprob: list[int] | None = None
    rid: str | None = None
    image_data: Any = None
    video_data: Any = None
    lora_path: str | None = None
    return_routed_experts: bool = False


class FakeTokenizerManager:
    """`TokenizerManager.generate_request` of a `TableModel`.

    It follows `Req.init_next_round_input` for the cache, `_process_input_token_logprobs` for the layout of input
    log-probabilities, and `Sampler` for those after the input.

    Args:
        model: The table.
        cached: Sequences that were computed before.
        context_len: Longer inputs are refused.
        edit: Changes an answer's `meta_info`.
    """

    def __init__(self, model: TableModel, cached: tuple[list[int], ...] = (), context_len: int = 1000, edit=None):
        self.model, self.context_len, self.edit = model, context_len, edit
        self.cached = [list(sequence) for sequence in cached]
        self.requests: list[FakeGenerateReqInput] = []
        self.num_under_way = self.most_under_way = 0

    async def generate_request(self, request: FakeGenerateReqInput, http_request: None):
        self.requests.append(request)
        if len(request.input_ids) >= self.context_len:
            raise ValueError(f"The input ({len(request.input_ids)} tokens) is longer than the model's context length")
        self.num_under_way += 1
        self.most_under_way = max(self.most_under_way, self.num_under_way)
        await asyncio.sleep(0)
        self.num_under_way -= 1
        yield self._answer(request)

    def _answer(self, request: FakeGenerateReqInput) -> dict[str, Any]:
        ids, start = list(request.input_ids), request.logprob_start_len
        # -1 with return_logprob: none of the input.
        start = len(ids) if start is None or start == -1 else start
        if start > len(ids):
            raise ValueError(f"{start=} is higher than the number of input tokens")
        num_cached = max((_shared(ids[: min(len(ids) - 1, start)], sequence) for sequence in self.cached), default=0)
        max_new_tokens = request.sampling_params["max_new_tokens"]
        output_ids = [int(self.model.log_probs(ids).argmax())][:max_new_tokens]
        self.cached.append(ids)
        meta_info = {
            "finish_reason": {"type": "length", "length": max_new_tokens},
            "prompt_tokens": len(ids),
            "cached_tokens": num_cached,
        }
        if request.return_logprob:
            meta_info |= self._log_probs(ids, start, output_ids, request)
        if self.edit is not None:
            self.edit(meta_info)
        return {"output_ids": output_ids, "meta_info": meta_info}

    def _log_probs(self, ids: list[int], start: int, output_ids: list[int], request: FakeGenerateReqInput):
        temperature = request.sampling_params.get("temperature", 1.0)
        values = [None] + [self.model.log_probs(ids[:place])[ids[place]].item() for place in range(start + 1, len(ids))]
        shown = [token if token < VOCAB_SIZE - 1 else 0 for token in ids[start:]]
        after = self.model.log_probs(ids, temperature)
        # An empty list of token ids is none.
        asked = request.token_ids_logprob or None
        fields = {
            "input_token_logprobs": [(value, token, None) for value, token in zip(values, shown, strict=False)],
            "output_token_logprobs": [(after[token].item(), token, None) for token in output_ids],
        }
        if asked is not None:
            fields["output_token_ids_logprobs"] = [[(after[token].item(), token, None) for token in asked]]
        return fields


def _shared(first: list[int], second: list[int]) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length


def _read(manager: FakeTokenizerManager, trace: list[int], probes: list[dict[str, Any]]):
    async def send(fields):
        return await manager.generate_request(FakeGenerateReqInput(**fields), None).__anext__()

    async def run():
        parsed = parse_request({"read_probes": probes}, len(trace))
        return await read_probes(send, trace, parsed)

    return asyncio.run(run())


TRACE = [3, 1, 4, 1, 5, 9, 2, 6]
PROBES = [
    {"position": 2, "token_ids": [7, 8, 9], "closing_token_ids": [5, 6]},
    {"position": 8, "token_ids": [7, 8, 9], "closing_token_ids": [6, 5, 6], "scored_from": 2},
    {"position": 5, "token_ids": [7], "closing_token_ids": [2], "scored_from": 1},
    {"position": 1, "token_ids": [], "closing_token_ids": [4, 10]},
    {"position": 4, "token_ids": [11, VOCAB_SIZE - 1, 12]},
]


@pytest.mark.parametrize("cached", [(), (TRACE,), (TRACE, [3, 1, 7, 8, 9, 5], [*TRACE, 7, 8, 9])])
def test_scores_are_the_models_own_whatever_the_cache_holds(cached):
    model = TableModel(VOCAB_SIZE)
    check(model, TRACE, PROBES, _read(FakeTokenizerManager(model, cached), TRACE, PROBES))


def test_the_position_before_the_first_scored_token_is_where_reading_starts():
    probes = parse_request({"read_probes": PROBES}, len(TRACE))
    requests = [probe_request(TRACE, probe) for probe in probes]
    assert [request["logprob_start_len"] for request in requests] == [1, 9, 5, 0, 3]
    assert requests[1]["input_ids"] == [*TRACE, 7, 8, 9]
    assert requests[1]["token_ids_logprob"] == [6, 5]
    # An empty list would be taken for none.
    assert all(request["token_ids_logprob"] for request in requests)
    assert all(request["sampling_params"] == {"max_new_tokens": 0, "temperature": 1.0} for request in requests)


def test_computed_tokens_are_counted():
    # All of the trace but its last token was computed to generate it.
    generated = TRACE[:-1]
    results = _read(FakeTokenizerManager(TableModel(VOCAB_SIZE), (generated,)), TRACE, PROBES)
    counts = [(result["num_forward_tokens"], result["num_recomputed_tokens"]) for result in results]
    # Scored from its first token, a probe needs the last prefix token's output; scored later, none of the prefix.
    assert counts == [(3, 1), (3, 1), (1, 0), (0, 1), (3, 1)]


def test_what_the_cache_lost_of_a_trace_is_computed_once():
    manager = FakeTokenizerManager(TableModel(VOCAB_SIZE))
    results = _read(manager, TRACE, PROBES)
    assert len(manager.requests[0].input_ids) == max(len(request.input_ids) for request in manager.requests)
    assert [result["num_recomputed_tokens"] for result in results] == [1, len(TRACE), 0, 1, 1]


def test_a_probe_that_was_asked_before_is_computed_from_its_first_scored_token():
    probe = {"position": 3, "token_ids": [7, 8, 9], "closing_token_ids": [5], "scored_from": 1}
    model = TableModel(VOCAB_SIZE)
    first, again = _read(FakeTokenizerManager(model, (TRACE,)), TRACE, [probe, probe])
    assert again["token_log_probs"] == first["token_log_probs"]
    assert (first["num_forward_tokens"], again["num_forward_tokens"]) == (3, 3)
    assert first["num_recomputed_tokens"] == again["num_recomputed_tokens"] == 0


def test_a_trace_without_probes():
    assert _read(FakeTokenizerManager(TableModel(VOCAB_SIZE)), TRACE, []) == []


def _shift(meta_info):
    # As if SGLang read from one position earlier.
    meta_info["input_token_logprobs"] = [(None, 1, None), *meta_info["input_token_logprobs"][:-1]]


def _spoil(meta_info):
    meta_info["input_token_logprobs"][-1] = (float("nan"), *meta_info["input_token_logprobs"][-1][1:])


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda info: info.update(finish_reason={"type": "abort", "message": "paused"}), RuntimeError, "paused"),
        (lambda info: info["input_token_logprobs"].pop(), RuntimeError, "gave 3 input_token_logprobs"),
        (lambda info: info.update(input_token_logprobs=[]), RuntimeError, "gave 0 input_token_logprobs"),
        (_shift, RuntimeError, r"for the tokens \[1, 7, 8\]"),
        (_spoil, ValueError, "not numbers"),
        (lambda info: info.update(output_token_ids_logprobs=[]), RuntimeError, "of 0 tokens after a probe"),
        (lambda info: info["output_token_ids_logprobs"][0].pop(), RuntimeError, "of 1 tokens after a probe"),
        (lambda info: info.pop("cached_tokens"), RuntimeError, "no cached_tokens"),
    ],
)
def test_an_answer_in_another_layout_is_refused(edit, error, message):
    manager = FakeTokenizerManager(TableModel(VOCAB_SIZE), edit=edit)
    with pytest.raises(error, match=message):
        _read(manager, TRACE, PROBES[:1])


def test_impossible_closings_have_no_probability():
    probe = parse_request({"read_probes": PROBES[3:4]}, len(TRACE))[0]
    minus_infinity = float("-inf")
    meta_info = {
        "cached_tokens": 0,
        "input_token_logprobs": [(None, 3, None)],
        "output_token_ids_logprobs": [[(minus_infinity, 4, None), (minus_infinity, 10, None)]],
    }
    assert read_answer(probe, {"meta_info": meta_info})["closing_log_prob"] == minus_infinity


def test_what_sglang_cannot_do_is_refused():
    with pytest.raises(ValueError, match="at temperature 1, read_probes got 0.6"):
        parse_request({"read_probes": PROBES, "temperature": 0.6}, len(TRACE))
    with pytest.raises(ValueError, match="longer than the model's context"):
        _read(FakeTokenizerManager(TableModel(VOCAB_SIZE), context_len=5), TRACE, PROBES)


def test_the_server_class_runs_on_verls_own_server():
    script = "from tests.servers.test_sglang_on_cpu import check_server; check_server()"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr[-4000:]


def _install_fake_sglang() -> None:
    """Puts modules named `sglang` in this process that hold what verl's SGLang server imports of it."""

    def placeholder(name: str) -> type:
        return type(name, (), {})

    contents = {
        "sglang": {"__version__": "0.5.12"},
        "sglang.srt": {},
        "sglang.srt.entrypoints": {},
        "sglang.srt.entrypoints.engine": {},
        "sglang.srt.entrypoints.EngineBase": ["EngineBase"],
        "sglang.srt.entrypoints.http_server": [
            "ServerArgs",
            "_GlobalState",
            "app",
            "set_global_state",
            "launch_server",
        ],
        "sglang.srt.managers": {},
        "sglang.srt.managers.io_struct": [
            "ContinueGenerationReqInput",
            "PauseGenerationReqInput",
            "ReleaseMemoryOccupationReqInput",
            "ResumeMemoryOccupationReqInput",
            "UpdateWeightsFromTensorReqInput",
        ],
        "sglang.srt.managers.tokenizer_manager": ["ServerStatus"],
        "sglang.srt.server_args": ["ServerArgs"],
        "sglang.srt.utils": [
            "MultiprocessingSerializer",
            "assert_pkg_version",
            "is_cuda",
            "kill_process_tree",
            "set_prometheus_multiproc_dir",
            "set_ulimit",
        ],
        "sglang.srt.weight_sync": {},
        "sglang.srt.weight_sync.utils": ["_preprocess_tensor_for_update_weights", "update_weights"],
    }
    for name, values in contents.items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(values if isinstance(values, dict) else {value: placeholder(value) for value in values})
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    sys.modules["sglang.srt.managers.io_struct"].GenerateReqInput = FakeGenerateReqInput


def _make_server(server_class: type, manager: FakeTokenizerManager, lora_rank: int = 0):
    """A server past `launch_server`: constructed, with its tokenizer manager."""
    from verl.workers.config import RolloutConfig

    rollout = RolloutConfig(name="sglang", prompt_length=64, response_length=64, max_model_len=256)
    # verl converts dictionaries to its config classes and leaves other objects alone: what is read of it is enough.
    hf_config = types.SimpleNamespace(max_position_embeddings=1000)
    model_config = types.SimpleNamespace(hf_config=hf_config, lora_rank=lora_rank, lora={})
    server = server_class(rollout, model_config, None, [], 0, 0, 1, "", 0)
    server.tokenizer_manager = manager
    return server


def check_server() -> None:
    """Run in a process of its own by `test_the_server_class_runs_on_verls_own_server`."""
    _install_fake_sglang()
    from verl.workers.rollout.sglang_rollout.utils import SGLANG_LORA_NAME

    from rredcot_verl.servers.sglang import ProbingSGLangHttpServer, ProbingSGLangReplica, SGLangHttpServer

    model = TableModel(VOCAB_SIZE)
    manager = FakeTokenizerManager(model, (TRACE,))
    server = _make_server(ProbingSGLangHttpServer, manager)
    asyncio.run(server.set_global_steps(7))
    server.probe_queue = ProbeQueue(2)
    output = asyncio.run(server.generate(TRACE, {"read_probes": PROBES, "temperature": 1.0}, request_id="r"))
    assert manager.most_under_way == 2
    assert (output.token_ids, output.extra_fields["global_steps"]) == ([], 7)
    results = output.extra_fields["probe_log_probs"]
    check(model, TRACE, PROBES, results)
    assert all(request.rid is None and request.lora_path is None for request in manager.requests)

    # Anything else is verl's: same answer, same request.
    answers = []
    for each in (ProbingSGLangHttpServer, SGLangHttpServer):
        manager = FakeTokenizerManager(model)
        plain = _make_server(each, manager)
        asyncio.run(plain.set_global_steps(7))
        answer = asyncio.run(plain.generate(TRACE, {"max_tokens": 1, "logprobs": True}, request_id="r"))
        answers.append((answer.model_dump(), manager.requests))
    assert answers[0] == answers[1]
    assert answers[0][0]["extra_fields"]["global_steps"] == 7
    assert len(answers[0][0]["token_ids"]) == 1

    manager = FakeTokenizerManager(model)
    server = _make_server(ProbingSGLangHttpServer, manager, lora_rank=8)
    asyncio.run(server.generate(TRACE, {"read_probes": PROBES}, request_id="r"))
    assert {request.lora_path for request in manager.requests} == {SGLANG_LORA_NAME}
    with pytest.raises(ValueError, match="takes text only, got image_data"):
        asyncio.run(server.generate(TRACE, {"read_probes": PROBES}, request_id="r", image_data=[object()]))
    server._disaggregation_role = "prefill"
    with pytest.raises(ValueError, match="prefills and decodes"):
        asyncio.run(server.generate(TRACE, {"read_probes": PROBES}, request_id="r"))

    replica = ProbingSGLangReplica(0, server.config, server.model_config)
    assert issubclass(replica.server_class.__ray_metadata__.modified_class, ProbingSGLangHttpServer)
    assert replica.max_concurrency > server.config.max_num_seqs + 8 * 64
