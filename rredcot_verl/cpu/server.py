"""The rollout server: takes requests one by one, answers them in batches, keeps the event loop free.

All torch work runs on one thread, so generation, scoring and weight updates never overlap.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from verl.workers.rollout.replica import TokenOutput

from rredcot_verl.cpu.model import RolloutModel
from rredcot_verl.cpu.sampling import SamplingParams, parse_sampling_params
from rredcot_verl.cpu.scoring import Probe, parse_probes

logger = logging.getLogger(__name__)

# Long enough for requests sent together to arrive over Ray, short against one decoding pass.
_BATCH_WINDOW_SECONDS = 0.01


@dataclass(frozen=True)
class ServerLimits:
    """What bounds a request.

    Attributes:
        prompt_length: `rollout.prompt_length`, tokens.
        response_length: `rollout.response_length`, tokens.
        max_model_len: Longest prompt and response together, tokens.
        context_length: Positions the model has, tokens. Bounds scored probes, which may go beyond a full response.
        max_num_seqs: Most sequences in one generation batch.
        ignore_eos: `rollout.ignore_eos`.
        free_cache_engine: Whether `sleep` closes the server until `wake_up`.
    """

    prompt_length: int
    response_length: int
    max_model_len: int
    context_length: int
    max_num_seqs: int
    ignore_eos: bool = False
    free_cache_engine: bool = True


@dataclass(eq=False)
class _Request:
    """A request in the queue: a sequence to generate (`params`), a trace with probes to score, or other work."""

    future: asyncio.Future
    prompt_ids: list[int]
    params: SamplingParams | None = None
    probes: list[Probe] | None = None
    temperature: float = 1.0
    work: Callable[[], Any] | None = None


class RolloutServer:
    """Serves verl's rollout protocol on a transformers model.

    Args:
        model: The model.
        limits: Bounds on requests.
    """

    def __init__(self, model: RolloutModel, limits: ServerLimits):
        self._model = model
        self._limits = limits
        self._global_steps = 0
        self._queue: asyncio.Queue[_Request] = asyncio.Queue()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout-model")
        self._dispatcher: asyncio.Task | None = None
        self._in_flight: set[asyncio.Future] = set()
        self._asleep: set[str] = set()
        self._admitting = asyncio.Event()
        self._admitting.set()
        self._rejecting = False

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        request_id: str,
        image_data: list[Any] | None = None,
        video_data: list[Any] | None = None,
        **kwargs: Any,
    ) -> TokenOutput:
        """Generates after a prompt, or scores text.

        Args:
            prompt_ids: Token ids, at least one.
            sampling_params: As vLLM's. With `prompt_logprobs=0` the prompt is scored at temperature 1, and the answer
                carries vLLM's fields. With `read_probes` (a list of dicts `position`, `token_ids`,
                `closing_token_ids`) and `temperature`, continuations of the prompt's prefixes are scored and nothing
                is generated: `extra_fields["probe_log_probs"]`.
            request_id: Not used: requests are not resumed, and no cache outlives one.
            image_data: Refused.
            video_data: Refused.
            **kwargs: Refused, unless `None` or empty.

        Returns:
            The tokens, their log-probabilities if asked for, and `extra_fields` with `global_steps` (the weights'
            version) and `num_cached_tokens`.

        Raises:
            ValueError: The request asks for what this server cannot do.
            RuntimeError: The server is asleep, or closed to new requests.
        """
        inputs = {"image_data": image_data, "video_data": video_data, **kwargs}
        refused = sorted(name for name, value in inputs.items() if not _says_nothing(value))
        if refused:
            raise ValueError(f"the CPU rollout server takes text only, got {', '.join(refused)}")
        prompt_ids = [int(token) for token in prompt_ids]
        max_possible_tokens = self._limits.max_model_len - len(prompt_ids)
        if "read_probes" in sampling_params:
            return await self._read_probes(prompt_ids, sampling_params)
        if not prompt_ids or max_possible_tokens < 1:
            raise ValueError(
                f"a prompt must have from 1 to {self._limits.max_model_len - 1} tokens to leave room for a response, "
                f"got {len(prompt_ids)}"
            )
        default_max_tokens = min(
            self._limits.response_length,
            self._limits.prompt_length + self._limits.response_length - len(prompt_ids),
        )
        rest = dict(sampling_params)
        num_prompt_logprobs = rest.pop("prompt_logprobs", None)
        # Either answer is right: no prefix cache outlives a request.
        rest.pop("skip_reading_prefix_cache", None)
        params = parse_sampling_params(rest, default_max_tokens, max_possible_tokens, self._limits.ignore_eos)
        if num_prompt_logprobs is not None:
            return await self._score_prompt(prompt_ids, params, num_prompt_logprobs)
        return await self._generate(prompt_ids, params)

    async def load_weights(self, named_tensors: list[tuple[str, Any]]) -> None:
        """Copies a bucket of weights into the model, after the work already begun."""
        await self._run(lambda: self._model.load_weights(named_tensors))

    async def finish_weight_update(self, global_steps: int | None) -> None:
        """Ends a weight update: checks that it was complete and sets the weights' version."""
        await self._run(self._model.finish_weight_update)
        if global_steps is not None:
            await self.set_global_steps(global_steps)

    async def set_global_steps(self, global_steps: int) -> None:
        """Sets the version reported with every answer, in optimiser steps."""
        self._global_steps = int(global_steps)

    async def sleep(self) -> None:
        """Waits for the work in flight, then refuses requests until `wake_up`."""
        await self.wait_for_requests_to_drain()
        if self._limits.free_cache_engine:
            self._asleep = {"weights", "kv_cache"}

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Ends sleep, for the parts named or for all; requests are taken when all are awake."""
        self._asleep = set() if tags is None else self._asleep - set(tags)

    async def wait_for_requests_to_drain(self) -> None:
        """Waits until no request is in flight."""
        while self._in_flight:
            await asyncio.wait(set(self._in_flight))

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        """Ends all requests with what they have, and holds (or rejects) new ones until `resume_generation`."""
        self._rejecting = reject_request
        self._admitting.clear()
        num_aborted = len(self._in_flight)
        self._model.abort.set()
        await self.wait_for_requests_to_drain()
        self._model.abort.clear()
        return {"aborted_count": num_aborted, "request_ids": []}

    async def resume_generation(self) -> None:
        """Takes requests again after `abort_all_requests`."""
        self._rejecting = False
        self._admitting.set()

    async def clear_kv_cache(self) -> None:
        """Does nothing: no cache outlives a request."""

    async def release_kv_cache(self) -> None:
        """Waits for the work in flight; there is no cache to release."""
        await self.wait_for_requests_to_drain()

    async def resume_kv_cache(self) -> None:
        """Does nothing: there is no cache to restore."""

    async def start_profile(self, **kwargs: Any) -> None:
        """Does nothing: there is no device profiler."""

    async def stop_profile(self) -> None:
        """Does nothing: there is no device profiler."""

    async def _generate(self, prompt_ids: list[int], params: SamplingParams) -> TokenOutput:
        sequence = await self._submit(prompt_ids, params=params)
        return TokenOutput(
            token_ids=sequence.token_ids,
            log_probs=sequence.log_probs if params.logprobs else None,
            stop_reason="aborted" if sequence.aborted else "completed",
            extra_fields=self._extra_fields(num_cached_tokens=0),
        )

    async def _score_prompt(self, prompt_ids: list[int], params: SamplingParams, num_logprobs: int) -> TokenOutput:
        if num_logprobs != 0:
            raise ValueError(
                f"prompt_logprobs={num_logprobs!r}: the CPU rollout server supports prompt_logprobs=0 only"
            )
        if params.max_tokens != 1:
            raise ValueError(f"prompt_logprobs needs max_tokens=1 on the CPU rollout server, got {params.max_tokens}")
        fields, token, log_prob = await self._submit(
            prompt_ids, work=lambda: self._model.score_prompt(prompt_ids, params)
        )
        return TokenOutput(
            token_ids=[token],
            log_probs=[log_prob] if params.logprobs else None,
            stop_reason="completed",
            extra_fields=self._extra_fields(num_cached_tokens=0, **fields),
        )

    async def _read_probes(self, prompt_ids: list[int], sampling_params: Mapping[str, Any]) -> TokenOutput:
        unknown = sorted(sampling_params.keys() - {"read_probes", "temperature", "max_tokens"})
        if unknown:
            raise ValueError(f"read_probes takes temperature and max_tokens beside it, got {', '.join(unknown)}")
        probes = parse_probes(sampling_params["read_probes"], len(prompt_ids))
        longest = max((probe.position + len(probe.token_ids) for probe in probes), default=0)
        if longest > self._limits.context_length:
            raise ValueError(f"a probe ends at token {longest}, the model has {self._limits.context_length} positions")
        temperature = float(sampling_params.get("temperature", 1.0))
        if temperature <= 0:
            raise ValueError(f"read_probes needs a positive temperature, got {temperature}")
        fields = await self._submit(prompt_ids, probes=probes, temperature=temperature)
        return TokenOutput(token_ids=[], stop_reason="completed", extra_fields=self._extra_fields(**fields))

    def _extra_fields(self, **fields: Any) -> dict[str, Any]:
        return {"global_steps": self._global_steps, **fields}

    async def _submit(self, prompt_ids: list[int], **kwargs: Any) -> Any:
        """Queues a request and waits for its result."""
        while not self._admitting.is_set():
            if self._rejecting:
                raise RuntimeError("the CPU rollout server is closed to new requests until resume_generation")
            await self._admitting.wait()
        if self._asleep:
            raise RuntimeError(f"the CPU rollout server is asleep ({sorted(self._asleep)}); call wake_up first")
        if self._dispatcher is None:
            self._dispatcher = asyncio.create_task(self._dispatch())
        request = _Request(asyncio.get_running_loop().create_future(), prompt_ids, **kwargs)
        self._in_flight.add(request.future)
        request.future.add_done_callback(self._in_flight.discard)
        self._queue.put_nowait(request)
        return await request.future

    async def _run(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def _dispatch(self) -> None:
        """Takes everything queued, makes batches of it in order of arrival, runs them one after another."""
        while True:
            requests = [await self._queue.get()]
            await asyncio.sleep(_BATCH_WINDOW_SECONDS)
            while not self._queue.empty():
                requests.append(self._queue.get_nowait())
            for batch in _make_batches(requests, self._limits.max_num_seqs):
                await self._answer(batch)

    async def _answer(self, batch: list[_Request]) -> None:
        running = asyncio.get_running_loop().run_in_executor(self._executor, lambda: self._compute(batch))
        # Whatever goes wrong belongs to the requests that caused it; the server goes on.
        await asyncio.wait([running])
        error = running.exception()
        if error is not None:
            for request in batch:
                _resolve(request.future, error=error)
            return
        for request, result in zip(batch, running.result(), strict=True):
            _resolve(request.future, result)

    def _compute(self, batch: list[_Request]) -> list[Any]:
        first, sequences = batch[0], [request.prompt_ids for request in batch]
        if first.work is not None:
            return [first.work()]
        if first.probes is not None:
            return self._model.read_probes(sequences, [each.probes or [] for each in batch], first.temperature)
        return self._model.generate(sequences, [request.params for request in batch])


def _resolve(future: asyncio.Future, result: Any = None, error: BaseException | None = None) -> None:
    # The caller may have gone (its Ray call was cancelled): the future is done then.
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def _says_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, dict | list | tuple) and not value)


def _make_batches(requests: Sequence[_Request], max_num_seqs: int) -> list[list[_Request]]:
    """Groups requests that can share a batch: of generation, or of scoring; other work is a batch of its own."""
    batches: list[list[_Request]] = []
    open_batches: dict[Any, list[_Request]] = {}
    for request in requests:
        key = _batch_key(request)
        batch = open_batches.get(key)
        if key is None or batch is None or len(batch) >= max_num_seqs:
            batch = []
            batches.append(batch)
            if key is not None:
                open_batches[key] = batch
        batch.append(request)
    return batches


def _batch_key(request: _Request) -> Any:
    params = request.params
    if request.probes is not None:
        return "probes", request.temperature
    if params is None or params.seed is not None:
        return None
    # With a repetition penalty the padding token would count as repeated: such prompts must need no padding.
    return params, len(request.prompt_ids) if params.repetition_penalty != 1 else None
