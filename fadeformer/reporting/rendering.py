"""Jinja templates of the HTML pages, and inline Markdown in their text."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

INTERVAL_PATTERN = re.compile(r"[\d.]+ \([\d.]+ to [\d.]+\)")


def load_template(name: str) -> Template:
    """Load a template such as `report.html`; text is HTML-escaped, and undefined variables raise an error."""
    environment = Environment(loader=PackageLoader("fadeformer.reporting"), autoescape=True, undefined=StrictUndefined)
    environment.filters["marked"] = render_markup
    environment.tests["interval"] = lambda text: INTERVAL_PATTERN.fullmatch(text) is not None
    return environment.get_template(name)


def render_markup(text: str) -> Markup:
    """Convert Markdown code and bold to HTML, and escape everything else."""
    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html))  # noqa: S704 - escaped above
