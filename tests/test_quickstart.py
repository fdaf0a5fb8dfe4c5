"""What the journey calls the data set that it puts into the bucket."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.quickstart import _name_data
from tests.conftest import make_png
from workers.errors import VitscaleError


def test_the_built_in_images_have_their_own_name() -> None:
    assert _name_data("digits") == "digits"


@pytest.mark.parametrize("name", ["photos", "My Photos (2)", "it's #1?", "ÄÖ", "digits", "x" * 200])
def test_a_folder_s_name_is_safe_in_keys_urls_and_queries(photos: Callable[..., Path], name: str) -> None:
    folder = photos(cat=2, dog=2)
    folder = folder.rename(folder.parent / name)
    found = _name_data(str(folder))
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*-[0-9a-f]{8}", found)
    assert len(found) <= 50
    assert found == _name_data(str(folder)) == _name_data(f"{folder}/")


def test_folders_of_one_name_and_folders_that_grow_are_other_data_sets(
    photos: Callable[..., Path], tmp_path: Path
) -> None:
    folder = photos(cat=2, dog=2)
    before = _name_data(str(folder))
    (folder / "cat" / "new.png").write_bytes(make_png(7))
    assert _name_data(str(folder)) != before
    (folder / "cat" / "new.png").unlink()
    assert _name_data(str(folder)) == before
    moved = folder.rename(tmp_path / "elsewhere")
    assert _name_data(str(moved)) != before


def test_data_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(VitscaleError, match="nothing"):
        _name_data(str(tmp_path / "nothing"))
