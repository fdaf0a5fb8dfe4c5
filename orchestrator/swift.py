"""The object store of one machine: OpenStack Swift, all in one, behind its S3 interface.

Swift lives in a virtual environment of its own in the user's cache, because it needs versions of packages
that nothing else here wants. Four processes of some 60 MB: account, container, object and proxy server; data
is on disk in a folder with user xattrs. Its creation of an object "if there is none" is not atomic under
races, so it holds data sets and MLflow's artifacts, never runs.
"""

import contextlib
import json
import os
import pwd
import secrets
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from orchestrator.processes import Progress, base_environment, exclusive, http_status, run, write_file

VERSION = "2.38.3"
REQUIREMENTS = """\
swift==2.38.3
setuptools==80.9.0
PasteDeploy==3.1.0
certifi==2026.10.18
cffi==2.1.1
charset-normalizer==3.5.2
cryptography==50.0.2
dnspython==2.9.2
eventlet==0.41.3
greenlet==3.5.6
idna==3.20
lxml==6.1.3
pycparser==3.12
pyeclib==1.8.0
requests==2.34.2
urllib3==2.8.0
xattr==1.3.0
"""
"""What was tested; pip refuses anything else (`--no-deps`)."""

STORAGE_SERVERS = ("account", "container", "object")
SERVERS = (*STORAGE_SERVERS, "proxy")
PORTS = (*STORAGE_SERVERS, "s3")
REGION = "us-east-1"
ACCOUNT = "vitscale"
PLUGIN = Path(__file__).with_name("swift_plugin.py")

# A single device must never be suspended for its errors, and on a machine that trains, half a second to
# connect (Swift's default) is sometimes too short: an update missed is an object missing from listings. By
# default Swift has the kernel forget what it read of objects over 5 MB: each epoch would read the disk.
COMMON_CONF = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {conf}
devices = {devices}
mount_check = false
fallocate_reserve = 0
log_level = WARNING
conn_timeout = 10
node_timeout = 60
container_update_timeout = 10
error_suppression_interval = 0
keep_cache_private = true
keep_cache_size = 1000000000000

[filter:local]
paste.filter_factory = vitscale_swift:local_factory

[pipeline:main]
pipeline = {pipeline}

[app:{server}-server]
use = egg:swift#{server}
"""
UPDATER_CONF = """
[object-updater]
recon_cache_path = {conf}
"""
PROXY_FILTERS = (
    "catch_errors local healthcheck cache listing_formats bulk s3api tempauth copy slo symlink "
    "versioned_writes"
)
PROXY_CONF = """
account_autocreate = true

