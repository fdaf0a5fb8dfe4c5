"""What others wrote, such as logs and names, as a terminal may show it: text, and no order to it."""

import logging
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

CONTROLS = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")
"""Characters that a terminal obeys, but for tabs and ends of lines."""


def harmless(text: str) -> str:
    """The text, with a sign in place of each character that a terminal obeys."""
    return text.translate(CONTROLS)


class HarmlessConsole(Console):
    """Prints styles of ours, and no escape sequence that came with what is printed."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=harmless(segment.text))


class HarmlessFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))
