"""R16: retention never deletes what is needed, and leaves nothing that nobody needs."""

import contextlib
import itertools
from collections.abc import Iterator

from tests.chaos.row import Lab, Row
from tests.chaos.s3 import as_client, real_store
from tests.registries import SiteMachine, run_sequences
from workers.storage import ensure_bucket

SEQUENCES, SEQUENCES_ON_S3 = 100, 5
"""Of up to 25 operations, in each trial; every tenth trial of a soak is on S3."""


class OnS3(SiteMachine):
    bucket = "s3://chaos-registries"


def sequences(lab: Lab) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        if not lab.short:
            stack.enter_context(as_client(stack.enter_context(real_store())))
            ensure_bucket(OnS3.bucket)
        for number in itertools.count(1):
            if lab.short or number % 10:
                yield found_by(SEQUENCES, SiteMachine)
            else:
                yield found_by(SEQUENCES_ON_S3, OnS3)


def found_by(count: int, machine: type[SiteMachine]) -> str:
    try:
        run_sequences(count, machine=machine)
    except Exception as error:  # noqa: BLE001 - whatever it is, and which sequence it was
        return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
    return ""


ROWS = [
    Row(
        "R16",
        f"retention: nothing dangles, no orphan, in {SEQUENCES} sequences of all that is done, per trial",
        sequences,
        short=1,
    )
]
