"""What the ranks have to tell each other of the data: proofs of epochs, ledgers of bad samples."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workers.data.mixture import Source
from workers.data.proof import carried
from workers.data.quarantine import Ledger, from_json, to_json
from workers.training.collectives import all_texts, sum_integers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpochProof:
    """All ranks together delivered every sample of a source exactly once."""

    source: int
    """0 is `data.url`."""
    epoch: int
    num_samples: int
    proof: str
    """Hexadecimal sum over the hashes of all ids; the index has the same."""


def settle_epochs(sources: Sequence[Source], step: int, device: torch.device) -> list[EpochProof]:
    """Proofs of the epochs that ended with global batch `step`; DataError if one was not exact.

    Every rank calls it after every batch; they speak to each other only if an epoch ended.
    """
    proofs = []
    for number, source in enumerate(sources):
        size = source.data.num_samples
        for epoch in range(step * source.count // size, (step + 1) * source.count // size):
            total = sum_integers(source.tally.part(epoch), device)
            proofs.append(EpochProof(number, epoch, size, source.tally.settle(epoch, total)))
    return proofs


def save_tallies(sources: Sequence[Source], next_step: int, device: torch.device) -> list[list[int]]:
    """What all ranks delivered of each source's epoch that is not over before global batch `next_step`."""
    parts = [source.tally.part(_open_epoch(source, next_step)) for source in sources]
    return [carried(sum_integers(part, device)) for part in parts]


def load_tallies(
    sources: Sequence[Source], next_step: int, saved: Sequence[Sequence[int]], rank: int
) -> None:
    """The first rank takes over what all had delivered before the checkpoint."""
    for source, part in zip(sources, saved, strict=True):
        source.tally.put(_open_epoch(source, next_step), part if rank == 0 else [0, 0, 0])


def merge_ledgers(ledgers: Sequence[Ledger], device: torch.device) -> None:
    """Every rank learns of the bad samples that any has met; DataError if they are too many together.

    Only what came since the last time travels.
    """
    mine = json.dumps([to_json(ledger.take_new()) for ledger in ledgers])
    for text in all_texts(mine, device):
        for ledger, entries in zip(ledgers, json.loads(text), strict=True):
            ledger.add(from_json(entries))
    for ledger in ledgers:
        ledger.take_new()  # what the others have told


def _open_epoch(source: Source, next_step: int) -> int:
    return next_step * source.count // source.data.num_samples
