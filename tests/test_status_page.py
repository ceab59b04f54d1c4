"""What the status page is made of, without a gateway: requests as they are seen, the last minutes, figures, HTML."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest

from expertd.clients.gateway.observe import KEPT, Observer, Seen
from expertd.clients.gateway.page import Page, ServedModel, figures, lines
from expertd.clients.gateway.watch import KEPT_S, Found, History
from expertd.protocol.messages import DaemonStatus, Delta, Finished, LayerStatus, Status
from tests.test_status import model, session, status

READY = ServedModel("Qwen3-30B-A3B-4bit", "ready", running=1)


class Clock:
    """Tells the time that it was set to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def delta(tokens: int = 1) -> Delta:
    return Delta(request=1, text="", tokens=tokens)


def finished(prompt: int = 31, cached: int = 0, tokens: int = 3) -> Finished:
    return Finished(request=1, reason="stop", prompt_tokens=prompt, completion_tokens=tokens, cached_tokens=cached)


def begun(observer: Observer, name: str = "m") -> Seen:
    seen = observer.begin("/v1/chat/completions", "anna")
    seen.of(name)
    return seen


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_request_waits_runs_and_ends() -> None:
    clock = Clock()
    observer = Observer(clock)
    seen = begun(observer)
    (waiting,) = observer.requests()
    assert (waiting.state, waiting.api, waiting.model, waiting.key) == ("waiting", "chat", "m", "anna")
    assert waiting.first_token_s is None and waiting.tokens_per_s is None
    clock.now = 102.0
    seen.event(0, delta())
    clock.now = 104.0
    seen.event(0, delta(4))
    (running,) = observer.requests()
    assert (running.state, running.tokens, running.first_token_s, running.tokens_per_s) == ("running", 5, 2.0, 2.0)
    seen.event(0, finished(31, 12, 5))
    seen.end(200)
    clock.now = 110.0
    (ended,) = observer.requests()
    assert (ended.state, ended.status, ended.seconds, ended.age_s) == ("ended", 200, 4.0, 10.0)
    assert (ended.prompt_tokens, ended.cached_tokens) == (31, 12)


def test_the_time_between_tokens_is_that_of_one_answer() -> None:
    clock = Clock()
    observer = Observer(clock)
    seen = begun(observer)
    for place, at in ((0, 101.0), (1, 101.4), (0, 102.0), (1, 103.4)):
        clock.now = at
        seen.event(place, delta())
    text = observer.metrics.render(None).decode()
    assert 'expertd_inter_token_seconds_count{model="m"} 2.0' in text
    assert 'expertd_inter_token_seconds_sum{model="m"} 3.0' in text
    assert 'expertd_time_to_first_token_seconds_sum{model="m"} 1.0' in text


def test_a_client_that_leaves_and_an_error_in_a_stream_are_told() -> None:
    observer = Observer(Clock())
    begun(observer).end(None, left=True)
    begun(observer).end(200, left=True)
    begun(observer).end(200, "worker_unavailable")
    observer.begin("/v1/messages").end(404, "model_not_found")
    text = observer.metrics.render(None).decode()
    assert 'expertd_requests_total{api="chat",model="m",status="499"} 2.0' in text
    assert 'expertd_request_errors_total{api="chat",code="worker_unavailable",model="m"} 1.0' in text
    assert 'expertd_requests_total{api="messages",model="",status="404"} 1.0' in text
    assert not observer.under_way


def test_only_the_latest_requests_are_kept() -> None:
    observer = Observer(Clock())
    for number in range(KEPT + 5):
        begun(observer, f"m{number}").end(200)
    assert [request.model for request in observer.requests()] == [f"m{KEPT + 4 - number}" for number in range(KEPT)]


# -- the last minutes --------------------------------------------------------------------------------------------------


def at(uptime_s: float, hits: int = 0, misses: int = 0, bytes_read: int = 0, pid: int = 1) -> Status:
    daemon = DaemonStatus(pid=pid, version="1", uptime_s=uptime_s, rss_bytes=1)
    return status(model(hits=hits, misses=misses, bytes_read=bytes_read), daemon=daemon)


def test_the_history_has_a_point_a_second_and_forgets_after_minutes() -> None:
    history = History()
    for tenth in range(40):
        history.add(at(tenth / 10, hits=9 * tenth, misses=tenth, bytes_read=100 * tenth), tenth / 10)
    points = history.points(4.0)
    assert 3 <= len(points) <= 5
    assert {point.hit_rate for point in points} == {0.9}
    assert points[-1].read_bytes_per_s == pytest.approx(1000)
    assert history.points(4.0 + KEPT_S) == []


def test_another_daemon_begins_anew() -> None:
    history = History()
    history.add(at(5, hits=10), 0)
    assert history.add(at(6, hits=20), 1) is not None
    assert history.add(at(1, hits=5, pid=2), 2) is None
    assert len(history.points(2)) == 1


