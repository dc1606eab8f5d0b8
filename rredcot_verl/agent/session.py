"""Which request a rollout made: its id leads to the server that holds its prefix."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Session:
    """One rollout of one prompt, while it runs.

    Attributes:
        sampling_params: What it is sampled with.
        request_id: Its last request.
        generated: To be called when the response is complete.
    """

    sampling_params: Mapping[str, Any] = field(default_factory=dict)
    request_id: str | None = None
    generated: Callable[[], None] = lambda: None


SESSION: ContextVar[Session | None] = ContextVar("rredcot_session", default=None)


class SessionClient:
    """verl's client of a worker, remembering the request id of the rollout that called it.

    Around the client and not in place of it: verl has one class for each trainer mode.
    """

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def generate(self, request_id: str, **kwargs: Any) -> Any:
        """See `LLMServerClient.generate`."""
        session = SESSION.get()
        if session is not None:
            session.request_id = request_id
        return await self._client.generate(request_id, **kwargs)
