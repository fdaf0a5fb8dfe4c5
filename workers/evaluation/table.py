"""Predictions as a Parquet file: a row per image, and whose they are in the file's metadata."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from workers.errors import CheckpointError
from workers.evaluation.predictions import Predictions

COLUMNS = {
    "ordinal": ("ordinals", pa.int64()),
    "label": ("labels", pa.int32()),
    "prediction": ("classes", pa.int32()),
    "confidence": ("confidences", pa.float32()),
    "in_top5": ("in_top5", pa.bool_()),
    "loss": ("losses", pa.float32()),
}
"""Of the file, with the names and types of what they hold."""
MAX_BYTES = 1 << 30
"""Of a file, and of what it unpacks to: 40 million images. More is nobody's validation set."""


def to_parquet(predictions: Predictions, *, digest: str, fingerprint: str) -> bytes:
    """`digest`: sha256 of the checkpoint's manifest; `fingerprint`: of the data."""
    table = pa.table(
        {name: pa.array(getattr(predictions, field), type=kind) for name, (field, kind) in COLUMNS.items()},
        metadata={"vitscale.digest": digest, "vitscale.fingerprint": fingerprint},
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(data: bytes, *, where: str, digest: str, fingerprint: str) -> Predictions:
    """CheckpointError naming `where` unless these are predictions of this checkpoint for this data."""
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        meta = file.metadata
        unpacked = sum(meta.row_group(n).total_byte_size for n in range(meta.num_row_groups))
        if max(unpacked, 25 * meta.num_rows) > MAX_BYTES:
            raise CheckpointError(f"{where}: {meta.num_rows:,} rows are more than any validation set has")
        table = file.read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise CheckpointError(f"{where} is no Parquet file of predictions: {error}") from error
    if {field.name: field.type for field in table.schema} != {n: kind for n, (_, kind) in COLUMNS.items()}:
        raise CheckpointError(f"{where}: its columns are not those of predictions")
    found = table.schema.metadata or {}
    for name, expected in (("digest", digest), ("fingerprint", fingerprint)):
        if found.get(f"vitscale.{name}".encode(), b"").decode(errors="replace") != expected:
            what = "another checkpoint" if name == "digest" else "another data set"
            raise CheckpointError(f"{where}: these are predictions of {what}; evaluate again with --fresh")
    if any(column.null_count for column in table.columns):
        raise CheckpointError(f"{where}: has gaps where predictions were")
    columns = {field: table[name].to_numpy() for name, (field, _) in COLUMNS.items()}
    predictions = Predictions(**columns)
    if (np.diff(predictions.ordinals) <= 0).any() or (predictions.labels < 0).any():
        raise CheckpointError(f"{where}: its rows are not the images of a data set in order")
    return predictions
