"""`vitscale doctor`: is this cluster, store and tracking server safe, and able to run us?"""

import json
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from ray.job_submission import JobStatus

from orchestrator.exposure import DENIED, ask_as_stranger, is_private, status
from orchestrator.findings import Finding, judge
from orchestrator.node_facts import MARK, PACKAGES, version
from orchestrator.ray_jobs import ENDED, POLL_SECONDS, RayJobs
from orchestrator.site import Site
from orchestrator.tracking import connect, mlflow_errors
from orchestrator.webhook import read_address
from orchestrator.wheel import keep_wheel, shipped, site_wheel
from workers.errors import ConfigError, DataError, VitscaleError
from workers.storage import open_store, probe

NODES_SECONDS = 300.0


def examine(site: Site, mib: int) -> Iterable[Finding]:
    """One after another, as they are found. `mib`: moved to and from the store by each node."""
    ray = list(_ray(site))
    yield from ray
    yield from _tracking(site)
    yield from _store(site)
    if site.webhook_file is not None:
        yield _webhook(site.webhook_file)
    if any(finding.state == "problem" and finding.check == "Ray" for finding in ray):
        yield Finding("nodes", site.ray, "warning", "not looked at", "mend the way to Ray first")
        return
    try:
        facts = _ask_nodes(site, mib)
    except VitscaleError as error:
        yield Finding("nodes", site.ray, "problem", str(error))
        return
    yield from judge(facts, {name: version(name) for name in PACKAGES}, site.data, site.runs)


def _ray(site: Site) -> Iterable[Finding]:
    answers = ask_as_stranger(site.ray)
    if None in answers.values():
        yield Finding(
            "Ray", site.ray, "problem", "nobody answers", "is it up, and its dashboard's port open?"
        )
        return
    let_in = [who for who, code in answers.items() if code == 200]
    if let_in:
        found = f"answers {' and '.join(let_in)}"
        advice = "start Ray with RAY_AUTH_MODE=token: whoever reaches it can run code on every node"
        yield Finding("Ray's token", site.ray, "problem", found, advice)
    else:
        refused = all(code in DENIED for code in answers.values())
        found = ", ".join(f"{who} {code}" for who, code in answers.items())
        yield Finding("Ray's token", site.ray, "ok" if refused else "warning", found)
    yield _tls("Ray", site.ray)
    try:
        jobs = RayJobs(site).all()
    except DataError as error:
        yield Finding("Ray", site.ray, "problem", str(error))
        return
    running = sum(details.status not in ENDED for details in jobs.values())
    yield Finding("Ray", site.ray, "ok", f"takes jobs from us; {running} running")


def _tracking(site: Site) -> Iterable[Finding]:
    if not site.mlflow.startswith("http"):
        yield Finding("MLflow", site.mlflow, "ok", "a local file: no server to protect")
        return
    bare = status(f"{site.mlflow}/api/2.0/mlflow/experiments/search?max_results=1")
    if bare is None:
        advice = "is it up? Training goes on without it and tells it later"
        yield Finding("MLflow", site.mlflow, "problem", "nobody answers", advice)
        return
    if bare == 200:
        alone = urlsplit(site.mlflow).scheme == "http" and is_private(site.mlflow)
        advice = "" if alone else "start it with --app-name basic-auth, or behind a proxy that asks who comes"
        found = "asks for no password" + (", on this machine alone" if alone else "")
        yield Finding("MLflow's password", site.mlflow, "ok" if alone else "problem", found, advice)
    else:
        refused = bare in DENIED
        yield Finding(
            "MLflow's password", site.mlflow, "ok" if refused else "warning", f"without one: {bare}"
        )
    yield _tls("MLflow", site.mlflow)
    try:
        with mlflow_errors(f"MLflow at {site.mlflow}"):
            connect(site.mlflow).search_experiments(max_results=1)
    except VitscaleError as error:
        advice = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or write ~/.mlflow/credentials"
        yield Finding("MLflow", site.mlflow, "problem", str(error), advice)
        return
    yield Finding("MLflow", site.mlflow, "ok", "answers us")


