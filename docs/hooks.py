"""For the site: links out of docs/ lead to files of the repository, which a site alone does not hold."""

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]*)\]\((\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Link them where the repository's address is set (repo_url), and name them where it isn't."""

    def replace(found: re.Match[str]) -> str:
        text, path = found[1], found[2].removeprefix("../")
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        return text if path.rstrip("/") in text else f"{text} (`{path}`)"

    return _OUTSIDE.sub(replace, markdown)
