"""Cells that a spreadsheet shows instead of computing them.

https://owasp.org/www-community/attacks/CSV_Injection
"""

from __future__ import annotations

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def harmless(cell: str) -> str:
    """The cell with an apostrophe where a spreadsheet would take it for a formula.

    >>> harmless("=1+1"), harmless("so good")
    ("'=1+1", 'so good')
    """
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def as_it_was(cell: str) -> str:
    """The cell before `harmless`, unless that cell itself began with an apostrophe and such a
    sign.
    """
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell
