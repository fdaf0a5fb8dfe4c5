"""Images to WebDataset shards with their index: `train/`, `val/` and perhaps `test/` below a destination.

vitscale ingest digits file:///data/digits
vitscale ingest photos/ s3://data/photos
"""

from pipelines.ingest.report import IngestReport
from pipelines.ingest.run import ingest

__all__ = ["IngestReport", "ingest"]
