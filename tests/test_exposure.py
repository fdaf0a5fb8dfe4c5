"""Nothing is submitted to a Ray that everybody could use."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from orchestrator.exposure import WRONG_TOKEN, is_private, refuse_exposed, status
from orchestrator.site import Site
from tests.tls_proxy import tls_proxy
from workers.errors import ConfigError


@pytest.fixture
def head() -> Iterator[ThreadingHTTPServer]:
    """A Jobs API that answers as its `rule` says, which takes the Authorization header."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(server.rule(self.headers.get("Authorization")))
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def at(ray: str, **fields: bool) -> Site:
    return Site(ray=ray, mlflow="sqlite:///x.db", data="file:///data", runs="file:///runs", **fields)


RULES = {
    "without a token": lambda token: 200,
    "with a wrong token": lambda token: 200 if token else 401,
}


@pytest.mark.parametrize("who", RULES)
def test_a_ray_that_everybody_can_use_is_refused_unless_the_site_allows_it(head, who):
    head.rule = RULES[who]
    ray = f"http://127.0.0.1:{head.server_port}"
    with pytest.raises(ConfigError, match=f"answers {who}: .* RAY_AUTH_MODE=token.*insecure: true"):
        refuse_exposed(at(ray))
    refuse_exposed(at(ray, insecure=True))


def test_a_ray_that_asks_for_its_token_is_not(head):
    head.rule = lambda token: 403 if token else 401
    refuse_exposed(at(f"http://127.0.0.1:{head.server_port}"))


def test_one_that_is_away_is_left_to_those_who_talk_to_it():
    refuse_exposed(at("http://127.0.0.1:1"))


def test_beyond_this_machine_there_must_be_tls():
    with pytest.raises(ConfigError, match="could be read on its way; use https"):
        refuse_exposed(at("http://head.example:8265"))
    refuse_exposed(at("http://head.example:8265", insecure=True))


@pytest.mark.parametrize(
    ("url", "private"),
    [
        ("http://127.0.0.1:8265", True),
        ("http://127.9.9.9:8265", True),
        ("http://[::1]:8265", True),
        ("http://localhost:8265", True),
        ("https://head.example", True),
        ("file:///runs", True),
        ("http://10.0.0.1:8265", False),
        ("http://localhost.example", False),
        ("http://127.0.0.1.example", False),
        ("http://0.0.0.0:8265", False),
    ],
)
def test_what_leaves_this_machine_readable(url, private):
    assert is_private(url) == private


def test_a_certificate_counts_if_the_site_names_who_vouches_for_it(head, tmp_path, monkeypatch):
    head.rule = lambda token: 401
    with tls_proxy(head.server_port, tmp_path) as (url, authority):
        assert status(url, WRONG_TOKEN) is None
        site = Site.model_validate(dict(at(url)) | {"ca_file": authority}, strict=False)
        for name, value in site.environment().items():
            monkeypatch.setenv(name, value)
        assert status(url, WRONG_TOKEN) == 401
        refuse_exposed(site)
