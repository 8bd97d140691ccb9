"""An export on the Hugging Face Hub, by its own client, which reads token and address from the environment."""

from pathlib import Path

from dumo.io.read import brief
from dumo.runtime import install, typed
from dumo.types import UserError


def require(repository: str, parts: str) -> None:
    """Raise UserError for an upload that cannot be: what is known before anything is written and any server asked."""
    try:
        from huggingface_hub import constants, get_token  # slow to import, and of an extra
        from huggingface_hub.utils import validate_repo_id
    except ImportError as error:
        raise UserError(f"--push needs the client of the hub: {install('huggingface_hub')}") from error
    why = ""
    try:
        validate_repo_id(repository)
    except ValueError as error:
        why = " ".join(str(error).split())
    if why or "/" not in repository:
        why = f"--push {brief(repository)} is no OWNER/NAME{why and f' ({why})'}"
    elif parts == "link":
        why = "--push takes the parts themselves: --parts copy, or none"
    elif constants.HF_HUB_OFFLINE:
        why = "--push needs the network, and HF_HUB_OFFLINE forbids it: unset it"
    elif get_token() is None:
        why = "--push needs a token of the hub that may write: hf auth login, or set HF_TOKEN"
    if why:
        raise UserError(why)


def push(export: Path, repository: str) -> str:
    """Upload a folder, or a file; returns the address. A repository that is new is private.

    Raises UserError where the hub or the network refuses; the export stays as it is.
    """
    from huggingface_hub import HfApi

    api, message = HfApi(), f"Upload {export.name}"
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        if export.is_dir():
            api.upload_folder(repo_id=repository, folder_path=export, commit_message=message)
        else:
            api.upload_file(
                repo_id=repository, path_or_fileobj=export, path_in_repo=export.name, commit_message=message
            )
    except Exception as error:  # of the client, of one of two clients of HTTP, or of its uploader in Rust
        cause = error.__cause__ or error if type(error) is RuntimeError else error  # which says what file it was, alone
        why = brief(" ".join(str(cause).split()), 400).rstrip(".")
        raise UserError(
            f"{export} is whole, and was not uploaded: {why}. To try again: "
            f"hf upload --private {repository} {typed(export)}"
        ) from error
    return str(address)
