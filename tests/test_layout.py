"""What shards look like: images and labels by every rule, brace lists, lists of classes."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.shardlists import expand_urls

from tests.conftest import make_tar
from workers.data.index import DatasetIndex
from workers.data.indexing import build_index
from workers.data.layout import IMAGE_KEY, Labels, Layout, read_classes
from workers.data.location import expand, locate
from workers.data.tar import samples
from workers.errors import ConfigError, DataError

IMAGE = ("a.jpg", b"?")


def build(tmp_path: Path, *members: tuple[str, bytes], **options: object) -> DatasetIndex:
    (tmp_path / "s.tar").write_bytes(make_tar(members))
    return build_index(tmp_path.as_uri(), **options)


def labels(index: DatasetIndex) -> list[str]:
    """The class of each sample by name."""
    return [index.classes[label] for label in index.records(0, index.num_samples)[1]["label"]]


# Images.


@pytest.mark.parametrize(
    ("image_key", "kept"),
    [
        (None, IMAGE_KEY),
        (" JPG ; .Png;jpg", "jpg;png"),
        ("image.jpg", "image.jpg"),
        ("0.jpg;image.WEBP", "0.jpg;image.webp"),
    ],
)
def test_image_key_as_it_is_kept(image_key: str | None, kept: str):
    assert Layout.of(image_key, None).image_key == kept
    assert Layout.of(kept, None).image_key == kept


@pytest.mark.parametrize("image_key", [";", "jpg;;png", "a/b", "a b", "..", "jpg."])
def test_no_image_key(image_key: str):
    with pytest.raises(ConfigError, match=re.escape(f"image_key {image_key!r}: expected extensions")):
        Layout.of(image_key, None)


def test_the_image_is_the_one_that_image_key_names(tmp_path: Path):
    members = [("a.cls", b"0"), ("a.image.JPG", b"1"), ("a.jpg", b"22"), ("a.mask.png", b"333")]
    archive = make_tar(members)
    for image_key, image in {"image.jpg": b"1", "jpg": b"22", "webp;mask.png": b"333"}.items():
        index = build(tmp_path, *members, image_key=image_key)
        row = index.records(0, 1)[1][0]
        assert archive[row["image_offset"] :][: row["image_size"]] == image
        assert index.image_key == DatasetIndex.open(tmp_path.as_uri()).image_key == image_key
    with pytest.raises(DataError, match=r"sample 'a' has 2 images, expected one of jpg, image\.jpg"):
        build(tmp_path, *members, image_key="jpg;image.jpg")


@pytest.mark.parametrize(
    "members",
    [
        [("a/img.0001.jpg", b"?"), ("a/img.0002.jpg", b"?"), ("a/img.cls", b"0")],
        [("a/img.jpg", b"?"), ("a/img.cls", b"0"), ("a/img.0002.jpg", b"?"), ("a/img.0002.cls", b"0")],
        [("a/img.0001.jpg", b"?"), ("a/img.0001.cls", b"0")],
        [("a/img.2024.05.jpg", b"?"), ("a/img.2024.05.cls", b"0")],
    ],
)
def test_dotted_keys_that_would_merge(tmp_path: Path, members: list[tuple[str, bytes]]):
    with pytest.raises(DataError, match=r"s.tar: sample 'a/img' .*first dot ends its key.* rename them"):
        build(tmp_path, *members)


def test_dotted_extensions_that_are_asked_for(tmp_path: Path):
    frames = [("a.0.jpg", b"?"), ("a.1.jpg", b"!"), ("a.cls", b"0")]
    with pytest.raises(DataError, match=r"0\.jpg, 1\.jpg"):
        build(tmp_path, *frames)
    with pytest.raises(DataError, match=r"1\.jpg"):
        build(tmp_path, *frames, image_key="0.jpg")
    assert build(tmp_path, frames[0], frames[2], image_key="0.jpg").num_samples == 1


# Labels.


@pytest.mark.parametrize("rule", ["cls", "txt", "none", "json:a", "json:meta.label", r"key:_(\d+)$"])
def test_rules_as_they_are_kept(rule: str):
    assert Layout.of(None, f" {rule} ").label == rule


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("class", "expected cls, txt, json:FIELD, key:REGEX or none"),
        ("cls:x", "expected cls, txt"),
        ("json:", "expected cls, txt"),
        ("json:a..b", "expected a field"),
        ("key:(", "is no regular expression"),
        ("key:a+", "has 0 groups"),
        ("key:(a)(b)", "has 2 groups"),
    ],
)
def test_no_rule(rule: str, said: str):
    with pytest.raises(ConfigError, match=re.escape(said)):
        Layout.of(None, rule)


@pytest.mark.parametrize(
    ("rule", "member"),
    [
        ("cls", ("a/7_x.cls", b" cat\n")),
        ("txt", ("a/7_x.txt", b"cat")),
        ("json:label", ("a/7_x.json", b'{"label": "cat"}')),
        ("json:meta.label", ("a/7_x.JSON", b'{"meta": {"label": " cat "}}')),
        ("key:^([a-z])/", ("a/7_x.cls", b"ignored")),
        (r"key:/(\d+)_", ("a/7_x.cls", b"ignored")),
    ],
)
def test_where_a_label_stands(rule: str, member: tuple[str, bytes]):
    (sample,) = samples("s.tar", [make_tar([("a/7_x.jpg", b"?"), member])])
    expected = {"key:^([a-z])/": "a", r"key:/(\d+)_": "7"}.get(rule, "cat")
    assert Layout.of(None, rule).label_text("s.tar", sample) == expected


@pytest.mark.parametrize(
    ("rule", "content", "said"),
    [
        ("json:label", b"{", "has a .json file that is no JSON"),
        ("json:label", b"[" * 100_000, "has a .json file that is no JSON"),
        ("json:label", b"\xff", "has a .json file that is not UTF-8"),
        ("json:label", b"{}", "has no field 'label' in its .json file, where label is json:label"),
        ("json:a.b", b'{"a": 3}', "has no field 'b'"),
        ("json:label", b'{"label": [1]}', "has a list in the field label"),
        ("json:label", b'{"label": true}', "has a bool in the field label"),
        ("json:label", b'{"label": 1.5}', "has a float in the field label"),
        ("json:label", b'{"label": null}', "has a NoneType in the field label"),
        ("json:label", b'{"label": ""}', "has the label '', expected"),
        ("json:label", b'{"label": 1e999}', "has a float in the field"),
        ("json:label", b'{"label": 99999999999999999999999}', "outside the classes"),
        ("json:label", b'{"label": -1}', "outside the classes"),
        ("json:label", b" " * (1 << 20) + b"{}", "has a .json file of 1048578 bytes, more than 1048576"),
        ("cls", b"x" * 5000, "has a .cls file of 5000 bytes"),
        ("cls", b"two\nlines", "has the label 'two\\nlines', expected"),
        ("cls", b"x" * 300, "expected an integer or a class name of at most 256 characters"),
        ("cls", b"\xff\xfe", "has a .cls file that is not UTF-8"),
        ("cls", b"1\x00", "has the label"),
        ("cls", b"99999999999999999999", "outside the classes 0 to 1048575"),
        ("txt", b"cat", "has no label, expected a .txt file; its extensions are jpg, cls"),
        ("key:(zebra)", b"", "has a key that the label's pattern '(zebra)' does not find anything in"),
        ("key:b|(a)$", b"", "does not find anything in"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path: Path, rule: str, content: bytes, said: str):
    extension = "json" if rule.startswith("json") else "cls"
    with pytest.raises(DataError, match=r"^s\.tar: sample 'ab' has ") as caught:
        build(tmp_path, ("ab.jpg", b"?"), (f"ab.{extension}", content), label=rule)
    assert said in str(caught.value)


def test_keys_are_bounded_before_a_pattern_is_tried_on_them(tmp_path: Path):
    key = "a" * 200 + "/" + "b" * 200 + "/" + "c" * 120
    (tmp_path / "s.tar").write_bytes(make_tar([(f"{key}.jpg", b"?")], format=2))
    with pytest.raises(DataError, match="has a key of 522 characters, more than 512"):
        build_index(tmp_path.as_uri(), label="key:(a*)*$")


def test_no_labels(tmp_path: Path):
    index = build(tmp_path, IMAGE, label="none")
    assert (index.classes, index.records(0, 1)[1]["label"].tolist()) == ((), [-1])
    assert DatasetIndex.open(tmp_path.as_uri()) == index == build_index(tmp_path.as_uri())


def test_names_are_numbered_in_their_order(tmp_path: Path):
    members = []
    for number, name in enumerate(["dog", "cat", "über", "Cat", "dog"]):
        members += [(f"{number}.jpg", b"?"), (f"{number}.cls", name.encode())]
    index = build(tmp_path, *members)
    assert index.classes == ("Cat", "cat", "dog", "über")
    assert index.records(0, 5)[1]["label"].tolist() == [2, 1, 3, 0, 2]


def test_names_are_looked_up_in_the_list(tmp_path: Path):
    members = [("a.jpg", b"?"), ("a.cls", b"dog"), ("b.jpg", b"?"), ("b.cls", b"1")]
    index = build(tmp_path, *members, classes=("dog", "cat"))
    assert (index.classes, index.records(0, 2)[1]["label"].tolist()) == (("dog", "cat"), [0, 1])
    with pytest.raises(
        DataError, match=r"s.tar: sample 'a' has the label 'dog', which is none of the 1 clas"
    ):
        build_index(tmp_path.as_uri(), classes=("cat",))
    with pytest.raises(DataError, match=r"sample 'b' has the label '1'; labels are numbers .*--classes"):
        number_all(make_tar(members))


def number_all(archive: bytes) -> list[int]:
    labels = Labels(Layout(), None)
    return [labels.number("s.tar", sample) for sample in samples("s.tar", [archive])]


def test_names_and_numbers_in_different_shards(tmp_path: Path):
    for name, label in (("a", b"cat"), ("b", b"1")):
        (tmp_path / f"{name}.tar").write_bytes(make_tar([("x.jpg", b"?"), ("x.cls", label)]))
    with pytest.raises(DataError, match=r"a\.tar and b\.tar do not agree: labels are numbers in one place"):
        build_index(tmp_path.as_uri())
    assert labels(build_index(tmp_path.as_uri(), classes=("dog", "cat"))) == ["cat", "cat"]


def test_an_index_knows_what_it_was_asked_for(tmp_path: Path):
    index = build(tmp_path, IMAGE, ("a.txt", b"x"), label="txt")
    for same in (("jpg;jpeg;png;webp", "txt"), (None, None), ("JPG; jpeg;png;webp", None)):
        index.check_layout(*same)
    with pytest.raises(ConfigError, match=r"data.label is 'cls', but .* was indexed with 'txt'; .* --label"):
        index.check_layout(None, "cls")
    with pytest.raises(ConfigError, match=r"data.image_key is 'png', .* --image-key 'png'"):
        index.check_layout("png", None)
    assert build_index(tmp_path.as_uri()).label == "txt", "stays"


# Lists of classes.


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.txt", "dog\ncat\n\n"),
        ("c.names", "dog \r\ncat"),
        ("c.json", '{"cat": 1, "dog": 0}'),
        ("c.json", '["dog", "cat"]'),
        ("c.yaml", "- dog\n- cat\n"),
        ("c.yml", "dog: 0\ncat: 1\n"),
    ],
)
def test_files_of_classes(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text, newline="")
    assert read_classes(tmp_path / name) == ("dog", "cat")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.txt", "", "expected distinct names, at least one"),
        ("c.txt", "a\n\nb", "class 1 is ''"),
        ("c.txt", "a\na", "class 1 is 'a', again"),
        ("c.json", '{"a": 0, "b": 2}', "expected the numbers 0 to 1, no 1"),
        ("c.json", '{"a": 0, "b": 0}', "expected the numbers 0 to 1, no 1"),
        ("c.json", '{"a": true}', "expected the numbers 0 to 0, no 0"),
        ("c.json", '"a"', "expected names, found str"),
        ("c.yaml", "a: [", "cannot be read"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_what_is_no_list_of_classes(tmp_path: Path, name: str, text: str | None, said: str):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_classes(tmp_path / name)


# Brace lists.


def test_braces():
    assert expand("s3://b/set/t-{008..010}.tar") == [f"s3://b/set/t-{n:03d}.tar" for n in (8, 9, 10)]
    assert expand("s3://b/{b,a}/x-{0..1}.tar") == [f"s3://b/{f}/x-{n}.tar" for f in "ab" for n in (0, 1)]


@settings(max_examples=100, deadline=None)
@given(
    folders=st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=4, unique=True),
    start=st.integers(0, 120),
    count=st.integers(1, 40),
    width=st.integers(1, 5),
)
def test_a_list_is_a_root_and_names_below(folders: list[str], start: int, count: int, width: int):
    middle = "{" + ",".join(folders) + "}" if len(folders) > 1 else folders[0]
    pattern = f"s3://bucket/set/{middle}/x-{{{start:0{width}d}..{start + count - 1:0{width}d}}}.tar"
    location = locate(pattern)
    assert location.names is not None
    numbers = range(start, start + count)
    padding = max(len(f"{n:0{width}d}") for n in (start, start + count - 1)) if width > 1 else 0
    urls = {f"s3://bucket/set/{folder}/x-{n:0{padding}d}.tar" for folder in folders for n in numbers}
    if any(len(f"{n:0{width}d}") > 1 and f"{n:0{width}d}".startswith("0") for n in (start, numbers[-1])):
        assert {f"{location.root}/{name}" for name in location.names} == urls
    assert len(location.names) == len(folders) * count
    assert list(location.names) == sorted(location.names)
    assert location.root.startswith("s3://bucket/set") and not location.root.endswith("/")
    reordered = "{" + ",".join(reversed(folders)) + "}" if len(folders) > 1 else folders[0]
    again = locate(pattern.replace(middle, reordered, 1))
    assert (again.root, again.home, again.names) == (location.root, location.home, location.names)


def test_one_shard_is_a_list_too():
    location = locate("file:///data/a%20b/x.tar")
    assert (location.root, location.names) == ("file:///data/a%20b", ("x.tar",))
    assert locate("file:///data/{x%20y,z}.tar").names == ("x y.tar", "z.tar")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("s3://b/{a,b.tar", "Unbalanced braces"),
        ("s3://b/{a,a}.tar", r"names s3://b/a.tar twice"),
        ("s3://{a,b}/x.tar", "expected shards of one bucket"),
        ("s3://{a,b}-x/x.tar", "expected shards of one bucket"),
        ("{s3://a,file:///b}/x.tar", "expected shards of one bucket"),
        ("s3://b/{0..99999999}.tar", "names more than 2,000,000 shards"),
        ("s3://b/{0..9999}{0..9999}.tar", "names more than 2,000,000 shards"),
    ],
)
def test_what_is_no_list(pattern: str, said: str):
    with pytest.raises(ConfigError, match=said):
        locate(pattern)


def test_an_index_of_a_list(tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            members = [(f"{folder}{number}.jpg", b"?"), (f"{folder}{number}.cls", str(number).encode())]
            (tmp_path / folder / f"x-{number}.tar").write_bytes(make_tar(members))
    pattern = f"{tmp_path.as_uri()}/{{a,b}}/x-{{0..1}}.tar"
    index = build_index(pattern)
    assert (index.url, index.source) == (tmp_path.as_uri(), pattern)
    assert [shard.name for shard in index.shards] == ["a/x-0.tar", "a/x-1.tar", "b/x-0.tar", "b/x-1.tar"]
    assert DatasetIndex.open(pattern) == index
    assert DatasetIndex.open(f"{tmp_path.as_uri()}/{{b,a}}/x-{{1..0}}.tar").fingerprint == index.fingerprint
    assert index.records(0, 4)[1]["label"].tolist() == [0, 1, 0, 1]
    assert np.array_equal(index.records(2, 1)[1], index.fetch_rows(np.array([2]))[1])
    other = build_index(f"{tmp_path.as_uri()}/a/x-{{0..2}}.tar")
    assert [shard.name for shard in other.shards] == ["x-0.tar", "x-1.tar", "x-2.tar"]
    assert build_index(f"{tmp_path.as_uri()}/b/x-2.tar").num_samples == 1
    assert DatasetIndex.open(pattern) == index, "each list has an index of its own"
    with pytest.raises(DataError, match=r"2 of the 6 shards .* do not exist: a/x-3.tar, b/x-3.tar"):
        build_index(f"{tmp_path.as_uri()}/{{a,b}}/x-{{1..3}}.tar")
    with pytest.raises(
        DataError, match=r"no \*.tar directly under .*deeper, such as a/x-0.tar: .*brace list"
    ):
        build_index(tmp_path.as_uri())
    with pytest.raises(DataError, match="is not indexed"):
        DatasetIndex.open(f"{tmp_path.as_uri()}/{{a,b}}/x-{{0..2}}.tar")


def test_stock_webdataset_reads_the_same_list():
    for pattern in ("s3://b/{a,b}/x-{00..12}.tar", "s3://b/{a{1,2},c}-{9..11}.tar", "s3://b/x.tar"):
        assert sorted(expand_urls(pattern)) == expand(pattern)
