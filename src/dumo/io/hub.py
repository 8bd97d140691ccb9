"""Download files of Hugging Face Hub repositories, OWNER/NAME, into the usual cache.

A repository can be given instead of the path of a model, a data set or a run. When a run is opened, `pin` adds the
commit, OWNER/NAME@COMMIT, so a resumed run reads the same files. `fetch` downloads chosen files of a
repository and returns their folder; `load_dataset` prepares a data set by the package `datasets`. Both use the
cache if the Hub cannot be reached. The client of the Hub reads HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.

The configs of pipelines in PUBLISHED ship with dumo: `published_config` returns them.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import contextmanager, suppress
from functools import lru_cache
from glob import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from dumo.error import UserError
from dumo.io.read import user_path
from dumo.io.run_places import RUNS_FOLDER
from dumo.runtime import require, signals
from dumo.runtime.formatting import bytes_text
from dumo.runtime.progress import print_line

INDEX = "model_index.json"  # in the folder of a diffusers pipeline
CARD = "README.md"
TRANSFORMER = "transformer"
UNET = "unet"  # the model's component if it is a UNet
VAE = "vae"
SCHEDULER = "scheduler"
# The folder of the files NAME.json for PUBLISHED and SMALL. They have the pipeline's class and the configs of its
# components; `_readers` counts the parameters of all text encoders, `_optional_readers` of the optional ones.
_CONFIGS = files("dumo") / "encoders" / "published"
# The names of these files by repository.
PUBLISHED = {
    "stabilityai/stable-diffusion-3-medium-diffusers": "sd3-medium",
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "sana-1600m",
    "black-forest-labs/FLUX.1-dev": "flux-dev",
    "Qwen/Qwen-Image": "qwen-image",
    "Tongyi-MAI/Z-Image": "z-image",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": "pixart-sigma",
}
# Small models of dumo, for latents of CIFAR-10 and, in the case of sd3-digits, for digits.
SMALL = ("sd3-small", "sd3-digits", "unet-small")
SUFFIX = ".safetensors"

Kind = Literal["model", "dataset"]  # of a repository
Choose = Callable[[Collection[str]], Iterable[str]]  # all files of a repository → the files to download

_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([0-9a-f]{40}))?")  # OWNER/NAME or OWNER/NAME@COMMIT
# A name with one of these suffixes is a missing file.
_FILE_SUFFIXES = (".yaml", ".yml", ".json", ".parquet", ".tar", ".npz", ".bin", ".ckpt", SUFFIX)
# Above this size, a download must be confirmed on a terminal.
_MAX_BYTES = 5e9


@lru_cache
def published_config(source: str) -> dict[str, Any]:
    """Return the configs of one of PUBLISHED or SMALL."""
    return json.loads((_CONFIGS / f"{PUBLISHED.get(source, source)}.json").read_text(encoding="utf-8"))


def is_hub_name(text: str) -> bool:
    """Whether a text is OWNER/NAME, and neither a path here nor below a folder here. A name with a commit always is."""
    name = _HUB_NAME.fullmatch(text)
    owner = text.partition("/")[0]
    if name is None or text.endswith(_FILE_SUFFIXES) or owner == RUNS_FOLDER:
        return False
    return name[2] is not None or not os.path.lexists(owner)


def repository_of(name: str) -> str:
    """Return OWNER/NAME of a name with or without a commit."""
    return _split(name)[0]


def local_copy(name: str) -> Path | None:
    """Return the folder $DUMO_DATA/NAME, which is read in place of the data set OWNER/NAME if it exists."""
    data_folder = os.environ.get("DUMO_DATA")
    folder = Path(data_folder or "", name.partition("/")[2]).absolute()
    return folder if data_folder and folder.is_dir() else None


def pin(name: str, kind: Kind = "model") -> str:
    """Return OWNER/NAME@COMMIT with the latest commit on the Hub, or in the cache if the Hub cannot be reached.

    Returns the name unchanged if it has a commit, or if the commit is unknown; then `fetch` raises the Hub's error.
    """
    repository, commit = _split(name)
    with suppress(*_client_errors()):
        commit = commit or _newest_commit(repository, kind)
    return f"{repository}@{commit}" if commit else repository


def path_of(text: str, field: str, choose: Choose) -> Path:
    """Return the path that a field names, or the folder of what `choose` returns of a repository. Raises as both do."""
    return fetch(text, choose) if is_hub_name(text) else user_path(text, field)


def fetch(name: str, choose: Choose, kind: Kind = "model") -> Path:
    """Download the files of a repository that `choose` returns, and return the folder that holds them.

    Prints the repository, its commit and the size if something has to be downloaded. Without a connection the files
    are those in the cache, of which some may be missing. Raises the Hub's own errors.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache  # slow to import

    repository, commit = _split(name)
    commit = commit or _newest_commit(repository, kind)
    sizes = _file_sizes(repository, commit, kind)
    if sizes is None:
        return _find_snapshot(repository, commit, kind)
    chosen = [*choose(sizes)]
    missing_bytes = 0
    for file in chosen:
        if not isinstance(try_to_load_from_cache(repository, file, revision=commit, repo_type=kind), str):
            missing_bytes += sizes[file]
    _announce(repository, commit, missing_bytes)
    patterns = [escape(file) for file in chosen]
    with _quiet_client(missing_bytes == 0 or not sys.stderr.isatty()):
        return Path(snapshot_download(repository, repo_type=kind, revision=commit, allow_patterns=patterns))


