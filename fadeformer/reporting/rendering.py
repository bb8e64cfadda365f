"""What all pages have in common: their templates, and text with marks."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

INTERVAL_PATTERN = re.compile(r"[\d.]+ \([\d.]+ to [\d.]+\)")


def load_template(name: str) -> Template:
    """A template of this library, such as `report.html`; what it lacks is an error, and text in it is escaped."""
    pages = Environment(loader=PackageLoader("fadeformer.reporting"), autoescape=True, undefined=StrictUndefined)
    pages.filters["marked"] = render_markup
    pages.tests["interval"] = lambda text: INTERVAL_PATTERN.fullmatch(text) is not None
    return pages.get_template(name)


def render_markup(text: str) -> Markup:
    """Text with Markdown's marks of code and of strong words, as HTML; all else in it is escaped."""
    found = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", found))  # noqa: S704 - it was escaped
