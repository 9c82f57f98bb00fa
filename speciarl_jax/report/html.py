"""HTML by construction: text is escaped unless it was built here, so nothing can be forgotten."""

from __future__ import annotations

import html
import re

_VOID = frozenset({"meta", "br", "img", "input"})
_ATTRIBUTE = re.compile(r"[a-zA-Z][a-zA-Z0-9-]*")


class Markup(str):
    """Finished HTML. Only `el`, `join` and code that owns its text make one."""

    __slots__ = ()


def escape(child: object) -> Markup:
    """A child as HTML: Markup as it is, anything else as escaped text."""
    return child if isinstance(child, Markup) else Markup(html.escape(str(child), quote=True))


def join(*children: object) -> Markup:
    """Children one after the other; None is nothing."""
    return Markup("".join(escape(c) for c in children if c is not None))


def el(tag: str, *children: object, **attributes: str | float | bool | None) -> Markup:
    """One element.

    Args:
        tag: its name.
        children: Markup or text to be escaped; None is nothing.
        attributes: a trailing underscore is dropped and others become dashes (``class_``,
            ``data_x``); True is an attribute without value, None and False leave it out.

    Raises:
        ValueError: an attribute name that HTML has not.
    """
    parts = [tag]
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if not _ATTRIBUTE.fullmatch(name):
            raise ValueError(f"attribute {name!r}: expected letters, digits and dashes")
        if value is True:
            parts.append(name)
        elif value is not None and value is not False:
            parts.append(f'{name}="{html.escape(str(value), quote=True)}"')
    opening = f"<{' '.join(parts)}>"
    return Markup(opening if tag in _VOID else f"{opening}{join(*children)}</{tag}>")
