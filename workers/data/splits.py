"""A data set by its address: a root with `train/` and `val/`, or one split."""

from workers.data.index import DatasetIndex
from workers.storage import NotFound, join_url, open_store


def open_splits(url: str) -> tuple[DatasetIndex | None, DatasetIndex]:
    """The indexes of training images, None of a lone split, and of validation images."""
    if not url.endswith(".tar") and "{" not in url:
        try:
            open_store(url).head("val/_vitscale/index.json")
        except NotFound:
            pass
        else:
            return DatasetIndex.open(join_url(url, "train")), DatasetIndex.open(join_url(url, "val"))
    return None, DatasetIndex.open(url)
