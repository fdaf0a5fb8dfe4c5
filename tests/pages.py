"""What the documentation says that can be checked: commands, links, files, fields."""

import re
import shlex
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from workers.config import RunConfig

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
"""In the order in which a person goes through them."""
DOCS = [*sorted((ROOT / "docs").glob("*.md")), *GUIDES]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *DOCS]

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SHOWN_FILE = re.compile(r"`([\w./-]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A text that ends in a file's name, and the block with what is in it."""
EXIT_CODE = re.compile(r"# exit code (\d):")
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"(?<![\w/.:-])(?:\.ci|docs|infra|orchestrator|pipelines|tests|workers)/[\w./-]*\w")
FIELD = re.compile(rf"(?<![\w./-])({'|'.join(RunConfig.model_fields)})\.([a-z_]+(?:\.[a-z_]+)*)(?![\w/(])")
SUFFIXES = ("py", "yaml", "yml", "json", "jsonl", "md", "safetensors", "parquet", "csv", "whl", "example")
"""Of names of files, which are no fields: `model.safetensors`."""


@dataclass(frozen=True)
class Command:
    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


@dataclass(frozen=True)
class Step:
    """What a person does who follows a page: write a file, or give a command and look at what it says."""

    page: str
    line: str
    """Of the shell, or the name of the file."""
    file: str | None = None
    """What is in it."""
    exit_code: int = 0
    output: tuple[str, ...] = ()
    """Lines that are shown below the command; `...` stands for anything."""

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each fenced block."""
    for match in FENCE.finditer(page.read_text()):
        yield match[1], match[2]


def spans(page: Path) -> list[str]:
    """What is set as code within the text; a line may end within it."""
    return [" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", page.read_text()))]


def console(page: Path) -> list[Command]:
    """Each simple command of the page's console blocks, without comments, pipes and the like."""
    found = []
    for language, text in blocks(page):
        if language == "console":
            for line in re.sub(r"\\\n", " ", text).splitlines():
                if line.lstrip().startswith("$ "):
                    found += [Command(name(page), words) for words in _simple(line.lstrip()[2:])]
    return found


def steps(page: Path) -> list[Step]:
    """Files that are shown with their names, and commands with what they say, in the order of the page."""
    text = page.read_text()
    found = [
        (match.start(2), Step(name(page), match[1], file=match[2])) for match in SHOWN_FILE.finditer(text)
    ]
    for match in FENCE.finditer(text):
        if match[1] == "console":
            found += [(match.start(2), step) for step in _console_steps(name(page), match[2])]
    return [step for _, step in sorted(found, key=lambda at: at[0])]


def _console_steps(page: str, text: str) -> Iterator[Step]:
    for part in re.split(r"^ *\$ ", re.sub(r"\\\n", " ", text), flags=re.MULTILINE)[1:]:
        line, *output = part.splitlines()
        code = EXIT_CODE.search(line)
        shown = tuple(" ".join(said.split()) for said in output if said.strip())
        yield Step(page, line, exit_code=int(code[1]) if code else 0, output=shown)


def inline(page: Path) -> list[Command]:
    """Commands of ours within the text; they may leave out what they need."""
    texts = [span for span in spans(page) if re.match(r"(vitscale|make) ", span)]
    return [Command(name(page), words) for text in texts for words in _simple(text)]


def _simple(line: str) -> Iterator[tuple[str, ...]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in lexer:
        if set(word) <= set(";&|"):
            yield tuple(words)
            words = []
        else:
            words.append(word)
    yield tuple(words)


def links(page: Path) -> list[str]:
    """To files of this repository, with the heading if there is one."""
    return [link for link in LINK.findall(page.read_text()) if not re.match(r"\w+:", link)]


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {_anchor(heading) for heading in headings}


def _anchor(heading: str) -> str:
    kept = [c for c in heading.lower().strip() if c in " -_" or unicodedata.category(c)[0] in "LN"]
    return "".join(kept).replace(" ", "-")


def files(page: Path) -> set[str]:
    """Named anywhere, comments in blocks included."""
    return set(FILE.findall(page.read_text()))


def fields(page: Path) -> set[str]:
    """Of a run's configuration, as `compute.workers`, named as code."""
    code = [text for _, text in blocks(page)] + spans(page)
    found = {f"{match[1]}.{match[2]}" for text in code for match in FIELD.finditer(text)}
    return {field for field in found if field.rpartition(".")[2] not in SUFFIXES}


def has_field(path: str, kind: type[BaseModel] = RunConfig) -> bool:
    """Whether there is such a field in a configuration."""
    first, _, rest = path.partition(".")
    if first not in kind.model_fields:
        return False
    return not rest or any(has_field(rest, part) for part in models(kind.model_fields[first].annotation))


def models(annotation: Any) -> list[type[BaseModel]]:
    """The groups of fields that a value may be, however the annotation wraps them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models(argument)]
