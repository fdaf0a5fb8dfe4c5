"""The few shapes of HTML that every section uses. Arguments called `html` are inserted as they are; all
others are text and are escaped here."""

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from pipelines.report.journey import Link

Cell = str | Link
"""A Link is shown as `linked` does."""


def document(title: str, body_html: str, *, style: str = "") -> str:
    """A page that needs no network, no script and no other file."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style_sheet()}{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body_html}\n</main>\n</body>\n</html>\n"
    )


def style_sheet() -> str:
    return resources.files(__package__).joinpath("page.css").read_text("utf-8")


def figure(html: str, caption_html: str, *, data: str = "") -> str:
    """`data` is a `details_table` with the numbers behind it."""
    return f"<figure>{html}<figcaption>{caption_html}</figcaption>{data}</figure>"


def details_table(summary: str, header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """A folded table; the first column is text, the others are numbers and stand right."""
    return f"<details><summary>{escape(summary)}</summary>{table(header, rows)}</details>"


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]], *, text_columns: int = 1) -> str:
    """Cells are text; those beyond the first `text_columns` stand right, as numbers do."""

    def row(cells: Sequence[Cell], tag: str) -> str:
        kinds = ["" if i < text_columns else ' class="number"' for i in range(len(cells))]
        inner = "".join(f"<{tag}{k}>{_cell(cell)}</{tag}>" for k, cell in zip(kinds, cells, strict=True))
        return f"<tr>{inner}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    head = row(header, "th")
    return scrolled(f"<table><thead>{head}</thead><tbody>{body}</tbody></table>")


def scrolled(table_html: str) -> str:
    """In a box of its own, which scrolls where the window is narrower, also by keyboard."""
    return f'<div class="scroll" role="group" aria-label="table" tabindex="0">{table_html}</div>'


def linked(label: str, url: str | None) -> str:
    """A link for http and https; other addresses (s3://, file://) stay text: a browser opens none of them."""
    if url is None:
        return escape(label)
    if url.lower().startswith(("https://", "http://")):
        return f'<a href="{escape(url)}">{escape(label)}</a>'
    return f"<code>{escape(url)}</code>" if label == url else f"{escape(label)} <code>{escape(url)}</code>"


def _cell(cell: Cell) -> str:
    return escape(cell) if isinstance(cell, str) else linked(cell.label, cell.url)


def share_text(share: float) -> str:
    """0.9752 → 97.5%: the digits that a few hundred to a few thousand images can tell apart."""
    return f"{100 * share:.1f}%"


def interval_text(interval: tuple[float, float]) -> str:
    """(0.953, 0.987) → 95.3–98.7%."""
    low, high = interval
    return f"{100 * low:.1f}\N{EN DASH}{100 * high:.1f}%"


def pixels(size: int) -> str:
    return f"{size}\N{NO-BREAK SPACE}px"


def counted(number: int, noun: str) -> str:
    """1 size; 3 sizes."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def enumerate_words(words: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
