"""The rollout server: takes requests one by one, answers them in batches, keeps the event loop free.

All torch work runs on one thread, so generation, probes and weight updates never overlap.
"""

import asyncio
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from verl.workers.rollout.replica import TokenOutput

from rredcot_verl.cpu.language_model import RolloutModel
from rredcot_verl.cpu.sampling import SamplingParams, parse_sampling_params
from rredcot_verl.servers.probe_queue import Progress
from rredcot_verl.servers.probe_requests import parse_probes, refuse_media, timeout_of

# Requests of a step come one by one over some tenths of a second, as their sender gets to them. A batch is taken when
# none came for the first of these, or at the latest after the second: a pass over many sequences costs little more
# than one over few.
_QUIET_SECONDS = 0.06
_LONGEST_WAIT_SECONDS = 0.5


@dataclass(frozen=True)
class ServerLimits:
    """What bounds a request.

    Attributes:
        prompt_length: `rollout.prompt_length`, tokens.
        response_length: `rollout.response_length`, tokens.
        max_model_len: Longest prompt and response together, tokens.
        context_length: Positions the model has, tokens. Bounds probes, which may go beyond a full response.
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
    """A request in the queue.

    Attributes:
        future: Of its result.
        compute: Takes the prompts of a batch and their arguments, gives one result for each.
        prompt_ids: The prompt.
        argument: What to do with it.
        key: Requests of one key can share a batch; `None`: a batch of its own.
    """

    future: asyncio.Future
    compute: Callable[[list[list[int]], list[Any]], list[Any]]
    prompt_ids: list[int]
    argument: Any
    key: Any


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
        self._progress = Progress()
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
        """Generates after a prompt, or reads probes.

        Args:
            prompt_ids: Token ids, at least one.
            sampling_params: As vLLM's. With `read_probes`, see `parse_probes`, continuations of the prompt's prefixes
                are read and nothing is generated: `extra_fields["probe_log_probs"]`, see `probing.read_probes`.
            request_id: Not used: requests are not resumed, and no cache outlives one.
            image_data: Refused.
            video_data: Refused.
            **kwargs: Refused, unless `None`, 0 or empty.

        Returns:
            The tokens, their log-probabilities if asked for, and `extra_fields` with `global_steps` (the weights'
            version) and, for generation, `num_cached_tokens`.

        Raises:
            ValueError: The request asks for what this server cannot do.
            RuntimeError: The server is asleep, or closed to new requests.
            ProbingTimeout: No batch was done within the `timeout_s` of `read_probes`.
        """
        refuse_media("the CPU rollout server", {"image_data": image_data, "video_data": video_data, **kwargs})
        prompt_ids = [int(token) for token in prompt_ids]
        if "read_probes" in sampling_params:
            return await self._read_probes(prompt_ids, sampling_params)
        max_possible_tokens = self._limits.max_model_len - len(prompt_ids)
        if not prompt_ids or max_possible_tokens < 1:
            raise ValueError(
                f"a prompt must have from 1 to {self._limits.max_model_len - 1} tokens to leave room for a response, "
                f"got {len(prompt_ids)}"
            )
        default_max_tokens = min(
            self._limits.response_length,
            self._limits.prompt_length + self._limits.response_length - len(prompt_ids),
        )
        params = parse_sampling_params(
            sampling_params, default_max_tokens, max_possible_tokens, self._limits.ignore_eos
        )
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

    async def release_kv_cache(self) -> None:
        """Waits for the work in flight; there is no cache to release."""
        await self.wait_for_requests_to_drain()

    async def clear_kv_cache(self, **kwargs: Any) -> None:
        """Does nothing: no cache outlives a request, and there is no device profiler."""

    resume_kv_cache = start_profile = stop_profile = clear_kv_cache

    async def _generate(self, prompt_ids: list[int], params: SamplingParams) -> TokenOutput:
        # With a repetition penalty the padding token would count as repeated: such prompts must need no padding.
        length = len(prompt_ids) if params.repetition_penalty != 1 else None
        key = (params, length) if params.seed is None else None
        sequence = await self._submit(self._model.generate, prompt_ids, params, key)
        log_probs = sequence.log_probs if params.logprobs else None
        return self._output(sequence.token_ids, log_probs, sequence.aborted, num_cached_tokens=0)

    async def _read_probes(self, prompt_ids: list[int], sampling_params: Mapping[str, Any]) -> TokenOutput:
        probes, temperature = parse_probes(sampling_params, len(prompt_ids))
        longest = max((probe.num_tokens for probe in probes), default=0)
        if longest > self._limits.context_length:
            raise ValueError(f"a probe ends at token {longest}, the model has {self._limits.context_length} positions")
        read = functools.partial(self._model.read_probes, temperature=temperature)
        submitted = self._submit(read, prompt_ids, probes, ("probes", temperature))
        results = await self._progress.watch(submitted, timeout_of(sampling_params))
        return self._output([], probe_log_probs=results)

    def _output(
        self, token_ids: list[int], log_probs: list[float] | None = None, aborted: bool = False, **fields: Any
    ) -> TokenOutput:
        return TokenOutput(
            token_ids=token_ids,
            log_probs=log_probs,
            stop_reason="aborted" if aborted else "completed",
            extra_fields={"global_steps": self._global_steps, **fields},
        )

    async def _submit(self, compute: Callable[..., list[Any]], prompt_ids: list[int], argument: Any, key: Any) -> Any:
        """Queues a request, see `_Request`, and waits for its result."""
        while not self._admitting.is_set():
            if self._rejecting:
                raise RuntimeError("the CPU rollout server is closed to new requests until resume_generation")
            await self._admitting.wait()
        if self._asleep:
            raise RuntimeError(f"the CPU rollout server is asleep ({sorted(self._asleep)}); call wake_up first")
        if self._dispatcher is None:
            self._dispatcher = asyncio.create_task(self._dispatch())
        request = _Request(asyncio.get_running_loop().create_future(), compute, prompt_ids, argument, key)
        self._in_flight.add(request.future)
        request.future.add_done_callback(self._in_flight.discard)
        self._queue.put_nowait(request)
        return await request.future

    async def _run(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def _dispatch(self) -> None:
        """Takes everything queued, makes batches of it in order of arrival, runs them one after another."""
        while True:
            requests, deadline = [await self._queue.get()], time.monotonic() + _LONGEST_WAIT_SECONDS
            num_before = 0
            while num_before < len(requests) < self._limits.max_num_seqs and time.monotonic() < deadline:
                num_before = len(requests)
                await asyncio.sleep(_QUIET_SECONDS)
                while not self._queue.empty():
                    requests.append(self._queue.get_nowait())
            for batch in _make_batches(requests, self._limits.max_num_seqs):
                await self._answer(batch)

    async def _answer(self, batch: list[_Request]) -> None:
        prompts, arguments = [request.prompt_ids for request in batch], [request.argument for request in batch]
        running = asyncio.get_running_loop().run_in_executor(self._executor, batch[0].compute, prompts, arguments)
        # Whatever goes wrong belongs to the requests that caused it; the server goes on.
        await asyncio.wait([running])
        self._progress.made()
        error = running.exception()
        for number, request in enumerate(batch):
            # The caller may have gone (its Ray call was cancelled): the future is done then.
            if request.future.done():
                continue
            if error is not None:
                request.future.set_exception(error)
            else:
                request.future.set_result(running.result()[number])


def _make_batches(requests: Sequence[_Request], max_num_seqs: int) -> list[list[_Request]]:
    """Groups requests that can share a batch, in order of arrival."""
    batches: list[list[_Request]] = []
    open_batches: dict[Any, list[_Request]] = {}
    for request in requests:
        batch = open_batches.get(request.key) if request.key is not None else None
        if batch is None or len(batch) >= max_num_seqs:
            batch = open_batches[request.key] = []
            batches.append(batch)
        batch.append(request)
    return batches
