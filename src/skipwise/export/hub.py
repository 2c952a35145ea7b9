"""Upload an exported run to the Hugging Face Hub, after the user has confirmed the list of files.

The token comes from `hf auth login` or HF_TOKEN. It is never an argument and never written to a
file. A run with a failed check is not uploaded.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError, first_line
from skipwise.models.identity import changed_note, digests

_EXPORTED = re.compile(  # names that `skipwise export` writes
    r"(model|pytorch_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
    r"|(config|generation_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|(pre)?(tokenizer|processor)(_config)?\.(json|model)|spiece\.model|vocab\.txt|merges\.txt"
    r"|(chat_template|additional_chat_templates/[\w.-]+)\.jinja|skipwise_recipe\.yaml"
    r"|README\.md|passkey\.png|\.eval_results/\w+\.yaml|(licen[cs]e|notice)[\w.-]*",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Upload:
    """The files to upload and the repository."""

    repo_id: str
    private: bool
    files: list[tuple[Path, str]]  # (local file, its name in the repository)
    left_out: list[str]  # what else lies in the folder
    changed: str  # note on the files that were changed since the export

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file, _ in self.files)


def plan_upload(run: RunFolder, repo_id: str, private: bool = False) -> Upload:
    """The upload of a run's model folder and its GGUF files.

    Raises:
        SkipwiseError: the run is not exported, a check failed, or the Hub does not allow the name.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise SkipwiseError(f"{repo_id!r} is not a valid Hub name: {first_line(error)}") from error
    if repo_id.count("/") != 1:
        raise SkipwiseError(f"{repo_id!r} is not a valid Hub name: use USER/NAME")
    if not run.metadata().get("exported") or not run.model.is_dir():
        raise SkipwiseError(f"{run.path} is not exported\nrun skipwise export {run.path}")
    failed = [c["name"] for c in (run.metadata().get("checks") or []) if not c["passed"]]
    if failed:
        raise SkipwiseError(
            f"{run.path}: the check {failed[0]!r} failed, so the model is not published\n"
            f"see {run.report / 'index.html'}"
        )
    metadata, files, left_out = run.metadata(), [], []
    listed = metadata.get("exported_files") or metadata.get("files") or ()  # names alone, before
    exported = {*listed, *(metadata.get("card_files") or ["README.md"])}
    for file in sorted(run.model.rglob("*")):
        name = file.relative_to(run.model).as_posix()
        written = name in exported or not listed  # exported by an older version
        if _is_own(file, run.model) and _EXPORTED.fullmatch(name) and written:
            files.append((file, name))
        elif not file.is_dir() or file.is_symlink():
            left_out.append(name)
    known, model = metadata.get("gguf_files") or {}, gguf_model(metadata)
    for file in sorted(run.gguf.glob("*.gguf")):
        entry = known.get(file.name) or {}
        if entry and entry.get("model") != model:
            raise SkipwiseError(
                f"{file} was made from an earlier export of the model\n"
                f"type skipwise export {run.path} --to gguf, or remove it"
            )
        own = not metadata.get("exported_files") or digests({"": file})[""] == entry.get("file")
        if own and _is_own(file, run.gguf):
            files.append((file, file.name))
        else:
            left_out.append(file.name)
    changed = changed_note(run.model, metadata)
    return Upload(repo_id=repo_id, private=private, files=files, left_out=left_out, changed=changed)


def gguf_model(metadata: dict[str, Any]) -> str:
    """Which export of the model there is: a digest that a GGUF file of it is listed with."""
    known = json.dumps(metadata.get("exported_files"), sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()[:16]


def _is_own(file: Path, folder: Path) -> bool:
    """Whether it is a regular file that no link below the folder leads to."""
    path = folder.resolve() / file.relative_to(folder)
    return file.is_file() and path.resolve() == path


def describe_upload(upload: Upload) -> str:
    """The list of files that the user confirms."""
    width = max(len(name) for _, name in upload.files)
    lines = [f"  {name:<{width}}  {_format_size(f.stat().st_size):>9}" for f, name in upload.files]
    visibility = "private" if upload.private else "public: everyone can read it"
    lines.insert(0, f"to {HfApi().endpoint}/{upload.repo_id} ({visibility})")
    lines.append(f"  {'total':<{width}}  {_format_size(upload.num_bytes):>9}")
    if upload.left_out:
        lines.append("left out, because skipwise export did not write it:")
        lines += [f"  {name!r}"[:200] for name in upload.left_out[:20]]
        lines += [f"  and {len(upload.left_out) - 20} more"] * (len(upload.left_out) > 20)
    lines += [upload.changed] * bool(upload.changed)
    return "\n".join(lines)


def confirm(upload: Upload, ask: Any = input) -> bool:
    """Ask the user for confirmation.

    Raises:
        SkipwiseError: stdin is not a terminal.
    """
    if not sys.stdin.isatty() and ask is input:
        raise SkipwiseError("cannot ask for confirmation: stdin is not a terminal\npass --yes")
    return ask(f"upload {len(upload.files)} files? [y/N] ").strip().lower() in ("y", "yes")


def upload_files(upload: Upload) -> str:
    """Create the repository and upload the files that it does not have yet.

    Returns:
        URL of the model.

    Raises:
        SkipwiseError: not logged in, no write access, a model card that the Hub rejects, or a
            failed connection.
    """
    api = HfApi()
    try:
        api.whoami()
    except Exception as error:
        raise SkipwiseError(
            f"not logged in to the Hub ({first_line(error)})\nrun hf auth login, or set HF_TOKEN"
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
        raise SkipwiseError(f"the Hub rejects the model card: {first_line(error)}") from error
    except (HfHubHTTPError, OSError) as error:
        response = getattr(error, "response", None)
        if response is not None and response.status_code in (401, 403):
            raise SkipwiseError(
                f"your token has no write access to {upload.repo_id}\n"
                "create a token with write access: https://huggingface.co/settings/tokens"
            ) from error
        raise SkipwiseError(
            f"the upload to {upload.repo_id} failed: {first_line(error)}\n"
            "run the command again: uploaded files are not sent again"
        ) from error
    return str(url)


def _format_size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} GB"
