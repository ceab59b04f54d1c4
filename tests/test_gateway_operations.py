"""What whoever runs a gateway has of it: keys, named hosts and sites, metrics, the status page, and clean logs.

One real gateway with keys and the fullest log serves all of it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from expertd.clients.gateway.metrics import Metrics
from expertd.protocol.connection import Connection
from expertd.protocol.messages import AheadStatus, Stop
from expertd.protocol.paths import Home
from expertd.worker.manifest import load_lazily
from tests.browser import Page, browser, page
from tests.gateway_stage import DEADLINE_S, ENDLESS, HELLO, Served, eventually, say, serving, stop_daemon
from tests.test_status import model, status
from tools.stage import budget_for

ANNA, BERT = "anna-0123456789abcdef", "bert-fedcba9876543210"
SITE = "https://chat.example.org"
SECRET = "Xyzzy"
"""Is in whatever the gateway must not write down."""
DOCUMENT = Path(__file__).parents[1] / "docs" / "gateway.md"


@pytest.fixture(scope="module")
def served(checkpoints: dict[str, Path]) -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="xd-", dir="/tmp") as root:
        home = Home(Path(root))
        home.prepare()
        keys = home.root / "keys"
        keys.touch(mode=0o600)
        keys.write_text(f"anna {ANNA}\nbert {BERT}\n")
        options = ["--api-key-file", str(keys), "--allow-origin", SITE, "--allow-host", "studio.local"]
        manifest = load_lazily(checkpoints["stacked"]).manifest
        half = sum(layer.experts for layer in manifest.layers) // 2
        options += ["--budget", str(budget_for(manifest, half))]
        try:
            with serving(home, checkpoints["stacked"], *options, "--log-level", "debug") as served:
                yield served
        finally:
            stop_daemon(home)


def bearer(key: str = ANNA) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def basic(key: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"me:{key}".encode()).decode()}


def raw(served: Served, head: str, *body: bytes) -> tuple[str, dict[str, str], bytes]:
    """One request as it goes over the wire, of which the connection ends: status line, headers, body."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE_S) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        try:
            for piece in body:
                connection.sendall(piece)
        except ConnectionError:
            pass  # it had heard enough
        received = b""
        while piece := connection.recv(65536):
            received += piece
    top, _, rest = received.partition(b"\r\n\r\n")
    lines = top.decode().split("\r\n")
    return lines[0], {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}, rest


def scraped(served: Served) -> dict[str, float]:
    """The samples of a scrape, as ``name{label="value"}``; without buckets."""
    _, _, body = raw(served, f"GET /metrics HTTP/1.1\nHost: localhost\nConnection: close\nx-api-key: {BERT}")
    found = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [bearer(), bearer(BERT), {"x-api-key": ANNA}, basic(BERT)])
def test_who_has_a_key_is_let_in(served: Served, headers: dict[str, str]) -> None:
    assert served.request("GET", "/v1/models", headers=headers)[0] == 200


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/chat/completions", "/health", "/health/ready", "/metrics", "/status.json", "/", "/no"]
)
@pytest.mark.parametrize("headers", [{}, bearer(ANNA[:-1]), bearer("anna"), basic("anna"), {"x-api-key": ""}])
def test_who_has_none_is_not(served: Served, path: str, headers: dict[str, str]) -> None:
    status, answered, body = served.request("GET", path, headers=headers)
    assert (status, body["error"]["code"], body["error"]["type"]) == (401, "invalid_api_key", "invalid_request_error")
    assert answered["www-authenticate"].startswith('Bearer realm="expertd"')
    assert ("Basic" in answered["www-authenticate"]) == (not path.startswith("/v1") and path != "/no")
    assert answered["x-should-retry"] == "false"


def test_whether_somebody_is_there_needs_no_key(served: Served) -> None:
    status, _, body = served.request("GET", "/health/live")
    assert (status, body) == (200, {"status": "live"})


