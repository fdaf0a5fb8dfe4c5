"""What a user's shards look like: which file of a sample is its image, and where its label stands.

    image_key   extensions as webdataset writes them, "jpg;jpeg;png;webp"; "image.jpg" is one, too
    label       cls | txt | json:FIELD | key:REGEX | none

A label that is an integer is the number of its class; any other text is the name of one.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Self

import yaml

from workers.data.tar import Member, TarSample, UnusableShard
from workers.errors import ConfigError

IMAGE_KEY = "jpg;jpeg;png;webp"
LABEL = "cls"
NO_LABEL = -1
"""In the rows of an index without labels."""
MAX_LABEL_TEXT = 256
"""Characters of a class name; a longer text is a caption."""
MAX_LABEL_BYTES, MAX_JSON_BYTES = 4 << 10, 1 << 20
MAX_KEY = 512
"""Characters of a key that a pattern is tried on: the time of most bad patterns grows with a power of it."""
MAX_NUMBERED, MAX_NAMED = 1 << 20, 1 << 17
"""Classes of data that gives no list of them; more are taken for a mistake."""
MIXED = "labels are numbers in one place and names in another, which takes a list of the classes (--classes)"
INTEGER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True, slots=True)
class Layout:
    image_key: str = IMAGE_KEY
    label: str = LABEL

    @classmethod
    def of(cls, image_key: str | None, label: str | None) -> Self:
        """With the defaults for None; ConfigError says what is wrong with either."""
        return cls(_image_key(image_key or IMAGE_KEY), _label_rule(label or LABEL))

    def image(self, shard: str, sample: TarSample) -> Member:
        wanted = self.image_key.split(";")
        images = [sample.files[extension] for extension in wanted if extension in sample.files]
        merged = _merged(sample, wanted)
        if len(images) != 1 or merged:
            hint = "its extensions are " + ", ".join(list(sample.files)[:20])
            if merged:
                hint += (
                    f"; a name's first dot ends its key, so {', '.join(merged[:3])} are files of one sample: "
                    "rename them without dots in the key, or name one of these extensions as image_key"
                )
            _fail(
                shard, sample, f"has {len(images)} images, expected one of {', '.join(wanted)} alone; {hint}"
            )
        return images[0]

    def label_text(self, shard: str, sample: TarSample) -> str | None:
        """As it stands there, without white space around it; None where there are no labels."""
        kind, _, detail = self.label.partition(":")
        if kind == "none":
            return None
        if kind == "key":
            text = _from_key(shard, sample, detail)
        elif kind == "json":
            text = _from_json(shard, sample, detail)
        else:
            text = _read(shard, sample, kind, MAX_LABEL_BYTES).strip()
        if not text or len(text) > MAX_LABEL_TEXT or not text.isprintable():
            shown = text if len(text) <= 40 else text[:40] + "..."
            wanted = f"an integer or a class name of at most {MAX_LABEL_TEXT} characters"
            _fail(shard, sample, f"has the label {shown!r}, expected {wanted}")
        return text


class Labels:
    """Numbers the labels of one shard; without a list of `classes`, names as they come."""

    def __init__(self, layout: Layout, classes: Sequence[str] | None) -> None:
        self.named = False
        """Whether a label was a name."""
        self.names: dict[str, int] = {} if classes is None else {name: n for n, name in enumerate(classes)}
        self._layout = layout
        self._limit = MAX_NUMBERED if classes is None else len(classes)
        self._given = classes is not None
        self._numbered = False

    def number(self, shard: str, sample: TarSample) -> int:
        """Of the sample's class; DataError names the sample if it has none."""
        text = self._layout.label_text(shard, sample)
        if text is None:
            return NO_LABEL
        if INTEGER.fullmatch(text):
            number = int(text) if len(text) <= 12 else self._limit
            if not 0 <= number < self._limit:
                _fail(shard, sample, f"has the label {text}, outside the classes 0 to {self._limit - 1}")
            self._numbered = True
        else:
            self.named = True
            number = self._named(shard, sample, text)
        if self.named and self._numbered and not self._given:
            _fail(shard, sample, f"has the label {text!r}; {MIXED}")
        return number

    def _named(self, shard: str, sample: TarSample, text: str) -> int:
        if self._given and text not in self.names:
            _fail(shard, sample, f"has the label {text!r}, which is none of the {len(self.names)} classes")
        if len(self.names) > MAX_NAMED:
            _fail(shard, sample, f"has label number {MAX_NAMED + 1}: are these captions? See --label")
        return self.names.setdefault(text, len(self.names))


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names by number: a name on each line; or JSON or YAML, a list or a mapping of name to number."""
    try:
        text = path.read_text("utf-8")
        values = yaml.safe_load(text) if path.suffix in (".json", ".yaml", ".yml") else text.splitlines()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--classes {path} cannot be read: {error}") from None
    if isinstance(values, dict):
        numbers = {number: str(name) for name, number in values.items() if type(number) is int}
        missing = next((n for n in range(len(values)) if n not in numbers), None)
        if missing is not None:
            raise ConfigError(f"--classes {path}: expected the numbers 0 to {len(values) - 1}, no {missing}")
        values = [numbers[number] for number in range(len(values))]
    if not isinstance(values, list):
        raise ConfigError(f"--classes {path}: expected names, found {type(values).__name__}")
    while values and values[-1] == "":
        values.pop()
    names = tuple(str(value).strip() for value in values)
    check_classes(names, f"--classes {path}")
    return names


def check_classes(classes: Sequence[str], where: str) -> None:
    """ConfigError unless they are distinct names, at least one."""
    seen: set[str] = set()
    for number, name in enumerate(classes):
        if not name or name in seen:
            raise ConfigError(
                f"{where}: class {number} is {name!r}{', again' if name else ''}; expected distinct names"
            )
        seen.add(name)
    if not seen:
        raise ConfigError(f"{where}: expected distinct names, at least one")


def _image_key(text: str) -> str:
    extensions = [part.strip().lower().removeprefix(".") for part in text.split(";")]
    for extension in extensions:
        if not re.fullmatch(r"[^\s./;]+(\.[^\s./;]+)*", extension):
            raise ConfigError(f"image_key {text!r}: expected extensions such as jpg;png or image.jpg")
    return ";".join(dict.fromkeys(extensions))


def _label_rule(text: str) -> str:
    kind, colon, detail = text.strip().partition(":")
    plain, detailed = ("cls", "txt", "none"), ("json", "key")
    if not ((kind in plain and not colon) or (kind in detailed and detail)):
        raise ConfigError(f"label {text!r}: expected cls, txt, json:FIELD, key:REGEX or none")
    if kind == "json" and not all(detail.split(".")):
        raise ConfigError(f"label {text!r}: expected a field such as json:label or json:meta.label")
    if kind == "key":
        _pattern(detail)
    return text.strip()


@functools.cache
def _pattern(text: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(text)
    except re.error as error:
        raise ConfigError(f"label 'key:{text}' is no regular expression: {error}") from None
    if pattern.groups != 1:
        raise ConfigError(f"label 'key:{text}' has {pattern.groups} groups (...), expected one: the label")
    return pattern


def _merged(sample: TarSample, wanted: Sequence[str]) -> list[str]:
    """Extensions as of `img.0001.jpg`: where keys have dots, images of several are files of one."""
    return [
        extension
        for extension in sample.files
        if extension not in wanted and re.fullmatch(r"\d[^.]*\..+", extension)
        if extension.rpartition(".")[2] in (*wanted, *IMAGE_KEY.split(";"))
    ]


def _read(shard: str, sample: TarSample, extension: str, limit: int) -> str:
    member = sample.files.get(extension)
    if member is None:
        found = ", ".join(list(sample.files)[:20])
        _fail(
            shard,
            sample,
            f"has no label, expected a .{extension} file; its extensions are {found}. Its files must stand "
            "together; where labels are elsewhere, say so: --label txt, json:FIELD, key:REGEX or none",
        )
    if member.size > limit:
        _fail(shard, sample, f"has a .{extension} file of {member.size} bytes, more than {limit}")
    try:
        return member.data.decode("utf-8")
    except UnicodeDecodeError:
        _fail(shard, sample, f"has a .{extension} file that is not UTF-8")


def _from_key(shard: str, sample: TarSample, pattern: str) -> str:
    if len(sample.key) > MAX_KEY:
        _fail(shard, sample, f"has a key of {len(sample.key)} characters, more than {MAX_KEY}")
    match = _pattern(pattern).search(sample.key)
    if match is None or match[1] is None:
        _fail(shard, sample, f"has a key that the label's pattern {pattern!r} does not find anything in")
    return match[1].strip()


def _from_json(shard: str, sample: TarSample, field: str) -> str:
    try:
        value: Any = json.loads(_read(shard, sample, "json", MAX_JSON_BYTES))
    except (ValueError, RecursionError):
        _fail(shard, sample, "has a .json file that is no JSON")
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            _fail(shard, sample, f"has no field {part!r} in its .json file, where label is json:{field}")
        value = value[part]
    if not isinstance(value, int | str) or isinstance(value, bool):
        _fail(shard, sample, f"has a {type(value).__name__} in the field {field} of its .json file")
    return str(value).strip() if not isinstance(value, int) or abs(value) < 1 << 62 else "9" * 19


def _fail(shard: str, sample: TarSample, reason: str) -> NoReturn:
    key = sample.key if len(sample.key) <= MAX_KEY else sample.key[:MAX_KEY] + "..."
    raise UnusableShard(f"{shard}: sample {key!r} {reason}")
