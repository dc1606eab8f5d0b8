"""Which request a rollout made: its id leads to the server that holds its prefix."""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from verl.workers.rollout.llm_server import LLMServerClient


@dataclass
class Session:
    """One rollout of one prompt, while it runs.

    Attributes:
        sampling_params: What it is sampled with.
        request_id: Its last request.
    """

    sampling_params: Mapping[str, Any] = field(default_factory=dict)
    request_id: str | None = None


SESSION: ContextVar[Session | None] = ContextVar("rredcot_session", default=None)


class SessionClient(LLMServerClient):
    """verl's client, remembering the request id of the rollout that called it: the id that leads to its server."""

    async def generate(self, request_id: str, **kwargs: Any) -> Any:
        """See `LLMServerClient.generate`."""
        session = SESSION.get()
        if session is not None:
            session.request_id = request_id
        return await super().generate(request_id, **kwargs)