def test_the_vendors_libraries_know_the_error(served: Served) -> None:
    with openai.OpenAI(base_url=served.url, api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            say(client, served)
        assert caught.value.code == "invalid_api_key"
    url = served.url.removesuffix("/v1")
    question: list[Any] = [{"role": "user", "content": "Hello"}]
    with (
        anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as other,
        pytest.raises(anthropic.AuthenticationError, match="authentication_error"),
    ):
        other.messages.create(model=served.model, max_tokens=3, messages=question)
    with anthropic.Anthropic(base_url=url, api_key=ANNA, max_retries=0) as other:
        message = other.messages.create(model=served.model, max_tokens=3, messages=question)
    assert message.usage.output_tokens == 3


def test_the_log_names_the_key_and_keeps_it(served: Served) -> None:
    with openai.OpenAI(base_url=served.url, api_key=BERT) as client:
        say(client, served, max_tokens=7)
    log = served.home.gateway_log(served.process.pid)
    assert eventually(lambda: re.search(r"request finished: status=200 .*key=bert model=.* tokens=7", log.read_text()))
    assert ANNA not in log.read_text() and BERT not in log.read_text()


def test_the_log_tells_of_wrong_keys_now_and_then(served: Served) -> None:
    for _ in range(3):
        assert served.request("GET", "/v1/models", headers=bearer("wrong"))[0] == 401
    lines = re.findall(r"WARNING .* a request had no key, or a wrong one: remote=127\.0\.0\.1 times=\d+\n",
                       served.home.gateway_log(served.process.pid).read_text())  # fmt: skip
    assert 1 <= len(lines) <= 2, "once a minute"


# -- hosts and sites ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["studio.local", "STUDIO.local:80", "localhost"])
def test_it_may_be_called_by_names_that_were_allowed(served: Served, host: str) -> None:
    assert served.request("GET", "/v1/models", headers=bearer() | {"Host": host})[0] == 200


def test_any_other_name_is_refused_even_with_a_key(served: Served) -> None:
    status, _, body = served.request("GET", "/v1/models", headers=bearer() | {"Host": "studio.local.example"})
    assert status == 400
    assert "--allow-host" in body["error"]["message"]


ASKS = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}


