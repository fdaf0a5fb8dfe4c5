"""What can be ingested: folders, tables, Parquet, CIFAR, IDX, tars and scikit-learn's digits."""

from pipelines.sources.items import Item, Source
from pipelines.sources.recognise import FORMATS, SourceOptions, is_built_in, open_source

__all__ = ["FORMATS", "Item", "Source", "SourceOptions", "is_built_in", "open_source"]