def test_where_nothing_was_measured_there_is_no_line() -> None:
    history: list[dict[str, Any]] = [
        {"ago_s": ago_s, "hit_rate": value}
        for ago_s, value in ((50, 0.5), (49, 1.0), (48, None), (47, 0.0), (46, 0.25), (20, 0.5), (1, 0.5), (0, 2.0))
    ]
    assert lines(history, "hit_rate", 1.0, 60.0) == ["10.0,50.0 11.0,0.0", "13.0,100.0 14.0,75.0", "59.0,50.0 60.0,0.0"]
    assert lines([], "hit_rate", 1.0, 60.0) == []
    assert lines([{"ago_s": 1, "x": 0}, {"ago_s": 0, "x": 0}], "x", 0, 60.0) == ["59.0,100.0 60.0,100.0"]


# -- the page ----------------------------------------------------------------------------------------------------------


class Read(HTMLParser):
    """The words and the elements of a page; fails if it is not closed in order."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words = ""
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words += " " + " ".join(data.split())


def layers(count: int) -> list[LayerStatus]:
    return [
        LayerStatus(pool=0, pool_slots=9, resident_blocks=number, hits=number, misses=1, bytes_read=0, evictions=0)
        for number in range(count)
    ]


def shown(found: Status | None, *served: ServedModel, requests: Observer | None = None) -> dict[str, Any]:
    history = History()
    rates = None
    if found is not None:
        history.add(msgspec.structs.replace(found, models=[]), 0)
        later = msgspec.structs.replace(found.daemon, uptime_s=found.daemon.uptime_s + 2)
        found = msgspec.structs.replace(found, daemon=later)
        rates = history.add(found, 2)
    state = Found(found, rates, {41: "expertd serve"}, "" if found is not None else "no daemon runs in /h")
    return figures(served or [READY], requests.requests() if requests else [], state, history.points(2), 2)


def test_a_large_model_has_a_cell_for_each_layer() -> None:
    found = shown(status(model(sessions=[session(41)], layers=layers(48))))
    read = Read(Page().whole(found))
    cells = [attributes for tag, attributes in read.elements if tag == "rect" and "fill-opacity" in attributes]
    assert len(cells) == 3 * 48
    opacities = [float(cell["fill-opacity"] or 0) for cell in cells[:48]]
    assert opacities == sorted(opacities) and opacities[0] == 0.06, "more is stronger, nothing is nearly nothing"
    assert "layer 47: 37 % of its experts are in memory" in read.words
    assert "All is well." in read.words and "expertd serve" in read.words
    assert "1 running, 0 waiting" in read.words


def test_a_model_is_shown_that_others_use_and_one_that_is_asleep() -> None:
    found = shown(status(model("/m/other")), ServedModel("mine", "asleep"))
    assert [(one["name"], one["served"], one["cache"] is None) for one in found["models"]] == [
        ("mine", True, True), ("other", False, False)
    ]  # fmt: skip
    read = Read(Page().part(found))
    assert "not served here" in read.words and "Its next request loads it." in read.words


@pytest.mark.parametrize(
    ("found", "served", "words"),
    [
        (None, READY, "The cache daemon is away."),
        (None, READY, "no daemon runs in /h"),
        (status(), ServedModel("m", "loading", "the worker is loading m"), "No model takes requests now."),
        (status(), ServedModel("m", "loading", "the worker is loading m"), "the worker is loading m"),
        (status(pressure="critical", pressure_figure="3 %"), READY, "The machine is short of memory."),
        (status(pressure="critical", pressure_figure="3 %"), READY, "12.0 GB at most (3 %)"),
        (status(limit_bytes=6_000_000_000), READY, "6.0 GB for now; more again step by step"),
        (status(), READY, "None yet."),
    ],
)
def test_what_is_wrong_is_said(found: Status | None, served: ServedModel, words: str) -> None:
    assert words in Read(Page().part(shown(found, served))).words


def test_requests_are_shown_with_counts_and_their_end() -> None:
    observer = Observer(Clock())
    for end in ((200, ""), (None, ""), (200, "worker_unavailable"), (400, "request_invalid")):
        seen = begun(observer, "hub/m")
        seen.event(0, delta(1234))
        seen.event(0, finished(4321, 17, 1234))
        seen.end(end[0], end[1])
    read = Read(Page().part(shown(status(), requests=observer)))
    for words in ("anna", "1,234", "4,321", "done", "client left", "worker_unavailable", "request_invalid"):
        assert f" {words} " in read.words


def test_names_are_text_whatever_they_are() -> None:
    evil = "<script>alert(1)</script>\"'"
    text = Page().whole(shown(status(model(f"/m/{evil.replace('/', '')}")), ServedModel(evil, "loading", evil)))
    assert "<script>alert" not in text
    assert evil in Read(text).words
    assert len(re.findall(r"<script", text)) == 1
