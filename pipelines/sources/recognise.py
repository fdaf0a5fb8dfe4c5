"""What kind of source is it? By its content, not by what a person calls it; `format` forces one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.sources.cifar import cifar_source, is_cifar
from pipelines.sources.digits import digits_source
from pipelines.sources.files import (
    File,
    check_exists,
    find,
    gunzip,
    is_image,
    is_remote,
    list_files,
    read_range,
)
from pipelines.sources.folder import folder_source
from pipelines.sources.idx import NAME as IDX_NAME
from pipelines.sources.idx import idx_source
from pipelines.sources.items import SPLITS, Collector, Source
from pipelines.sources.parquet import parquet_source
from pipelines.sources.table import is_table, table_source
from pipelines.sources.tars import members, tar_kind, tar_source
from workers.errors import ConfigError, DataError

FORMATS = ("folder", "table", "parquet", "cifar", "idx", "wds", "tar", "digits")
TARS = (".tar", ".tar.gz", ".tgz")
IDX_MAGIC = (b"\0\0\x08\x03", b"\0\0\x08\x01")
FIRST_MEMBERS = 8


@dataclass(frozen=True)
class SourceOptions:
    format: str | None = None
    """One of FORMATS; None recognises it."""
    image_column: str | None = None
    label_column: str | None = None
    """Of a table or Parquet; the field of .json labels; `fine` or `coarse` of CIFAR-100."""
    class_map: Mapping[str, int] | None = None
    follow_links: bool = False


def open_source(source: str | Path, options: SourceOptions | None = None) -> Source:
    """Lists the images; ConfigError or DataError if it holds none with labels."""
    options = options or SourceOptions()
    if options.format is not None and options.format not in FORMATS:
        raise ConfigError(f"--format {options.format}: expected {', '.join(FORMATS)}")
    where = str(source) if is_remote(str(source)) else str(source).removeprefix("file://")
    if is_built_in(where, options):
        return digits_source(Collector("digits", "digits", options.class_map))
    check_exists(where)
    file = find(where)
    files = [file] if file else _listed(where, options)
    kind = options.format or (_kind_of_file(file) if file else _kind_of_folder(where, files))
    collector = Collector(where.rstrip("/"), kind, options.class_map)
    return _open(collector, kind, file, files, where, options)


def is_built_in(source: str, options: SourceOptions) -> bool:
    """It is no place: a folder of that name has nothing to do with it."""
    return source == "digits" and options.format in (None, "digits")


def _listed(where: str, options: SourceOptions) -> list[File]:
    files = list(list_files(where, follow_links=options.follow_links))
    if not files and is_remote(where):
        raise ConfigError(f"source {where!r}: no object there, and none below it")
    return files


def _open(
    collector: Collector, kind: str, file: File | None, files: list[File], where: str, options: SourceOptions
) -> Source:
    columns = (options.image_column, options.label_column)
    if kind == "digits":
        raise ConfigError("--format digits: that source is called `digits`")
    if kind == "folder":
        if file:
            raise ConfigError(f"--format folder: {where} is a file")
        return folder_source(collector, files, _sub_folders(where))
    if kind == "cifar":
        return cifar_source(collector, files, options.label_column)
    if kind == "idx":
        idx = files if file is None else _idx_pair(file)
        return idx_source(collector, [found for found in idx if IDX_NAME.search(found.name)])
    if kind == "table":
        return table_source(collector, _only(where, files, is_table), *columns)
    if kind == "parquet":
        return parquet_source(
            collector, _only(where, files, lambda name: name.endswith(".parquet")), *columns
        )
    return tar_source(collector, _only(where, files, _is_tar), kind, options.label_column)


def _only(where: str, files: list[File], wanted: Callable[[str], bool]) -> list[File]:
    """Those of the format; a single file that somebody called otherwise is taken at their word."""
    found = files if len(files) == 1 else [file for file in files if wanted(file.name)]
    if not found:
        raise DataError(f"{where} holds no file of that format")
    return found


def _is_tar(name: str) -> bool:
    return name.endswith(TARS)


def _idx_pair(file: File) -> list[File]:
    """The file and, beside it, that with its labels."""
    folder, _, name = file.object.rpartition("/")
    other = ("labels", "images") if "labels" in name else ("images", "labels")
    stem = name.replace(*other).removesuffix(".gz")
    ranks = ("idx1", "idx3") if other[0] == "labels" else ("idx3", "idx1")
    names = {stem.replace(*ranks) + end for end in ("", ".gz")}
    return [file, *(found for found in (find(f"{folder}/{name}") for name in sorted(names)) if found)]


def _sub_folders(where: str) -> list[str]:
    return [] if is_remote(where) else [path.name for path in Path(where).iterdir() if path.is_dir()]


def _kind_of_file(file: File) -> str:
    head = read_range(file.object, 0, min(512, file.size), file.etag)
    if head.startswith(b"\x1f\x8b"):
        head = next(gunzip(file), b"")[:512]
        if head[257:262] == b"ustar" and not file.name.endswith((".tar.gz", ".tgz")):
            raise ConfigError(f"{file.object} is a compressed tar; call it *.tar.gz")
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(IDX_MAGIC):
        return "idx"
    if head[257:262] == b"ustar" or _is_tar(file.name):
        return _kind_of_tar(file)
    if is_table(file.name):
        return "table"
    raise ConfigError(
        f"{file.object}: neither a tar, Parquet, IDX, CSV, TSV nor JSON lines; --format forces one of "
        f"{', '.join(FORMATS)}"
    )


def _kind_of_tar(file: File) -> str:
    for number, member in enumerate(members(file)):
        if is_cifar(member.name):
            return "cifar"
        if number == FIRST_MEMBERS:
            break
    return tar_kind(file)


def _kind_of_folder(where: str, files: Sequence[File]) -> str:
    """Its files' names decide; a class's folder may be called anything, so it is asked last."""
    top = [file for file in files if "/" not in file.path]
    shallow = [file for file in files if _is_shallow(file)]
    in_folders = any(is_image(file.name) and "/" in file.path for file in files)
    found = {
        "cifar": any(is_cifar(file.path) for file in shallow) or _has(shallow, "fine_label_names.txt"),
        "idx": any("images" in f.name and IDX_NAME.search(f.name) for f in top),
        "parquet": any(file.name.endswith(".parquet") for file in shallow),
        "wds": any(_is_tar(file.name) for file in shallow),
        "table": any(is_table(file.name) for file in top),
        "folder": in_folders,
    }
    kinds = [kind for kind, is_kind in found.items() if is_kind]
    if "table" in kinds and "wds" in kinds and not in_folders:
        kinds.remove("wds")  # the table is about what is in them
    if len(kinds) > 1 and not {"cifar", "idx"} & set(kinds[:1]):
        raise ConfigError(f"{where} could be read as {' or '.join(kinds)}; say which: --format {kinds[0]}")
    if kinds[:1] == ["wds"]:
        return _kind_of_tar(next(file for file in shallow if _is_tar(file.name)))
    return kinds[0] if kinds else "folder"


def _is_shallow(file: File) -> bool:
    """At the top, or in data/ (Hugging Face's), in a split's folder, or in the one that CIFAR unpacks to."""
    folder, slash, rest = file.path.partition("/")
    known = folder in ("data", *SPLITS) or folder.startswith("cifar-10")
    return not slash or (known and "/" not in rest)


def _has(files: Sequence[File], name: str) -> bool:
    return any(file.name == name for file in files)
