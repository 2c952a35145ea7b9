"""A hook of mkdocs.yml: links from docs/ to other files of the repository.

On the site such a link leads to the file in the repository, whose address is REPOSITORY_URL in the
environment of the build. Without an address the words of the link stay, without the link.
"""

import os
import posixpath
import re
from typing import Any

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((\.\./[^)\s]+)\)")


def on_config(config: Any) -> Any:
    config.repo_url = os.environ.get("REPOSITORY_URL", "").rstrip("/")
    config.repo_name = "Source code" if config.repo_url else None
    return config


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def outside(match: re.Match[str]) -> str:
        path, hash_mark, anchor = match[3].partition("#")
        path = posixpath.normpath(posixpath.join(folder, path))
        if path.startswith("docs/"):
            return match[0]
        if not config.repo_url:
            return match[2]
        url = f"{config.repo_url}/blob/HEAD/{path}{hash_mark}{anchor}"
        return f"{match[1]}[{match[2]}]({url})"

    return _LINK.sub(outside, markdown)
