"""An export on the Hugging Face Hub, by its own client, which reads token and address from the environment.

`require_uploadable` refuses an upload that must fail, before anything is written. `push` uploads what was written.
"""

from pathlib import Path

from dumo.io.read import brief
from dumo.runtime import install_command, shell_path
from dumo.runtime.door import option
from dumo.types import UserError


def require_uploadable(repository: str, parts: str) -> None:
    """Raise UserError for an upload that must fail, before anything is written and any server asked."""
    try:
        from huggingface_hub import constants, get_token  # slow to import, and of an extra
        from huggingface_hub.utils import validate_repo_id
    except ImportError as error:
        raise UserError(
            f"{option('push')} needs the client of the hub: {install_command('huggingface_hub')}"
        ) from error
    try:
        validate_repo_id(repository)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{option('push', brief(repository))} is no OWNER/NAME ({reason})") from error
    if "/" not in repository:
        raise UserError(f"{option('push', brief(repository))} is no OWNER/NAME")
    if parts == "link":
        raise UserError(f"{option('push')} takes the parts themselves: {option('parts', 'copy')}, or none")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{option('push')} needs the network, and HF_HUB_OFFLINE forbids it: unset it")
    if get_token() is None:
        raise UserError(f"{option('push')} needs a token of the hub that may write: hf auth login, or set HF_TOKEN")


def push(export: Path, repository: str) -> str:
    """Upload a folder, or a file; returns the address. A repository that is new is private.

    Raises UserError where the hub or the network refuses; the export stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    message = f"Upload {export.name}"
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        if export.is_dir():
            api.upload_folder(repo_id=repository, folder_path=export, commit_message=message)
        else:
            api.upload_file(
                repo_id=repository, path_or_fileobj=export, path_in_repo=export.name, commit_message=message
            )
    except Exception as error:  # of the client, of one of two clients of HTTP, or of its uploader in Rust
        cause: BaseException = error
        if type(error) is RuntimeError and error.__cause__:  # it says only what file it was
            cause = error.__cause__
        reason = brief(" ".join(str(cause).split()), 400).rstrip(".")
        raise UserError(
            f"{export} is whole, and was not uploaded: {reason}. To try again: "
            f"hf upload --private {repository} {shell_path(export)}"
        ) from error
    return str(address)
