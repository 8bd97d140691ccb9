"""Upload an export to the Hugging Face Hub with huggingface_hub, which reads the token from the environment."""

from pathlib import Path

from huggingface_hub import HfApi

from dumo.types import UserError


def require_uploadable(repository: str, parts: str) -> None:
    """Check the login on the Hub, so that a missing token or network is found before the export.

    Raises UserError for a repository without an owner, because the card has the full name, and for linked components,
    which the client skips silently. Raises the Hub's errors.
    """
    if repository.count("/") != 1:
        raise UserError(f"--push {repository}: the repository must include the owner, OWNER/NAME")
    if parts == "link":
        raise UserError("--push cannot upload linked components: use --parts copy or --parts none")
    HfApi().whoami()


def push(export: Path, repository: str) -> str:
    """Upload a folder or a file, and return its URL. A new repository is private. Raises the Hub's errors."""
    api = HfApi()
    message = f"Upload {export.name}"
    address = api.create_repo(repository, private=True, exist_ok=True)
    if export.is_dir():
        api.upload_folder(repo_id=repository, folder_path=export, commit_message=message)
    else:
        api.upload_file(repo_id=repository, path_or_fileobj=export, path_in_repo=export.name, commit_message=message)
    return str(address)
