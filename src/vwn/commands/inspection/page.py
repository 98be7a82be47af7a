"""The inspection as one self-contained HTML page."""

from __future__ import annotations

from base64 import b64encode
from html import escape as text
from pathlib import Path
from typing import Any

from vwn.lab.report.page import CONTENT_POLICY, style_sheet

CAPTIONS = {
    "depth": (
        "Which sublayer feeds which",
        "Left: the size of the path, ‖Åₗᵀ(Âₜ₊₁⋯Âₗ₋₁)ᵀBₜᵀ‖ as an RMS gain, 1 for a residual connection. Right: what "
        "goes along it, the RMS of the source’s share against that of the whole input; shares may cancel.",
    ),
    "spectrum": (
        "How long slots remember",
        "The largest absolute eigenvalue of the carry. Below 1 means exponential forgetting.",
    ),
    "slots": ("What slots are used for", "Each row is a sublayer. Kept is 1 where a slot passes through unchanged."),
    "routing": (
        "What depends on the token",
        "Static part of the matrices, the RMS of what the token’s state adds to it, and how much of that varies from "
        "token to token.",
    ),
}
# On a narrow screen a figure keeps a readable size and is scrolled sideways.
FRAME = (
    "figure { overflow-x: auto; } figcaption { position: sticky; left: 0; } "
    "figure img { max-width: 100%; min-width: 44rem; background: #fff; border-radius: 6px; padding: 0.5rem; }"
)


def render_page(result: dict[str, Any], figures: dict[str, str]) -> str:
    """Return the HTML text of a result and its SVG figures by name."""
    error = f"{result['depth']['unrolled_error']:.0e}"
    title = text(f"Inside a {result['m']}×{result['n']} model")
    facts = (
        f"{_name(result['checkpoint'])} · {result['connection']} · {result['tokens']:,} tokens of "
        f"{_name(result['data'])} in windows "
        f"of {result['window']:,}"
    )
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{title}</title>\n<style>{style_sheet()}{FRAME}</style>\n</head>\n<body>\n<main>",
            f'<header><h1>{title}</h1>\n<p class="facts">{text(facts)}</p></header>',
            *[_section(name, svg) for name, svg in figures.items()],
            f'<p class="note">The unrolled sum of eq. 17 gives the final state to {error} relative. '
            "The numbers are in inspect.json.</p>\n</main>\n</body>\n</html>\n",
        ]
    )


def _name(source: str) -> str:
    """Shorten an absolute path to its name, so that a shared page does not show the folders of this machine."""
    path = Path(source)
    if not path.is_absolute():
        return source
    return f"{path.parent.name}/{path.name}" if path.name.startswith("checkpoint-") else path.name


def _section(name: str, svg: str) -> str:
    title, caption = CAPTIONS[name]
    data = b64encode(svg.encode()).decode()
    return (
        f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2><figure>'
        f'<img alt="{text(title)}" src="data:image/svg+xml;base64,{data}"><figcaption>{text(caption)}</figcaption>'
        "</figure></section>"
    )
