"""An exported run to the Hugging Face Hub: shown first, asked for, then uploaded.

The token is the one of the Hub's own login (`hf auth login`, or HF_TOKEN); it is neither taken as
an argument nor written anywhere. Nothing is uploaded of a run whose checks have failed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What would be uploaded, and where to."""

    repo_id: str
    private: bool
    files: list[tuple[Path, str]]  # (file here, its name there)

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file, _ in self.files)


def plan_upload(run: RunFolder, repo_id: str, private: bool = False) -> Upload:
    """The files of a run's model, and of its GGUF files where there are some.

    Raises:
        SkipwiseError: nothing is exported, a check has failed, the name is none of the Hub.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SkipwiseError(f"{repo_id!r} is no name on the Hub: {_line(error)}") from error
    if repo_id.count("/") != 1:
        raise SkipwiseError(f"{repo_id!r} is no name on the Hub: type USER/NAME")
    if not run.metadata().get("exported") or not run.model.is_dir():
        raise SkipwiseError(f"{run.path} is not exported\ntype skipwise export {run.path}")
    failed = [c["name"] for c in run.metadata().get("checks", []) if not c["passed"]]
    if failed:
        raise SkipwiseError(
            f"{run.path}: the check {failed[0]!r} has failed, and what is not right is not "
            f"published\nsee {run.report / 'index.html'}"
        )
    found = [file for file in sorted(run.model.rglob("*")) if file.is_file()]
    files = [(file, file.relative_to(run.model).as_posix()) for file in found]
    files += [(f, f.name) for f in sorted(run.gguf.glob("*.gguf"))]
    return Upload(repo_id=repo_id, private=private, files=files)


def describe_upload(upload: Upload) -> str:
    """What a person is asked about."""
    width = max(len(name) for _, name in upload.files)
    lines = [f"  {name:<{width}}  {_size(file.stat().st_size):>9}" for file, name in upload.files]
    seen = "private" if upload.private else "public: everybody can read it"
    lines.insert(0, f"to {HfApi().endpoint}/{upload.repo_id} ({seen})")
    lines.append(f"  {'in all':<{width}}  {_size(upload.num_bytes):>9}")
    return "\n".join(lines)


def confirm(upload: Upload, ask: Any = input) -> bool:
    """Ask the person at the terminal.

    Raises:
        SkipwiseError: there is nobody to ask.
    """
    if not sys.stdin.isatty() and ask is input:
        raise SkipwiseError("nobody is there to confirm the upload\ntype --yes")
    return ask(f"upload {len(upload.files)} files? [y/N] ").strip().lower() in ("y", "yes")


def upload_files(upload: Upload) -> str:
    """Make the repository and upload; files that are there already are not sent again.

    Returns:
        the address of the model.

    Raises:
        SkipwiseError: not logged in, no right to write there, a card that the Hub turns down, a
            failed connection.
    """
    api = HfApi()
    try:
        api.whoami()
    except Exception as error:
        raise SkipwiseError(
            f"the Hub does not know you ({_line(error)})\ntype hf auth login, or set HF_TOKEN"
        ) from error
    try:
        card = next((file for file, name in upload.files if name == "README.md"), None)
        if card is not None:
            ModelCard(card.read_text(encoding="utf-8")).validate(repo_type="model")
        url = api.create_repo(upload.repo_id, private=upload.private, exist_ok=True)
        api.create_commit(
            upload.repo_id,
            [CommitOperationAdd(name, str(file)) for file, name in upload.files],
            commit_message="Upload by Skipwise",
        )
    except ValueError as error:
        raise SkipwiseError(f"the Hub does not accept the model card: {_line(error)}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise SkipwiseError(
                f"your token may not write to {upload.repo_id}\n"
                "take one with the right to write: https://huggingface.co/settings/tokens"
            ) from error
        raise SkipwiseError(
            f"the upload to {upload.repo_id} failed: {_line(error)}\n"
            "type the command again: what is there is not sent again"
        ) from error
    except OSError as error:
        raise SkipwiseError(
            f"the Hub cannot be reached: {_line(error)}\n"
            "type the command again: what is there is not sent again"
        ) from error
    return str(url)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB"


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