def test_a_page_of_a_named_site_may_ask_and_read(served: Served) -> None:
    status, headers, _ = served.request("OPTIONS", "/v1/chat/completions", headers=ASKS | {"Origin": SITE})
    assert status == 204, "a browser sends no key with that question"
    assert headers["access-control-allow-origin"] == SITE
    assert headers["access-control-allow-methods"] == "GET, POST, DELETE"
    assert headers["access-control-allow-headers"] == "authorization, content-type"
    body = json.dumps({"model": served.model, "messages": HELLO, "max_tokens": 2, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\nHost: localhost\nOrigin: {SITE}\nConnection: close\n"
    line, headers, text = raw(served, f"{head}Authorization: Bearer {ANNA}\nContent-Length: {len(body)}", body)
    assert (line, headers["access-control-allow-origin"], headers["vary"]) == ("HTTP/1.1 200 OK", SITE, "Origin")
    assert headers["access-control-expose-headers"] == "Retry-After, x-should-retry"
    assert b"data: [DONE]" in text
    _, headers, _ = served.request("GET", "/v1/models", headers={"Origin": SITE})
    assert headers["access-control-allow-origin"] == SITE, "it can read errors, too"


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", f"{SITE}.evil.example", f"{SITE}:81", "http://chat.example.org", "http://[", "x"],
)
def test_a_page_of_any_other_site_may_not(served: Served, origin: str) -> None:
    for method, more in (("OPTIONS", ASKS), ("GET", bearer())):
        status, headers, body = served.request(method, "/v1/models", headers=more | {"Origin": origin})
        assert status == 400
        assert "--allow-origin" in body["error"]["message"]
        assert "access-control-allow-origin" not in headers
        assert headers["vary"] == "Origin"


def test_no_page_can_read_what_it_was_not_named_for(served: Served) -> None:
    for origin in ({}, {"Origin": f"http://localhost:{served.port}"}):
        status, headers, _ = served.request("GET", "/v1/models", headers=bearer() | origin)
        assert (status, "access-control-allow-origin" in headers) == (200, False)


def test_a_body_without_a_length_may_not_be_longer_either(served: Served) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked\nConnection: close\n"
    piece = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
    line, _, body = raw(served, f"{head}Authorization: Bearer {ANNA}", *[piece] * 66, b"0\r\n\r\n")
    assert line == "HTTP/1.1 413 Request Entity Too Large"
    assert json.loads(body)["error"] == {
        "message": "the body is longer than the 67108864 bytes that are allowed",
        "type": "invalid_request_error", "param": None, "code": "request_too_large",
    }  # fmt: skip


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_requests_and_tokens_are_counted(served: Served) -> None:
    def labels(api: str, **more: str) -> str:
        pairs = {"api": api, "model": served.model} | more
        return "{" + ",".join(f'{name}="{value}"' for name, value in sorted(pairs.items())) + "}"

    before, of_model = scraped(served), f'{{model="{served.model}"}}'
    with openai.OpenAI(base_url=served.url, api_key=ANNA) as client:
        whole = say(client, served, max_tokens=9)
        list(say(client, served, max_tokens=9, stream=True))
        say(client, served, n=2, max_tokens=5)
        with pytest.raises(openai.BadRequestError):
            say(client, served, temperature=-1)
    after = scraped(served)

    def more(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert more("expertd_requests_total" + labels("chat", status="200")) == 3
    assert more("expertd_request_duration_seconds_count" + labels("chat")) == 3
    assert more('expertd_requests_total{api="chat",model="",status="400"}') == 1, "it named no model that is served"
    assert more('expertd_request_errors_total{api="chat",code="request_invalid",model=""}') == 1
    assert more("expertd_completion_tokens_total" + of_model) == 9 + 9 + 5 + 5
    assert more("expertd_prompt_tokens_total" + of_model) == 4 * whole.usage.prompt_tokens
    assert more("expertd_prompt_tokens_cached_total" + of_model) > 0
    assert more("expertd_time_to_first_token_seconds_count" + of_model) == 3
    assert 0 < more("expertd_inter_token_seconds_count" + of_model) <= 8 + 8 + 4 + 4
    assert after["expertd_answers_running" + of_model] == after["expertd_answers_waiting" + of_model] == 0
    assert after["expertd_model_ready" + of_model] == after["expertd_daemon_up{}"] == 1


def test_who_runs_and_who_leaves_is_counted(served: Served) -> None:
    of_model = f'{{model="{served.model}"}}'
    left = f'expertd_requests_total{{api="chat",model="{served.model}",status="499"}}'
    before = scraped(served).get(left, 0.0)
    body = json.dumps({"model": served.model, "messages": HELLO, "max_tokens": ENDLESS, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nx-api-key: {ANNA}\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE_S) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert connection.recv(1)
        assert scraped(served)["expertd_answers_running" + of_model] == 1
        _, _, shown = served.request("GET", "/status.json", headers=bearer())
        assert [request["state"] for request in shown["requests"]].count("running") == 1
    assert eventually(lambda: scraped(served).get(left, 0.0) == before + 1)
    assert eventually(lambda: scraped(served)["expertd_answers_running" + of_model] == 0)


def test_the_daemon_s_figures_are_those_of_its_status(served: Served) -> None:
    with openai.OpenAI(base_url=served.url, api_key=ANNA) as client:
        say(client, served)
    found, of_model = scraped(served), f'{{model="{served.model}"}}'
    _, _, shown = served.request("GET", "/status.json", headers=bearer())
    (one,) = shown["models"]
    cache = one["cache"]
    assert cache["hits"] == found["expertd_cache_hits_total" + of_model] > 0
    assert cache["misses"] == found["expertd_cache_misses_total" + of_model] > 0
    assert cache["bytes_read"] == found["expertd_cache_read_bytes_total" + of_model] > 0
    assert cache["stall_s"] == found["expertd_cache_stall_seconds_total" + of_model] > 0
    assert sum(layer["hits"] for layer in cache["layers"]) == cache["hits"]
    assert cache["resident_blocks"] == found["expertd_cache_resident_blocks" + of_model] <= cache["blocks"] // 2
    assert shown["daemon"]["budget_bytes"] == found["expertd_cache_budget_bytes{}"]
    assert found[f'expertd_read_ahead_on{{kind="next layer",model="{served.model}"}}'] in (0, 1)


def documented() -> set[str]:
    return set(re.findall(r"(?m)^\| `(expertd_[a-z_]+)(?:\{[a-z, ]+\})?` \|", DOCUMENT.read_text(encoding="utf-8")))


def test_each_metric_has_a_row_in_the_document() -> None:
    ahead = AheadStatus(
        kind="prompt", reading=True, announced=1, useful=0.5, shuffled=0.1, useful_bytes=1, wasted_bytes=1
    )
    metrics = Metrics()
    metrics.model("a", ready=True, waiting=0, running=0)
    text = metrics.render(status(model(ahead=[ahead]), model("/other/Qwen3-30B-A3B-4bit", ahead=[ahead]))).decode()
    families = list(text_string_to_metric_families(text))
    names = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert names == documented()
    assert all(family.documentation.endswith(".") for family in families)
    models = {sample.labels["model"] for family in families if "cache_hits" in family.name for sample in family.samples}
    assert models == {"Qwen3-30B-A3B-4bit", "/other/Qwen3-30B-A3B-4bit"}, "two of one name are kept apart"


def test_names_and_units_are_those_that_prometheus_wants() -> None:
    for name in documented():
        assert re.fullmatch(r"expertd_[a-z_]+", name)
        assert not re.search(r"_(ms|mb|percent|milliseconds)(_|$)", name)


# -- logs --------------------------------------------------------------------------------------------------------------


def test_nothing_of_a_prompt_an_answer_or_a_key_is_written_anywhere(served: Served) -> None:
    chat = "POST /v1/chat/completions HTTP/1.1\nHost: localhost\nConnection: close\n"

    def post(body: bytes, path: str = "/v1/chat/completions", more: str = f"x-api-key: {ANNA}") -> str:
        head = chat.replace("/v1/chat/completions", path)
        return raw(served, f"{head}{more}\nContent-Length: {len(body)}", body)[0].split()[1]

    def asked(**fields: Any) -> bytes:
        text = [{"role": "user", "content": f"{SECRET} {SECRET}"}]
        return json.dumps({"model": served.model, "messages": text, "max_tokens": 3} | fields).encode()

    tool = {"type": "function", "function": {"name": SECRET, "parameters": {"type": SECRET}}}
    statuses = [
        post(asked()), post(asked(stream=True)), post(asked(), "/v1/messages"),
        post(json.dumps({"model": served.model, "input": SECRET, "max_output_tokens": 3}).encode(), "/v1/responses"),
        post(asked(model=SECRET)), post(asked(stop=SECRET * 999)), post(asked(tools=[tool])),
        post(asked(**{SECRET: 1})), post(b'{"model": "' + SECRET.encode()), post(SECRET.encode()),
        post(asked(), f"/v1/{SECRET}?key={SECRET}"), post(asked(), more=f"x-api-key: {SECRET}"),
        post(asked(), more=f"Authorization: Bearer {SECRET}"),
        post(asked(), more="Authorization: Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()),
        post(asked(), more=f"Authorization: {SECRET}\x01"), post(asked(), more=f"{SECRET} {SECRET}"),
        raw(served, f"{SECRET}")[0].split()[1], raw(served, f"GET /{SECRET} HTTP/{SECRET}")[0].split()[1],
    ]  # fmt: skip
    assert statuses.count("200") == 4
    assert all(status.startswith("4") for status in statuses if status != "200"), statuses
    written = {path: path.read_text() for path in [*served.home.log.iterdir(), served.home.root / "stderr"]}
    assert len(written) >= 4, "a daemon, a gateway, a worker, and what they say on stderr"
    assert "request finished" in "".join(written.values())
    for text in (SECRET, ANNA, BERT, base64.b64encode(f"me:{SECRET}".encode()).decode()):
        assert not [path for path, words in written.items() if text.lower() in words.lower()]


# -- the status page ---------------------------------------------------------------------------------------------------


def test_the_page_needs_no_script_and_loads_nothing(served: Served) -> None:
    line, headers, body = raw(served, f"GET / HTTP/1.1\nHost: localhost\nConnection: close\nx-api-key: {ANNA}")
    text = body.decode()
    assert (line, headers["content-type"]) == ("HTTP/1.1 200 OK", "text/html; charset=utf-8")
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert f"<h3>{served.model}</h3>" in text
    assert not re.findall(r'(?:src|href)="(?!/|data:)', text)
    assert " style=" not in text and not re.search(r" on[a-z]+=", text)


needs_browser = pytest.mark.skipif(
    browser() is None, reason="there is no Chromium (Debian: apt-get install chromium-headless-shell)"
)


def looking(served: Served, look: Callable[[Page], Any], width: int = 900) -> None:
    """Have ``look`` see the page in a browser, which must not complain, nor ask for anything but the gateway's."""

    async def in_browser() -> None:
        program = browser()
        assert program is not None
        async with page(program) as shown:
            await shown.call("Network.setExtraHTTPHeaders", headers=bearer())
            await shown.open(f"http://127.0.0.1:{served.port}/", width=width)
            await look(shown)
            assert not shown.complaints
            asked = {url for url in shown.requested if not url.startswith("data:")}
            assert all(url.startswith(f"http://127.0.0.1:{served.port}/") for url in asked), asked

    asyncio.run(in_browser())


@needs_browser
def test_a_browser_shows_what_happens_while_it_happens(served: Served) -> None:
    async def look(shown: Page) -> None:
        assert await shown.tell("document.querySelector('h3').textContent") == served.model
        await shown.tell("window.same = document.querySelector('h3')")
        before = await shown.tell("document.querySelectorAll('tbody tr').length")
        with openai.OpenAI(base_url=served.url, api_key=BERT) as client:
            await asyncio.to_thread(say, client, served, max_tokens=11)
        await shown.until("document.querySelector('tbody')?.textContent.includes('bert')")
        assert await shown.tell("document.querySelectorAll('tbody tr').length") >= min(before + 1, 12)
        assert await shown.tell("window.same.isConnected"), "what has not changed is left alone"
        await shown.until("document.querySelectorAll('.heat rect').length > 0")
        _, _, found = await asyncio.to_thread(served.request, "GET", "/status.json", None, bearer())
        layers = len(found["models"][0]["cache"]["layers"])
        assert await shown.tell("document.querySelectorAll('.heat rect').length") == 3 * layers
        assert await shown.tell("document.querySelector('.heat rect title').textContent.startsWith('layer 0: ')")

    looking(served, look)


@needs_browser
@pytest.mark.parametrize("width", [400, 900, 1600])
def test_the_page_fits_every_window(served: Served, width: int) -> None:
    async def look(shown: Page) -> None:
        assert await shown.tell("document.documentElement.scrollWidth") <= width
        assert await shown.tell("getComputedStyle(document.querySelector('.tiles, .note')).display") != "inline"

    looking(served, look, width)


# -- and last, because the daemon goes away ----------------------------------------------------------------------------


def test_a_scrape_and_the_page_do_not_need_the_daemon(served: Served) -> None:
    with Connection(served.home.daemon_socket, "test") as connection:
        connection.send(Stop())
    assert eventually(lambda: scraped(served)["expertd_daemon_up{}"] == 0)
    _, _, shown = served.request("GET", "/status.json", headers=bearer())
    assert shown["daemon"] is None
    assert shown["trouble"]
    assert shown["models"][0]["cache"] is None
    line, _, body = raw(served, f"GET / HTTP/1.1\nHost: localhost\nConnection: close\nx-api-key: {ANNA}")
    assert (line, b"The cache daemon is away." in body) == ("HTTP/1.1 200 OK", True)
