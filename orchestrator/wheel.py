"""The wheel of vitscale that a job brings with it, so that nodes need only have what vitscale needs.

Ray would install a wheel with all that it depends on, and would take one that it knows by name for another of
the same name. So its content goes as a job's working folder, which Ray keeps by the content's hash and puts
first on the path of the driver and of all workers. A copy is in the store of runs, for whoever has to start
the job again.
"""

import base64
import contextlib
import csv
import hashlib
import io
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import workers
from orchestrator.site import Site
from workers.code_digests import WHEEL_VARIABLE
from workers.errors import ConfigError
from workers.part import Part
from workers.storage import NotFound, Store, create_again

ENTRY = "orchestrator/driver.py"


class Wheel(Part):
    """Part of a job's specification."""

    name: str
    """Of the file."""
    sha256: str
    record: str
    """sha256 of its RECORD, which names all files with theirs: what is unpacked can be told by it."""


def site_wheel(site: Site) -> Wheel | None:
    """None if jobs run what is installed on the nodes; ConfigError names what is wrong with the file."""
    if site.wheel is None:
        return None
    data = _read(site.wheel)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
            about = archive.read(record.replace("RECORD", "METADATA")).decode()
            digest = hashlib.sha256(archive.read(record)).hexdigest()
    except (zipfile.BadZipFile, ValueError, KeyError):
        raise _wrong(site.wheel, "is no wheel; `pip wheel --no-deps .` makes one") from None
    facts = dict(line.partition(": ")[::2] for line in about.splitlines() if ": " in line)
    if facts.get("Name") != workers.DISTRIBUTION or ENTRY not in names:
        raise _wrong(site.wheel, f"is a wheel of {facts.get('Name')}, not of {workers.DISTRIBUTION}")
    if public_version(facts.get("Version", "")) != public_version(workers.__version__):
        raise _wrong(
            site.wheel,
            f"is version {facts.get('Version')}, this command {workers.__version__}: what one writes the "
            "other reads, so build it from what is installed here, or install it here, too",
        )
    return Wheel(name=site.wheel.name, sha256=hashlib.sha256(data).hexdigest(), record=digest)


def keep_wheel(store: Store, site: Site, wheel: Wheel | None) -> None:
    """Put the site's wheel into the store of runs, if it is not there."""
    if wheel is None or site.wheel is None:
        return
    with contextlib.suppress(NotFound):
        store.head(_key(wheel))
        return
    data = _read(site.wheel)
    if hashlib.sha256(data).hexdigest() != wheel.sha256:
        raise _wrong(site.wheel, "changed while this command read it; give it again")
    create_again(store, _key(wheel), data)


def _load(store: Store, wheel: Wheel) -> bytes:
    """ConfigError if it is not there as it was."""
    try:
        data = store.read(_key(wheel))
    except NotFound:
        data = b""
    if hashlib.sha256(data).hexdigest() != wheel.sha256:
        raise ConfigError(
            f"wheel {wheel.name} ({wheel.sha256[:12]}) is not in the store of runs as it was put there; "
            "submit the run again, with the wheel in the site file"
        )
    return data


@contextlib.contextmanager
def shipped(store: Store, wheel: Wheel | None) -> Iterator[dict[str, Any]]:
    """What a job's runtime environment has for the wheel that is kept in the store; Ray's client takes it to
    the cluster meanwhile."""
    if wheel is None:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="vitscale-wheel-") as folder:
        package = Path(folder, f"{wheel.sha256}.zip")  # Ray looks at the end of the name
        package.write_bytes(_load(store, wheel))
        yield {"working_dir": str(package), "env_vars": {WHEEL_VARIABLE: wheel.sha256}}


def check_running(wheel: Wheel | None) -> None:
    """ConfigError if this process's code is not that of the wheel that its job brought."""
    if wheel is None:
        return
    root = Path(workers.__file__).parents[1]
    try:
        (record,) = root.glob(f"{workers.DISTRIBUTION}-*.dist-info/RECORD")
        listing = record.read_bytes()
    except (ValueError, OSError):
        listing = b""
    if hashlib.sha256(listing).hexdigest() != wheel.record:
        raise ConfigError(
            f"the job brought {wheel.name} ({wheel.sha256[:12]}), but the driver runs vitscale "
            f"{workers.__version__} from {root}: something on the nodes comes before it on Python's path "
            "(a .pth file, or PYTHONPATH in the image's start script)"
        )
    for name, kind, _ in csv.reader(io.StringIO(listing.decode())):
        if kind and not _is_as_recorded(root / name, kind):
            raise ConfigError(
                f"{root / name} is not as in {wheel.name}, which the job brought: Ray's copy on this node is "
                "damaged; restart Ray there"
            )


def _is_as_recorded(path: Path, kind: str) -> bool:
    algorithm, _, expected = kind.partition("=")
    try:
        digest = hashlib.new(algorithm, path.read_bytes()).digest()
    except OSError:
        return False
    return base64.urlsafe_b64encode(digest).decode().rstrip("=") == expected


def public_version(version: str) -> str:
    """Without the part that tells builds apart."""
    return version.partition("+")[0]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _wrong(file, f"cannot be read: {error}") from None


def _wrong(file: Path, what: str) -> ConfigError:
    return ConfigError(f"site field `wheel`: {file} {what}")


def _key(wheel: Wheel) -> str:
    return f"jobs/wheels/{wheel.sha256}.whl"
