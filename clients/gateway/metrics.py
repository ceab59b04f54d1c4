"""Figures for Prometheus: what ``GET /metrics`` answers.

The gateway's own are counted as requests go by; the daemon's are read from its status at each scrape, which does not
fail if there is no daemon.  Each has a row in ``docs/gateway.md``.  Who counts is ``observe``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from expertd.protocol import VERSION
from expertd.protocol.messages import ModelStatus, Status
from expertd.protocol.model_names import shown_name

__all__ = ["CONTENT_TYPE", "PRESSURES", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST
FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""A short prompt on a small model to a long one that is read from the SSD."""
BETWEEN_TOKENS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
REQUEST_S = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
PRESSURES = {"normal": 0, "warning": 1, "critical": 2}


class Metrics:
    """A registry of its own, so that nothing else in this process gets into it.  Owned by the gateway's loop."""

    def __init__(self) -> None:
        # They are a second series for each, which nobody asked for.
        disable_created_metrics()  # type: ignore[no-untyped-call, unused-ignore]
        self.registry = ours = CollectorRegistry()
        self._requests = Counter(
            "expertd_requests_total", "Requests for text that have ended.", ("model", "api", "status"), registry=ours
        )
        self._errors = Counter(
            "expertd_request_errors_total", "Requests that ended with an error.", ("model", "api", "code"),
            registry=ours,
        )  # fmt: skip
        self._seconds = Histogram(
            "expertd_request_duration_seconds", "From a request's begin to its end.", ("model", "api"),
            buckets=REQUEST_S, registry=ours,
        )  # fmt: skip
        self._prompt = Counter(
            "expertd_prompt_tokens_total", "Tokens of prompts, the cached ones included.", ("model",), registry=ours
        )
        self._cached = Counter(
            "expertd_prompt_tokens_cached_total", "Tokens of prompts that an earlier request had computed.",
            ("model",), registry=ours,
        )  # fmt: skip
        self._completion = Counter(
            "expertd_completion_tokens_total", "Tokens of answers that were completed.", ("model",), registry=ours
        )
        self._first = Histogram(
            "expertd_time_to_first_token_seconds", "From a request's begin to its first token.", ("model",),
            buckets=FIRST_TOKEN_S, registry=ours,
        )  # fmt: skip
        self._between = Histogram(
            "expertd_inter_token_seconds", "From a token of an answer to its next.", ("model",),
            buckets=BETWEEN_TOKENS_S, registry=ours,
        )  # fmt: skip
        self._ready = Gauge(
            "expertd_model_ready", "1: the model takes requests; 0: it does not.", ("model",), registry=ours
        )
        self._waiting = Gauge(
            "expertd_answers_waiting", "Answers that wait for their turn.", ("model",), registry=ours
        )
        self._running = Gauge("expertd_answers_running", "Answers that a worker has.", ("model",), registry=ours)
        build = Gauge("expertd_build_info", "Always 1; the version is a label.", ("version",), registry=ours)
        build.labels(VERSION).set(1)
        self._daemon = _DaemonCollector()
        self.registry.register(self._daemon)

    def between_tokens(self, model: str) -> Callable[[float], None]:
        """What takes the seconds between two tokens of ``model``; looked up once, called for each token."""
        observe: Callable[[float], None] = self._between.labels(model).observe
        return observe

    def first_token(self, model: str, seconds: float) -> None:
        """The first token of a request came."""
        self._first.labels(model).observe(seconds)

    def computed(self, model: str, prompt: int, cached: int, completion: int) -> None:
        """An answer is complete, with so many tokens."""
        self._prompt.labels(model).inc(prompt)
        self._cached.labels(model).inc(cached)
        self._completion.labels(model).inc(completion)

    def ended(self, model: str, api: str, status: int, seconds: float, error: str) -> None:
        """A request is over; ``error`` is a code, or empty."""
        self._requests.labels(model, api, str(status)).inc()
        self._seconds.labels(model, api).observe(seconds)
        if error:
            self._errors.labels(model, api, error).inc()

    def model(self, name: str, *, ready: bool, waiting: int, running: int) -> None:
        """How a served model does now."""
        self._ready.labels(name).set(ready)
        self._waiting.labels(name).set(waiting)
        self._running.labels(name).set(running)

    def render(self, status: Status | None) -> bytes:
        """The text of a scrape; ``status`` is the daemon's, None if it is away."""
        self._daemon.status = status
        return generate_latest(self.registry)


