"""Who else could use these services: does Ray ask for a token, does what leaves this machine travel in TLS.

Whoever reaches the Jobs API of a Ray without a token runs code on all its nodes (CVE-2023-48022).
"""

import http.client
import ipaddress
import urllib.error
import urllib.request
from collections.abc import Mapping
from types import MappingProxyType
from urllib.parse import urlsplit

from orchestrator.site import Site
from workers.errors import ConfigError

SECONDS = 10.0
DENIED = (401, 403)
"""HTTP codes for who has no credential, or a wrong one."""
WRONG_TOKEN = {"Authorization": "Bearer " + 64 * "0"}
JOBS = "/api/jobs/"
UNLESS = "or, where nobody else reaches it, put `insecure: true` into the site file"


def refuse_exposed(site: Site) -> None:
    """ConfigError before anything goes to a Ray that everybody could use, unless the site allows it."""
    if site.insecure:
        return
    if not is_private(site.ray):
        raise ConfigError(
            f"ray {site.ray}: what is sent to it, the token too, could be read on its way; use https, a "
            f"tunnel to 127.0.0.1, {UNLESS}"
        )
    for who, code in ask_as_stranger(site.ray).items():
        if code == 200:
            raise ConfigError(
                f"ray {site.ray} answers {who}: whoever reaches it can run code on every node. Start it with "
                f"RAY_AUTH_MODE=token, {UNLESS}"
            )


def ask_as_stranger(ray: str) -> dict[str, int | None]:
    """What the Jobs API answers to who does not have its token; None if nobody answers."""
    return {
        "without a token": status(ray + JOBS),
        "with a wrong token": status(ray + JOBS, WRONG_TOKEN),
    }


def is_private(url: str) -> bool:
    """Nothing readable leaves this machine: TLS, the loopback, or no network at all."""
    parts = urlsplit(url)
    return parts.scheme != "http" or _is_loopback(parts.hostname or "")


def status(url: str, headers: Mapping[str, str] = MappingProxyType({})) -> int | None:
    """Of a GET, without what this process knows of credentials; None if nobody answers."""
    request = urllib.request.Request(url, headers=dict(headers))  # noqa: S310 - the site's http(s) addresses
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310 - as above
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
