"""What the documentation says is there: commands and options, links, files, fields; all pages are found."""

import itertools
import re
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from pipelines.cli import app
from pipelines.recipes import RECIPES
from tests import pages, reference_docs
from tests.chaos.rows import ROWS
from tests.pages import DOCS, PAGES, ROOT, Command
from tests.test_recipes import FACTS
from workers.config import make_config
from workers.config_text import override
from workers.errors import ConfigError

CONSOLE = [command for page in PAGES for command in pages.console(page)]
INLINE = [command for page in PAGES for command in pages.inline(page)]
OURS = [command for command in CONSOLE if command.words[:1] == ("vitscale",)]
(UsageError,) = typer.BadParameter.__bases__
"""Of click, which typer has in itself."""
RESULTS = ROOT / "tests" / "benchmarks" / "RESULTS.md"
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def problem(command: Command, *, whole: bool) -> str:
    """What the command line has against it; `whole`: it is to be complete."""
    node, words = get_command(app), list(command.words[1:])
    while (commands := getattr(node, "commands", None)) is not None:
        word = words.pop(0) if words else ""
        if not word and node.invoke_without_command:
            return ""
        if word not in commands:
            return "" if not whole and not word else f"no command {word!r}"
        node = commands[word]
    try:
        # Without any word it would show its help instead.
        node.make_context("vitscale", (words if whole else _filled(words)) or ["--"])
    except UsageError as error:
        said = error.format_message()
        return "" if said.startswith("Missing") and not whole else said
    return ""


def _filled(words: list[str]) -> list[str]:
    """A line of the text says N or VERSION where a number goes."""
    return [re.sub(r"^[A-Z]+$", "1", word) for word in words]


def recipe(command: Command) -> str:
    """That the command trains with; empty if it has none."""
    return next((word for word in command.words[2:] if word in RECIPES), "")


def settings(command: Command) -> list[str]:
    return [after for word, after in itertools.pairwise(command.words) if word == "--set"]


def test_the_pages_are_read() -> None:
    """So that nothing passes because nothing was found."""
    assert len(OURS) > 50 and len(INLINE) > 50
    assert {command.page for command in OURS} > {"README.md", "docs/cluster.md", "docs/deploy.md"}
    assert sum(bool(recipe(command) and settings(command)) for command in [*OURS, *INLINE]) >= 5
    assert sum(len(pages.links(page)) for page in PAGES) > 30
    assert sum(len(pages.files(page)) for page in PAGES) > 60
    assert sum(len(pages.fields(page)) for page in PAGES) > 30


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("trian x", "no command 'trian'"),
        ("selftest", "no command ''"),
        ("train", "Missing argument"),
        ("train x --sets a=1", "No such option: --sets"),
        ("promote birds first --to champion", "Invalid value for 'version'"),
        ("promote birds 1 2 --to champion", "unexpected extra argument"),
    ],
)
def test_a_command_that_is_not_there_would_be_told(line: str, said: str) -> None:
    assert said in problem(Command("x", ("vitscale", *line.split())), whole=True)


@pytest.mark.parametrize("command", OURS, ids=str)
def test_a_command_of_a_block_is_one_that_can_be_given(command: Command) -> None:
    assert problem(command, whole=True) == ""


@pytest.mark.parametrize("command", [c for c in INLINE if c.words[0] == "vitscale"], ids=str)
def test_a_command_in_the_text_is_there_with_its_options(command: Command) -> None:
    assert problem(command, whole=False) == ""


@pytest.mark.parametrize("command", [c for c in [*OURS, *INLINE] if recipe(c)], ids=str)
def test_what_a_command_sets_is_possible_with_its_recipe(command: Command) -> None:
    values = RECIPES[recipe(command)](FACTS).model_dump(mode="json")
    make_config(override(values, settings(command)))


def test_a_setting_that_is_not_possible_would_be_told() -> None:
    command = Command("x", ("vitscale", "train", "vit-digits", "--set", "compute.workers=9"))
    with pytest.raises(ConfigError, match=r"compute\.workers 9 exceeds"):
        make_config(override(RECIPES[recipe(command)](FACTS).model_dump(mode="json"), settings(command)))


@pytest.mark.parametrize("command", [c for c in [*CONSOLE, *INLINE] if c.words[:1] == ("make",)], ids=str)
def test_a_target_of_make_is_there(command: Command) -> None:
    assert {word for word in command.words[1:] if "=" not in word} <= TARGETS


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_what_a_page_points_to_is_there(page: Path) -> None:
    lost = []
    for link in pages.links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in pages.anchors(target)):
            lost.append(link)
    lost += [file for file in pages.files(page) if not (ROOT / file).exists()]
    assert lost == []


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_a_field_that_a_page_names_is_one_of_a_configuration(page: Path) -> None:
    assert [field for field in sorted(pages.fields(page)) if not pages.has_field(field)] == []


def test_a_field_that_is_not_there_would_be_told() -> None:
    assert pages.has_field("compute.workers.min") and pages.has_field("data.mix.url")
    assert not pages.has_field("compute.worker") and not pages.has_field("compute.workers.least")


@pytest.mark.parametrize("page", [*PAGES, RESULTS, RESULTS.with_name("README.md")], ids=pages.name)
def test_each_table_has_a_header(page: Path) -> None:
    tables = re.findall(r"(?:^\|.*\n)+", pages.FENCE.sub("", page.read_text() + "\n"), re.MULTILINE)
    assert [table for table in tables if not re.match(r".*\n\|[ :|-]+\|\n", table)] == []


def test_each_benchmark_is_described() -> None:
    described = RESULTS.with_name("README.md").read_text()
    benchmarks = {name for name in TARGETS if name.startswith("bench-")}
    assert benchmarks == set(re.findall(r"^make (bench-[a-z]+) ", described, re.MULTILINE))


def test_the_pages_say_which_rows_were_not_soaked() -> None:
    soaks = RESULTS.read_text().partition("\n## Soaks")[2]
    soaked = set(re.findall(r"^\| (R\w+) \| \d{4}-", soaks, re.MULTILINE))
    (row,) = ROWS.keys() - soaked
    assert f"{row} has no soak" in (ROOT / "docs" / "reliability.md").read_text()
    assert f"soaks of all rows but {row} " in (ROOT / "docs" / "promises.md").read_text()


def test_each_page_is_found_from_another() -> None:
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in pages.links(page)
        if page.parent / link.partition("#")[0] != page
    }
    assert [pages.name(page) for page in DOCS if page not in linked] == []


def test_the_reference_is_what_the_code_gives() -> None:
    committed = reference_docs.PAGE.read_text()
    assert committed == reference_docs.render(), "run `make docs` and commit docs/reference.md"
