"""The group of ranks, and small things that they tell each other."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore


@contextlib.contextmanager
def worker_group(device: torch.device) -> Iterator[None]:
    """The group that this process is in, or torchrun's, or one of its own; what began here ends here."""
    if dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    yield
    # Not after an error: NCCL would wait for ranks that may be gone, and the process is about to end.
    dist.destroy_process_group()


def broadcast_integers(values: list[int], device: torch.device) -> list[int]:
    """Rank 0's integers, on every rank."""
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.broadcast(tensor, src=0)
    return [int(value) for value in tensor.tolist()]


def sum_integers(values: list[int], device: torch.device) -> list[int]:
    """Over all ranks, on every rank; each below 2**63 / ranks."""
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(tensor)
    return [int(value) for value in tensor.tolist()]


def all_texts(mine: str, device: torch.device) -> list[str]:
    """Every rank's text, by rank, on every rank."""
    data = mine.encode()
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    width = max(1, *(int(other) for other in lengths))
    row = torch.frombuffer(bytearray(data.ljust(width, b"\0")), dtype=torch.uint8).to(device)
    rows = [torch.empty_like(row) for _ in lengths]
    dist.all_gather(rows, row)
    return [
        other[: int(size)].cpu().numpy().tobytes().decode() for other, size in zip(rows, lengths, strict=True)
    ]


def first_text(mine: str, device: torch.device) -> str:
    """The text, cut to 1,000 bytes, of the first rank that has one; on every rank. "" if none has."""
    data = mine.encode()[:1000].ljust(1000, b"\0")
    row = torch.tensor(list(data), dtype=torch.uint8, device=device)
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    texts = (bytes(other.tolist()).rstrip(b"\0").decode(errors="ignore") for other in rows)
    return next(filter(None, texts), "")