[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = {region}

[filter:tempauth]
use = egg:swift#tempauth
user_{account}_{name} = {secret} .admin

[filter:cache]
paste.filter_factory = vitscale_swift:filter_factory
"""
PLAIN_FILTER = """
[filter:{name}]
use = egg:swift#{name}
"""
HASH_CONF = """\
[swift-hash]
swift_hash_path_prefix = {prefix}
swift_hash_path_suffix = {suffix}

[storage-policy:0]
name = data
default = yes
"""
AWS_CONFIG = """\
[default]
region = {region}
endpoint_url = {endpoint}
request_checksum_calculation = when_required
response_checksum_validation = when_required
s3 =
    addressing_style = path
    signature_version = s3v4
"""
AWS_CREDENTIALS = """\
[default]
aws_access_key_id = {account}:{name}
aws_secret_access_key = {secret}
"""


def obstacle(folder: Path) -> str | None:
    """Why Swift cannot keep its data below this folder on this machine; None if it can."""
    if sys.platform != "linux":
        return f"it runs on Linux, not on {sys.platform}"
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        return f"user {os.getuid()} has no name on this machine"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            # As long as Swift's metadata of an object may be on ext4, whose xattrs share one 4 KB block.
            os.setxattr(file.name, "user.swift.metadata", bytes(2048))
        except OSError as error:
            return f"the file system of {folder} has no user xattrs ({error.strerror})"
    return None


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitscale"


def install(cache: Path, progress: Progress) -> Path:
    """The Python of Swift's virtual environment, made on first use; a half-made one is made anew."""
    home = cache / f"swift-{VERSION}-py{sys.version_info.major}.{sys.version_info.minor}"
    python, complete = home / "bin/python", home / "complete"
    cache.mkdir(parents=True, exist_ok=True)
    lock = home.with_name(home.name + ".lock")
    with exclusive(lock, lambda: progress(f"another process installs Swift into {home}; waiting for it")):
        if complete.exists() and complete.read_text() == REQUIREMENTS and python.exists():
            return python
        progress(f"installing OpenStack Swift {VERSION} into {home} (once, 80 MB)")
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        requirements = home / "requirements.txt"
        requirements.write_text(REQUIREMENTS)
        environment = base_environment()
        environment.pop("PYTHONPATH", None)
        failure = (
            f"Swift {VERSION} could not be installed, which takes pip and a package index once "
            "(`vitscale up --object-store file` does without)"
        )
        run([sys.executable, "-m", "venv", str(home)], environment, failure)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["--no-deps", "--only-binary=:all:", "-r", str(requirements)]
        run(pip, environment, failure)
        # Written last: without it the environment is not complete.
        complete.write_text(REQUIREMENTS)
    return python


def prepare(folder: Path, python: Path, ports: Mapping[str, int]) -> None:
    """Everything below `folder` that the servers read. Keys and hash salt are made once, with the data."""
    conf, devices = folder / "conf", folder / "devices"
    conf.mkdir(exist_ok=True)
    (devices / "d1").mkdir(parents=True, exist_ok=True)
    name, secret, salt = _keys(folder)
    write_file(conf / "swift.conf", HASH_CONF.format(prefix=salt[:16], suffix=salt[16:]))
    shared = {"user": pwd.getpwuid(os.getuid()).pw_name, "conf": conf, "devices": devices}
    for server in STORAGE_SERVERS:
        pipeline = f"local healthcheck {server}-server"
        text = COMMON_CONF.format(server=server, port=ports[server], pipeline=pipeline, **shared)
        text += UPDATER_CONF.format(conf=conf) + PLAIN_FILTER.format(name="healthcheck")
        write_file(conf / f"{server}.conf", text)
    text = COMMON_CONF.format(
        server="proxy", port=ports["s3"], pipeline=f"{PROXY_FILTERS} proxy-server", **shared
    )
    text += PROXY_CONF.format(region=REGION, account=ACCOUNT, name=name, secret=secret)
    own = ("local", "s3api", "tempauth", "cache")
    text += "".join(PLAIN_FILTER.format(name=f) for f in PROXY_FILTERS.split() if f not in own)
    write_file(conf / "proxy.conf", text)
    write_file(conf / "vitscale_swift.py", PLUGIN.read_text())
    rings = [str(python), str(conf / "vitscale_swift.py"), str(conf)]
    rings += [str(ports[server]) for server in STORAGE_SERVERS]
    run(rings, base_environment(), "Swift's ring files cannot be made")


def write_credentials(folder: Path, endpoint: str) -> tuple[Path, Path]:
    """AWS's configuration file and credentials file for this store."""
    name, secret, _ = _keys(folder)
    config, credentials = folder / "aws-config", folder / "aws-credentials"
    write_file(config, AWS_CONFIG.format(region=REGION, endpoint=endpoint))
    write_file(credentials, AWS_CREDENTIALS.format(account=ACCOUNT, name=name, secret=secret))
    return config, credentials


def commands(folder: Path, python: Path) -> list[list[str]]:
    """One per server, the proxy last. The interpreter is named: a script's first line may hold 127 bytes."""
    scripts = python.parent
    return [
        [str(python), str(scripts / f"swift-{server}-server"), str(folder / "conf" / f"{server}.conf"), "-v"]
        for server in SERVERS
    ]


def environment(folder: Path) -> dict[str, str]:
    """On top of a process's own: where the proxy finds the cache."""
    return {"PYTHONPATH": str(folder / "conf"), "PYTHONWARNINGS": "ignore"}


def is_healthy(ports: Mapping[str, int]) -> bool:
    return all(http_status(ports[name], "/healthcheck") == 200 for name in PORTS)


def catch_up(folder: Path, python: Path) -> None:
    """Enter into listings what was written while the container server was down."""
    if any((folder / "devices/d1").glob("async_pending*/*/*")):
        updater = [str(python), str(python.parent / "swift-object-updater"), str(folder / "conf/object.conf")]
        run([*updater, "once"], base_environment(), "Swift's listings cannot be completed")


def _keys(folder: Path) -> tuple[str, str, str]:
    """User name and secret of the S3 key, and the salt of object placement, without which data is lost."""
    path = folder / "keys.json"
    with contextlib.suppress(FileNotFoundError):
        keys = json.loads(path.read_text())
        return keys["name"], keys["secret"], keys["salt"]
    keys = {
        "name": secrets.token_hex(8),
        "secret": secrets.token_urlsafe(32),
        "salt": secrets.token_hex(16),
    }
    write_file(path, json.dumps(keys))
    return keys["name"], keys["secret"], keys["salt"]
