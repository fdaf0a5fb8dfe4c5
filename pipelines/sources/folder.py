"""A folder per class, images anywhere inside; above them, if there are any, train/, val/ and test/."""

from collections.abc import Iterable

from pipelines.sources.files import IMAGES, File, is_hidden, is_image
from pipelines.sources.items import SPLITS, Collector, Source
from workers.errors import DataError


def folder_source(collector: Collector, files: Iterable[File], folders: Iterable[str]) -> Source:
    """`folders` are those directly below the source, empty ones too, where the store has such a thing."""
    where = collector.where
    tops = {name for name in folders if not is_hidden(name)}
    filled: set[str] = set()
    images: list[File] = []
    stray: list[str] = []
    for file in files:
        top, slash, _ = file.path.partition("/")
        if not is_image(file.name):
            collector.ignore(file.path)
        elif slash:
            images.append(file)
            filled.add(top)
        else:
            stray.append(file.path)
    tops |= filled
    if not tops:
        raise DataError(f"{where} has no sub-folders; expected one per class, with its images inside")
    splits = {top: SPLITS[top.lower()] for top in tops if top.lower() in SPLITS}
    if splits and len(splits) < len(tops):
        other = min(tops - splits.keys())
        raise DataError(
            f"{where} holds the split {min(splits)!r} and the folder {other!r}; expected splits only, or "
            f"classes only"
        )
    if stray:
        raise DataError(
            f"{where}: {stray[0]} lies in no class's folder ({len(stray)} such images); move it into one"
        )
    for empty in sorted(tops - filled):
        raise DataError(f"{where}/{empty} has no images ({', '.join(IMAGES)}); remove the folder or fill it")
    for file in images:
        parts = file.path.split("/")
        split = splits.get(parts[0], "")
        if split and len(parts) < 3:
            raise DataError(
                f"{where}: {file.path} lies in no class's folder; expected {parts[0]}/<class>/{parts[-1]}"
            )
        label = parts[1] if split else parts[0]
        collector.add(file.path, label, file.object, file.etag, 0, file.size, split=split)
    return collector.finish()
