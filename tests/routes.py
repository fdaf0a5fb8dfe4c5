"""Every route of Ray's dashboard and of MLflow, as their own code registers them; what they answer to whom.

python -m tests.routes ray|ray-agent|mlflow     # as JSON, in a process that may import either
"""

import base64
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

Route = tuple[str, str]
"""Method and path; 1 stands for every part that varies."""
SECONDS = 30.0
WITH_BODY = ("POST", "PUT", "PATCH", "DELETE")


def routes_of(service: str, environment: Mapping[str, str] | None = None) -> list[Route]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.routes", service],
        env=os.environ | dict(environment or {}) | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return sorted({(method, path) for method, path in json.loads(done.stdout.splitlines()[-1])})


def answers(base: str, routes: Iterable[Route], headers: Mapping[str, str] | None = None) -> dict[Route, int]:
    """HTTP's code by route."""
    asked = list(routes)
    with ThreadPoolExecutor(8) as pool:
        codes = pool.map(lambda route: answer(base, *route, headers or {}), asked)
        return dict(zip(asked, codes, strict=True))


def answer(base: str, method: str, path: str, headers: Mapping[str, str]) -> int:
    body = b"{}" if method in WITH_BODY else None
    all_headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(base + path, method=method, headers=all_headers, data=body)
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as got:
            return int(got.status)
    except urllib.error.HTTPError as error:
        return error.code


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def _ray_routes() -> list[Route]:
    from ray.dashboard.optional_utils import DashboardHeadRouteTable
    from ray.dashboard.subprocesses.module import SubprocessModule
    from ray.dashboard.subprocesses.routes import SubprocessRouteTable
    from ray.dashboard.utils import DashboardHeadModule, get_all_modules

    for kind in (DashboardHeadModule, SubprocessModule):  # importing them registers their routes
        get_all_modules(kind)
    return _bound(DashboardHeadRouteTable) + _bound(SubprocessRouteTable)


def _ray_agent_routes() -> list[Route]:
    from ray.dashboard.optional_utils import DashboardAgentRouteTable
    from ray.dashboard.utils import DashboardAgentModule, get_all_modules

    get_all_modules(DashboardAgentModule)
    return _bound(DashboardAgentRouteTable)


def _bound(table: type) -> list[Route]:
    return [(method, _filled(path)) for method, paths in table._bind_map.items() for path in paths]


def _mlflow_routes() -> list[Route]:
    from mlflow.server import app
    from mlflow.server.auth import create_app
    from mlflow.server.fastapi_app import create_fastapi_app

    create_app()
    found = [
        (method, _filled(rule.rule))
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    ]
    for route in create_fastapi_app(app).routes:
        found += [(method, _filled(route.path)) for method in getattr(route, "methods", None) or ()]
    return found


def _filled(path: str) -> str:
    return re.sub(r"<[^>]*>|\{[^}]*\}", "1", path)


if __name__ == "__main__":
    listed = {"ray": _ray_routes, "ray-agent": _ray_agent_routes, "mlflow": _mlflow_routes}[sys.argv[1]]()
    sys.stdout.write(json.dumps(listed) + "\n")
