"""The terminal that pages are printed on.

Labels, posts and logs are other people's words. What a terminal would take for a command in them is
shown and not sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.console import Console
from rich.segment import Segment

# controls but for the tab, what turns the direction of writing, ends of lines, half characters
_COMMANDS = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def shown(words: str) -> str:
    """The words on one line, with every character that a terminal would obey spelled out.

    >>> shown("red \x1b[31m alarm")
    'red \\x1b[31m alarm'
    """
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), words)


class Terminal(Console):
    """Rich's console, which would send what it is given."""

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        """As rich makes it, of segments whose text holds no command."""
        return super()._render_buffer(
            segment
            if segment.control
            else Segment("\n".join(map(shown, segment.text.split("\n"))), segment.style)
            for segment in buffer
        )
