"""The journey as one self-contained HTML page: `render(journey)`, where a Journey is plain data."""

from pipelines.report.journey import (
    Curve,
    Dataset,
    Journey,
    Link,
    Probe,
    Provenance,
    Rung,
    Score,
    Stage,
    Study,
)
from pipelines.report.page import render

__all__ = [
    "Curve",
    "Dataset",
    "Journey",
    "Link",
    "Probe",
    "Provenance",
    "Rung",
    "Score",
    "Stage",
    "Study",
    "render",
]