def _store(site: Site) -> Iterable[Finding]:
    if site.s3_endpoint is not None:
        yield _tls("store", site.s3_endpoint)
    for name, url in (("data", site.data), ("runs", site.runs)):
        if (bare := _anonymous(site, url)) is not None:
            found = f"without credentials {bare}"
            if bare == 200:
                advice = "take public access from that bucket"
                yield Finding(f"store, {name}", url, "problem", found, advice)
            else:
                yield Finding(f"store, {name}", url, "ok", found)
    try:
        next(iter(open_store(site.data).list("")), None)
        yield Finding("store, data", site.data, "ok", "we may list it")
    except VitscaleError as error:
        yield Finding("store, data", site.data, "problem", str(error))
    try:
        problem = probe(open_store(site.runs))
    except VitscaleError as error:
        yield Finding("store, runs", site.runs, "problem", str(error))
        return
    if problem:
        advice = "use AWS S3, Ceph or file:// for runs; data may stay where it is"
        yield Finding("store, runs", site.runs, "problem", problem, advice)
    else:
        yield Finding("store, runs", site.runs, "ok", "creates once, reads ranges, gives back what it got")


def _webhook(file: Path) -> Finding:
    """Nothing is sent to it."""
    try:
        host = urlsplit(read_address(file)).hostname or ""
    except ConfigError as error:
        return Finding("webhook", str(file), "problem", str(error), "ask the chat for the address again")
    return Finding("webhook", host, "ok", "its file holds one address; nothing was sent there")


def _anonymous(site: Site, url: str) -> int | None:
    """HTTP status of a list request by nobody; None where there is no HTTP."""
    parts = urlsplit(url)
    if parts.scheme != "s3":
        return None
    endpoint = (
        f"{site.s3_endpoint}/{parts.netloc}"
        if site.s3_endpoint
        else f"https://{parts.netloc}.s3.amazonaws.com"
    )
    return status(f"{endpoint}?list-type=2&max-keys=1")


def _tls(what: str, url: str) -> Finding:
    parts = urlsplit(url)
    if parts.scheme == "https":
        return Finding("TLS", f"{what} {url}", "ok", "https")
    if is_private(url):
        return Finding("TLS", f"{what} {url}", "ok", "none, but it does not leave this machine")
    advice = "use https, or a tunnel to 127.0.0.1: what is sent can be read on its way, passwords too"
    return Finding("TLS", f"{what} {url}", "problem", "none, beyond this machine", advice)


def _ask_nodes(site: Site, mib: int) -> list[dict[str, object]]:
    """DataError with the log's end if the job fails."""
    jobs = RayJobs(site)
    job = f"doctor-{secrets.token_hex(4)}"
    store, wheel = open_store(site.runs), site_wheel(site)
    keep_wheel(store, site, wheel)
    with shipped(store, wheel) as code:
        jobs.submit("orchestrator.node_facts", [site.data, site.runs, str(mib)], job, {}, code)
    deadline = time.monotonic() + NODES_SECONDS
    while (details := jobs.details(job)).status not in ENDED:
        if time.monotonic() > deadline:
            jobs.stop(job)
            raise DataError(f"job {job} had not asked all nodes after {NODES_SECONDS:.0f} s; it was stopped")
        time.sleep(POLL_SECONDS)
    lines = [line for line in jobs.log(job).splitlines() if line.startswith(MARK)]
    if details.status != JobStatus.SUCCEEDED or not lines:
        raise DataError(
            f"job {job} ended as {details.status.value}. Its log ends:\n{jobs.log_tail(job, details)}"
        )
    facts: list[dict[str, object]] = json.loads(lines[-1].removeprefix(MARK))
    return facts
