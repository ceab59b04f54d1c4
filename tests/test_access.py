"""Who may use the gateway, by the names that a request calls it by and the site that sends it."""

from __future__ import annotations

import pytest
from aiohttp.test_utils import make_mocked_request

from expertd.clients.gateway.access import Access
from expertd.protocol.errors import RequestInvalid

HERE = "192.168.1.7:8080"


def is_let_in(access: Access, host: str, origin: str) -> bool:
    request = make_mocked_request("POST", "/v1/chat/completions", headers={"Host": host, "Origin": origin})
    try:
        access.check(request)
    except RequestInvalid as error:
        assert f"pages of '{origin}'" in error.message
        return False
    return True


@pytest.mark.parametrize("listened", ["0.0.0.0", "192.168.1.7"])
@pytest.mark.parametrize(
    ("host", "origin", "expected"),
    [
        (HERE, "http://192.168.1.7:8080", True),
        (HERE, "http://192.168.1.7:81", False),
        (HERE, "http://192.168.1.7", False),
        (HERE, "http://203.0.113.5:8080", False),
        (HERE, "https://203.0.113.5", False),
        (HERE, "http://evil.example:8080", False),
        (HERE, "http://192.168.1.7:none", False),
        (HERE, "null", False),
        ("localhost:none", "http://[", False),
        ("192.168.1.7", "http://192.168.1.7", True),
        ("192.168.1.7", "https://192.168.1.7:443", True),
        ("192.168.1.7", "https://192.168.1.7:80", False),
        ("127.0.0.1:8080", "http://localhost:3000", True),
        ("127.0.0.1:8080", "http://127.0.0.1:3000", True),
        ("127.0.0.1:8080", "http://127.0.0.1.evil.example:8080", False),
    ],
)
def test_pages_of_an_address_are_let_in_where_it_is_the_one_that_was_called(
    listened: str, host: str, origin: str, expected: bool
) -> None:
    assert is_let_in(Access(listened), host, origin) is expected


def test_addresses_of_six_words_are_compared_too() -> None:
    access = Access("::")
    assert is_let_in(access, "[fd00::7]:8080", "http://[fd00::7]:8080")
    assert not is_let_in(access, "[fd00::7]:8080", "http://[fd00::8]:8080")


def test_a_site_that_was_named_is_let_in() -> None:
    access = Access("127.0.0.1", names=["studio.example"], origins=["https://chat.example"])
    assert is_let_in(access, "localhost:8080", "https://chat.example")
    assert is_let_in(access, "studio.example", "https://studio.example")
    assert not is_let_in(access, "localhost:8080", "https://chat.example:444")
