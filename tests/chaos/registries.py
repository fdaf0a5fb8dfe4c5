"""R16: retention never deletes what is needed, and leaves nothing that nobody needs."""

from collections.abc import Iterator

from tests.chaos.row import Lab, Row
from tests.registries import run_sequences

SEQUENCES = 100
"""Of up to 25 operations, in each trial."""


def sequences(lab: Lab) -> Iterator[str]:
    while True:
        try:
            run_sequences(SEQUENCES)
        except Exception as error:  # noqa: BLE001 - whatever it is, and which sequence it was
            yield "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
        else:
            yield ""


ROWS = [
    Row(
        "R16",
        f"retention: nothing dangles, no orphan, in {SEQUENCES} sequences of all that is done, per trial",
        sequences,
        short=2,
    )
]
