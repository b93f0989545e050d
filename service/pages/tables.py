"""Tables that cut nothing: what does not fit goes on in the next line."""

from copy import copy

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text


class WholeTable(Table):
    """Its title is as wide as the terminal, not as the table; names that are too long for a column wrap in it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for column in self.columns:
            column.overflow = "fold"
        if self.title:
            yield Text(str(self.title), style="bold", overflow="fold")
        bare = copy(self)
        bare.title = None
        yield from Table.__rich_console__(bare, console, options)
