"""What Prometheus is told of a server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, files and time of the process
        self.requests = Counter("elm_requests", "Requests by path and status.", ["path", "status"], registry=registry)
        self.waiting = Gauge("elm_requests_waiting", "Chats whose answer has not begun.", registry=registry)
        self.running = Gauge("elm_requests_running", "Chats whose answer is written.", registry=registry)
        self.prompt_tokens = Counter("elm_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry)
        self.cached_tokens = Counter("elm_cached_tokens", "Those that were read before.", ["model"], registry=registry)
        self.tokens = Counter("elm_completion_tokens", "Tokens that were written.", ["model"], registry=registry)
        self.first_token = Histogram(
            "elm_time_to_first_token_seconds",
            "From a chat's request to the first token of its answer.",
            registry=registry,
            buckets=SECONDS,
        )
        self.seconds = Histogram(
            "elm_request_seconds", "From a chat's request to the end of its answer.", registry=registry, buckets=SECONDS
        )

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
