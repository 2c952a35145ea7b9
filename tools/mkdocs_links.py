"""A hook of mkdocs.yml: links from docs/ to other files of the repository.

On the site such a link goes to the file in the repository, if REPOSITORY_URL is set where the site
is built. Without it the link's text is kept and the link is dropped.
"""

import posixpath
import re
from typing import Any

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def outside(match: re.Match[str]) -> str:
        path, _, anchor = match[3].partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        if path.startswith("docs/"):
            return match[0]
        if not config.repo_url:
            return match[2]
        url = f"{config.repo_url.rstrip('/')}/blob/HEAD/{path}"
        return f"{match[1]}[{match[2]}]({url}{'#' if anchor else ''}{anchor})"

    return _LINK.sub(outside, markdown)