class _DaemonCollector(Collector):
    """The figures of the daemon's status."""

    def __init__(self) -> None:
        self.status: Status | None = None

    def collect(self) -> Iterator[Metric]:
        found = self.status
        yield _gauge("expertd_daemon_up", "1: the daemon answers; 0: it does not.", 0 if found is None else 1)
        if found is None:
            return
        yield _gauge("expertd_cache_budget_bytes", "Memory that experts may take.", found.budget_bytes)
        yield _gauge("expertd_cache_limit_bytes", "What memory pressure leaves of the budget.", found.limit_bytes)
        yield _gauge("expertd_cache_used_bytes", "Memory that experts take, all models together.", found.used_bytes)
        yield _gauge(
            "expertd_memory_pressure", "How short of memory the machine is: 0 normal, 1 warning, 2 critical.",
            PRESSURES.get(found.pressure, 0),
        )  # fmt: skip
        yield _gauge("expertd_daemon_resident_memory_bytes", "The daemon's own memory.", found.daemon.rss_bytes)
        yield _gauge("expertd_daemon_uptime_seconds", "Since the daemon's start.", found.daemon.uptime_s)
        yield from _of_models(found.models)


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help, value=value)


COUNTED: Sequence[tuple[str, str, Callable[[ModelStatus], float]]] = (
    ("expertd_cache_hits", "Blocks that were in memory when they were needed.", lambda model: model.hits),
    ("expertd_cache_misses", "Blocks that were not.", lambda model: model.misses),
    ("expertd_cache_read_bytes", "Bytes read from disk.", lambda model: model.bytes_read),
    ("expertd_cache_evictions", "Blocks evicted.", lambda model: model.evictions),
    ("expertd_cache_stall_seconds", "How long sessions waited for blocks.", lambda model: model.waited_s),
    ("expertd_cache_load_seconds", "The part of it in which blocks were read.", lambda model: model.read_wait_s),
)
HELD: Sequence[tuple[str, str, Callable[[ModelStatus], float]]] = (
    ("expertd_cache_bytes", "Memory that the model's experts take.", lambda model: model.pool_bytes),
    ("expertd_cache_blocks", "The model's blocks: experts of layers.", lambda model: model.blocks),
    ("expertd_cache_resident_blocks", "Those in memory.", lambda model: model.resident_blocks),
    ("expertd_sessions", "Programs' sessions.", lambda model: len(model.sessions)),
)


def _of_models(models: Sequence[ModelStatus]) -> Iterator[Metric]:
    named = _named(models)
    for name, help, value in COUNTED:
        counter = CounterMetricFamily(name, help, labels=["model"])
        for model_name, model in named.items():
            counter.add_metric([model_name], value(model))
        yield counter
    for name, help, value in HELD:
        gauge = GaugeMetricFamily(name, help, labels=["model"])
        for model_name, model in named.items():
            gauge.add_metric([model_name], value(model))
        yield gauge
    labels = ["model", "kind"]
    useful = GaugeMetricFamily(
        "expertd_read_ahead_useful_ratio", "Of what was announced, the part that was used, lately.", labels=labels
    )
    reading = GaugeMetricFamily("expertd_read_ahead_on", "1: it is read ahead; 0: it does not pay.", labels=labels)
    used = CounterMetricFamily("expertd_read_ahead_useful_bytes", "Bytes read ahead and used.", labels=labels)
    wasted = CounterMetricFamily("expertd_read_ahead_wasted_bytes", "Bytes read ahead in vain.", labels=labels)
    for model_name, model in named.items():
        for ahead in model.ahead:
            of = [model_name, ahead.kind]
            useful.add_metric(of, ahead.useful)
            reading.add_metric(of, ahead.reading)
            used.add_metric(of, ahead.useful_bytes)
            wasted.add_metric(of, ahead.wasted_bytes)
    yield from (useful, reading, used, wasted)


def _named(models: Sequence[ModelStatus]) -> dict[str, ModelStatus]:
    """Models by the names that they are shown by; of two with one name, the later one by its path."""
    found: dict[str, ModelStatus] = {}
    for model in models:
        name = shown_name(Path(model.path))
        found[name if name not in found else model.path if model.path not in found else model.id] = model
    return found