@lru_cache
def load_dataset(name: str) -> Any:  # noqa: ANN401, a DatasetDict
    """Return all splits of a data set of the Hub, which `datasets` downloads and keeps as Arrow files.

    Raises UserError if `datasets` is not installed or the data set has several configurations, and the errors of the
    Hub and of `datasets`.
    """
    repository, commit = _split(name)
    commit = commit or _newest_commit(repository, "dataset")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    datasets = require("datasets", "datasets", f"the data set {repository}")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()

    # Open it without a connection if it was prepared before.
    prepared = _prepared_folder(repository, commit)
    if prepared is not None:
        from datasets.packaged_modules.cache.cache import Cache

        owner, _, dataset_name = prepared.parts[-4].partition("___")
        builder = Cache(
            cache_dir=str(prepared.parents[3]),
            dataset_name=dataset_name,
            repo_id=f"{owner}/{dataset_name}",
            config_name=prepared.parts[-3],
            version=prepared.parts[-2],
            hash=prepared.parts[-1],
        )
        return builder.as_dataset()

    # Download and prepare it.
    with _quiet_client(not sys.stderr.isatty()):
        try:
            builder = datasets.load_dataset_builder(repository, revision=commit)
        except ValueError as error:
            raise UserError(f"{repository}: {error}. Download it, and give its folder") from error
        sizes = _file_sizes(repository, commit, "dataset") or {}
        num_bytes = 0
        for urls in (builder.config.data_files or {}).values():
            num_bytes += sum(sizes.get(url.rpartition(f"@{commit}/")[2], 0) for url in urls)
        _announce(repository, commit, num_bytes)
        builder.download_and_prepare()
    return builder.as_dataset()


def is_prepared(name: str) -> bool:
    """Whether `load_dataset` can open the data set from the cache. Does not use the network."""
    from huggingface_hub import snapshot_download  # slow to import

    repository, commit = _split(name)
    if commit is None:
        with suppress(OSError), _quiet_client():
            snapshot = snapshot_download(repository, repo_type="dataset", local_files_only=True, allow_patterns=CARD)
            commit = Path(snapshot).name
    return _prepared_folder(repository, commit) is not None


def _prepared_folder(repository: str, commit: str | None) -> Path | None:
    """Return the folder of Arrow files that `datasets` has prepared for a commit; None unless there is exactly one."""
    from huggingface_hub import constants  # slow to import

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or f"{constants.HF_HOME}/datasets").expanduser()
    if commit is None:
        return None
    owner = repository.partition("/")[0]
    # OWNER___NAME/CONFIGURATION/VERSION/COMMIT
    folders = [file.parent for file in cache.glob(f"{owner}___*/*/*/{commit}/dataset_info.json")]
    return folders[0] if len(folders) == 1 else None


def _split(name: str) -> tuple[str, str | None]:
    """Return the repository and the commit of a name."""
    repository, _, commit = name.partition("@")
    return repository, commit or None


def _newest_commit(repository: str, kind: Kind) -> str:
    """Return the commit of a repository's main branch, or the one in the cache if the Hub cannot be reached.

    Raises the Hub's error if neither is known.
    """
    # The client records the commit of the main branch in the cache.
    return _find_snapshot(repository, None, kind).name


@lru_cache
def _find_snapshot(repository: str, commit: str | None, kind: Kind) -> Path:
    """Return the folder of a commit in the cache, downloading only its model card.

    If the Hub cannot be reached, the folder must exist; otherwise raises the Hub's error.
    """
    from huggingface_hub import snapshot_download  # slow to import

    with _quiet_client():
        return Path(snapshot_download(repository, repo_type=kind, revision=commit, allow_patterns=CARD))


@lru_cache
def _file_sizes(repository: str, commit: str, kind: Kind) -> dict[str, int] | None:
    """Return the files of a commit with their sizes in bytes, or None if unknown."""
    from huggingface_hub import HfApi  # slow to import

    api = HfApi()
    describe = api.dataset_info if kind == "dataset" else api.model_info
    try:
        info = describe(repository, revision=commit, files_metadata=True)
    except _client_errors():
        return None
    return {file.rfilename: file.size or 0 for file in info.siblings or []}


def _announce(repository: str, commit: str | None, num_bytes: int) -> None:
    """Print the download, and confirm a large one on a terminal. Raises UserError if the answer is no."""
    if num_bytes == 0:
        return
    print_line(f"downloading {repository} at {commit}: {bytes_text(num_bytes)}")
    if num_bytes <= _MAX_BYTES or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    with signals.default_handlers():  # Ctrl-C ends it there
        print("download? [y/N] ", end="", file=sys.stderr, flush=True)
        answer = sys.stdin.readline()
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError(f"{repository} was not downloaded")


@contextmanager
def _quiet_client(yes: bool = True) -> Generator[None]:
    """Disable the progress bars and warnings of the Hub's client inside the block."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    verbosity = logging.get_verbosity()
    had_bars = not are_progress_bars_disabled()
    if yes:
        logging.set_verbosity_error()
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if yes and had_bars:
            enable_progress_bars()


def _client_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of the Hub's client: its own errors, which are OSErrors, and its HTTP library's."""
    from huggingface_hub.errors import HfHubHTTPError  # slow to import

    return OSError, HfHubHTTPError.__bases__[0]
