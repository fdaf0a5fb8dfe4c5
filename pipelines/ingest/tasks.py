"""What may run in another process, or on another machine: these functions, by these names, and no others.

Their arguments are plain values, their work lies in the destination's store, and doing one twice, or two at
the same time, gives the same bytes.
"""

from collections.abc import Callable
from typing import Any

from pipelines.ingest.encode import Encoding
from pipelines.ingest.examine import examine_chunk
from pipelines.ingest.work import Work
from pipelines.ingest.write import write_shard


def examine(url: str, listing: str, number: int) -> int:
    return examine_chunk(Work(url, listing, {}), number)


def write(url: str, listing: str, options: dict[str, Any], name: str) -> int:
    encoding = Encoding(options["resize"], options["reencode"], options["quality"])
    return write_shard(Work(url, listing, options), name, encoding)


TASKS: dict[str, Callable[..., int]] = {"examine": examine, "write": write}
