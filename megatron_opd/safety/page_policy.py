"""The Content-Security-Policy of a page that is one file: what it says of itself runs, by its hash; nothing else does, and nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable


def page_policy(*, styles: Iterable[str], scripts: Iterable[str] = (), style_attributes: bool = False, own_images: bool = False) -> str:
    """The policy for a meta element that stands before the first style and script.

    styles, scripts: contents of the page's elements, as they are in the file. style_attributes: figures have some. own_images: a script may
    show images that it drew itself.
    """
    directives = ["default-src 'none'", f"style-src {_hashes(styles)}"]
    directives += [f"script-src {found}"] if (found := _hashes(scripts)) else []
    directives += ["style-src-attr 'unsafe-inline'"] * style_attributes + ["img-src data: blob:"] * own_images
    return "; ".join([*directives, "base-uri 'none'", "form-action 'none'"])


def _hashes(texts: Iterable[str]) -> str:
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)
