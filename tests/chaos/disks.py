"""R17: a full disk ends a run with a clear error, and spoils nothing that is committed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.chaos.row import Lab, Row
from tests.runs import BATCH, CPU, head_manifest, outcome, tiny_config, train_on
from workers.config import make_config
from workers.errors import VitscaleError
from workers.storage import open_store
from workers.training import loop
from workers.training.checkpoint import load_full
from workers.training.commits import CommitLog

ROOT = Path(__file__).parents[2]
SPACE_LEFT = "no space left"
MOUNT = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && shift 2 && exec "$@"'
"""In a namespace of its own: needs no rights, and is gone with the process."""


def full_disks(lab: Lab) -> Iterator[str]:
    config = tiny_config(
        lab.data, f"train.checkpoint_every_images={2 * BATCH}", "train.probe_images=0", steps=10
    )
    undisturbed = lab.new_url("undisturbed")
    train_on(1, config, undisturbed)
    root = Path(undisturbed.removeprefix("file://"))
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    expected = json.loads(json.dumps(outcome(undisturbed)))
    while True:
        folder = lab.new_folder("disk")
        folder.mkdir()
        # From before the first commit to within the last.
        limit = f"{lab.random.uniform(0.05, 0.95) * size / 1024:.0f}k"
        command = ["unshare", "-rm", "sh", "-c", MOUNT, "sh", limit, str(folder)]
        command += [sys.executable, "-m", "tests.chaos.disks", str(folder), config.model_dump_json()]
        # Also where the environment keeps the current folder out of Python's path, as that of jobs does.
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        if done.returncode:
            yield f"{limit}: {done.stderr.strip()[-500:]}"
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        yield "" if found == expected else f"{limit}: another result: {str(found)[:300]}"


def main(folder: str, config_text: str) -> None:
    """On a disk that is too small, then on the same one with room."""
    config = make_config(json.loads(config_text))
    url = f"{Path(folder).as_uri()}/run"
    try:
        loop.train(config, url, CPU)
    except VitscaleError as error:
        assert SPACE_LEFT in str(error).lower(), error
    else:
        raise AssertionError("a full disk goes unnoticed")
    head = CommitLog(open_store(url)).head()
    if head is not None:
        # Verified as it is read.
        load_full(open_store(url), head_manifest(url))
    subprocess.run(["mount", "-o", "remount,size=256m", folder], check=True)
    loop.train(config, url, CPU)
    print(json.dumps(outcome(url)))


def available() -> bool:
    """Whether this machine lets a user mount a tmpfs in a namespace."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


ROWS = (
    [Row("R17", "a full disk ends a run with a clear error and spoils no commit", full_disks, short=2)]
    if available()
    else []
)


if __name__ == "__main__":
    main(*sys.argv[1:])
