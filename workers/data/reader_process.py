"""One reader process, see `workers.data.readers`; ends when its standard input does."""

import contextlib
import dataclasses
import json
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np
import torch

from workers.data.batches import Arrays, Assembler
from workers.data.mixture import Source, restore
from workers.data.samples import StageTimes
from workers.data.shares import Share, ShareSettings
from workers.errors import VitscaleError


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed belongs into the log
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    code = 1
    try:
        with contextlib.suppress(BrokenPipeError):  # of a parent that is gone
            try:
                _serve(json.loads(sys.stdin.readline()), answers)
            except VitscaleError as error:
                _answer(answers, {"error": str(error)})
        code = 0
    except Exception:  # noqa: BLE001 - for the log; the exit code tells the parent
        traceback.print_exc()
    finally:
        os._exit(code)  # threads may wait for the store; nobody waits for them


def _serve(task: dict[str, Any], answers: TextIO) -> None:
    sources = [restore(values) for values in task["sources"]]
    rank_slots, slots = ([range(*own) for own in task[name]] for name in ("rank_slots", "slots"))
    buffers = _buffers(task["memory"])
    settings = ShareSettings.from_json(task["settings"])
    times = StageTimes()
    assembler = Assembler(settings.decode_threads, times)
    share = Share(sources, slots, settings, times)
    for line in sys.stdin:
        request = json.loads(line)
        step = request["step"]
        rows = share.rows(step)
        bad = assembler.fill(buffers[request["buffer"]], rows, places(sources, step, rank_slots, slots))
        told = [(number, dataclasses.asdict(one)) for number, one in bad]
        _answer(answers, {"times": times.take().seconds(), "bad": told})


def places(
    sources: Sequence[Source], step: int, rank_slots: Sequence[range], slots: Sequence[range]
) -> list[int]:
    """Rows of the rank's batch that the reader's samples belong to."""
    found: list[int] = []
    first = 0
    for source, of_rank, own in zip(sources, rank_slots, slots, strict=True):
        positions = source.owned(step, of_rank)
        found += (first + np.searchsorted(positions, source.owned(step, own))).tolist()
        first += len(positions)
    return found


def _buffers(memory: dict[str, Any]) -> list[Arrays]:
    width = memory["width"]
    mapped = memoryview(mmap.mmap(memory["file"], width * memory["buffers"]))
    os.close(memory["file"])
    return [
        Arrays(memory["size"], tuple(memory["shape"]), mapped[at * width :][:width])
        for at in range(memory["buffers"])
    ]


def _answer(answers: TextIO, values: dict[str, Any]) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
