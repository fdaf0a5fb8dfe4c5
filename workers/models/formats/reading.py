"""The tensors of a weights file, read without running any code that may be in it.

safetensors and NumPy's .npz are data. A pickle is a program: .pth and .bin files are refused, whatever they
are called, and so are object arrays in an .npz. What a file is, its first bytes say, never its name.
"""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.errors import CheckpointError

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
MAX_EXPANSION, SMALL_BYTES = 16, 64 << 20
"""An .npz may unpack to so many times its size, or to so little: weights hardly shrink when packed."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHOWN = 8


class WeightsFile(NamedTuple):
    tensors: dict[str, Tensor]
    """float32 and finite."""
    metadata: dict[str, str]
    """What a safetensors file says besides; empty for others."""
    is_npz: bool


def read_weights(path: Path) -> WeightsFile:
    """CheckpointError for what is no file of weights, truncated, pickled, of other types, or not finite."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    if start.startswith(ZIP):
        return WeightsFile(_checked(path, _read_npz(path)), {}, is_npz=True)
    # A safetensors file begins with the length of its header, whose first byte may be a pickle's.
    if start.startswith(PICKLE) and start[8:] != b"{":
        raise _pickled(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = safetensors.torch.load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: neither whole safetensors nor .npz ({error}); fetch it again, or convert it"
        ) from None
    return WeightsFile(_checked(path, tensors), metadata, is_npz=False)


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if any(member.filename.endswith("data.pkl") for member in members):
            raise _pickled(path)
        size = sum(member.file_size for member in members)
        if size > max(SMALL_BYTES, MAX_EXPANSION * path.stat().st_size):
            raise CheckpointError(f"{path}: unpacks to {size:,} bytes, which no weights do; not opened")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _to_tensor(path, name, arrays[name]) for name in arrays.files}
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise CheckpointError(f"{path}: has object arrays, which are pickled programs; refused") from None
        raise CheckpointError(f"{path}: not a whole .npz ({error}); fetch it again") from None
    except (zipfile.BadZipFile, EOFError, OSError, KeyError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: not a whole .npz ({error}); fetch it again") from None


def _to_tensor(path: Path, name: str, array: NDArray[np.generic]) -> Tensor:
    if not isinstance(array, np.ndarray):
        raise CheckpointError(f"{path}: {name} is no array; refused")
    if array.dtype == np.dtype("V2"):  # how NumPy keeps JAX's bfloat16
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype.kind == "f" and array.dtype.itemsize in (2, 4):
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    raise CheckpointError(f"{path}: {name} is {array.dtype}; weights are float32, float16 or bfloat16")


def _checked(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not tensors:
        raise CheckpointError(f"{path}: has no tensors")
    faults = []
    for name, value in tensors.items():
        what = f"{name} {tuple(value.shape)}"
        if value.dtype not in DTYPES:
            faults.append(
                f"{what} is {str(value.dtype).removeprefix('torch.')}, not a float of 16 or 32 bits"
            )
        elif not bool(torch.isfinite(value).all()):
            faults.append(f"{what} has values that are not finite")
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise CheckpointError(f"{path}: {'; '.join(sorted(faults)[:SHOWN])}{more}")
    return {name: value.float() for name, value in tensors.items()}


def _pickled(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a pickle (.pth, .bin, .pt), which may run code when it is opened; convert it where you "
        "trust it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'weights.safetensors')"
    )
