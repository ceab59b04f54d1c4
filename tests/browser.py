"""A headless Chromium, steered over its DevTools protocol: what a person sees of a page, and what a page may not do.

``python -m tests.browser URL FILE.png WIDTH light|dark [KEY]`` takes a picture of a page.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
ON_MACS = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
DEADLINE_S = 30.0


def browser() -> str | None:
    """The program, if there is one; ``EXPERTD_TEST_BROWSER`` names another."""
    named = os.environ.get("EXPERTD_TEST_BROWSER")
    found = [named] if named else [shutil.which(name) for name in NAMES]
    return next((path for path in found if path), ON_MACS if Path(ON_MACS).exists() else None)


class Page:
    """One page.  ``complaints`` are what its console says, errors and what its policy has refused among them."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.complaints: list[str] = []
        self.requested: list[str] = []

    async def listen(self) -> None:
        """Take what the browser says; for ever."""
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            elif said["method"] in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.complaints.append(json.dumps(said["params"]))
            elif said["method"] == "Network.requestWillBeSent":
                self.requested.append(said["params"]["request"]["url"])

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command; its result."""
        self._number += 1
        future = self._answers[self._number] = asyncio.get_running_loop().create_future()
        await self._socket.send_str(json.dumps({"id": self._number, "method": method, "params": params}))
        async with asyncio.timeout(DEADLINE_S):
            said = await future
        assert "error" not in said, said
        result: dict[str, Any] = said["result"]
        return result

    async def open(self, url: str, width: int = 900, height: int = 900, scheme: str = "light") -> None:
        """Go there, in a window of that size, as somebody who likes it light or dark."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.call("Emulation.setEmulatedMedia", features=media)
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    async def tell(self, expression: str) -> Any:
        """The value of a piece of JavaScript."""
        said = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until it is true."""
        async with asyncio.timeout(DEADLINE_S):
            while not await self.tell(expression):
                await asyncio.sleep(0.05)

    async def picture(self) -> bytes:
        """The whole page as PNG."""
        said = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(said["data"])


@asynccontextmanager
async def page(program: str) -> AsyncIterator[Page]:
    """A page of a browser of its own, which has ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="xd-", ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
            "--disable-dev-shm-usage", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, process_group=0,
        )  # fmt: skip
        try:
            assert process.stderr is not None
            async with asyncio.timeout(DEADLINE_S):
                while not (found := re.search(rb"ws://([\d.:]+)/", line := await process.stderr.readline())):
                    assert line, "the browser ended without a word"
            drained = asyncio.create_task(process.stderr.read())
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://{found[1].decode()}/json/list") as answer:
                    (target,) = [one for one in await answer.json(content_type=None) if one["type"] == "page"]
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    shown = Page(socket)
                    listening = asyncio.create_task(shown.listen())
                    for domain in ("Page", "Runtime", "Log", "Network"):
                        await shown.call(f"{domain}.enable")
                    yield shown
                    listening.cancel()
            drained.cancel()
            await asyncio.wait([drained, listening])
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it is several
            await process.wait()


async def save(url: str, path: str, *, width: int, scheme: str, key: str) -> None:
    """A picture of ``url``, for a person to judge; ``key`` may be empty."""
    program = browser()
    assert program is not None, "there is no browser"
    async with page(program) as shown:
        if key:
            await shown.call("Network.setExtraHTTPHeaders", headers={"x-api-key": key})
        await shown.open(url, width=width, height=600, scheme=scheme)
        await asyncio.sleep(2.5)
        Path(path).write_bytes(await shown.picture())
        print("\n".join(shown.complaints), file=sys.stderr)


if __name__ == "__main__":
    _, address, file, columns, light_or_dark, *keys = sys.argv
    asyncio.run(save(address, file, width=int(columns), scheme=light_or_dark, key=keys[0] if keys else ""))
