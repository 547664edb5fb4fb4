"""Models of the hub by their id, `org/name` or `org/name@revision`: only the needed files, cached for offline use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tinyfusion.core.errors import UserError
from tinyfusion.core.fetching import WouldFetch, fetching_forbidden
from tinyfusion.core.reading import license_in, read_json_object

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?")
_FACTS = (
    "model_index.json", "config.json", "model.json", "README.md", "transformer/config.json", "vae/config.json",
    "scheduler/scheduler_config.json",
)  # fmt: skip
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"  # name of the weights in a folder of diffusers
_TIMEOUT_S = 5.0  # of requests for a size


def fetch_repository(name: str) -> tuple[Path, dict[str, str]]:
    """The folder of a model of the hub, fetched if not cached, and its id, revision, licence and autoencoder.

    Raises UserError if there is no such model or the hub cannot be reached; WouldFetch if it is not cached in a dry run.
    """
    repository, _, revision = name.partition("@")
    folder = _snapshot(repository, revision, _FACTS)
    inside = "transformer/" if (folder / "transformer" / "config.json").is_file() else ""
    if (folder / "model.json").is_file():
        folder = _snapshot(repository, revision, (*_FACTS, "model.safetensors"))
        _check_there(repository, revision, folder / "model.safetensors")
    else:
        folder = _with_weights(repository, revision, inside)
    known = {"hub": repository, "revision": folder.name}
    if license := license_in(folder / "README.md"):
        known["license"] = license
    if inside and (folder / "vae" / "config.json").is_file():
        known["vae"] = name  # the pipeline's own; see `autoencoder_folder`
    return folder, known


def fetch_pipeline(name: str) -> Path:
    """The folder of a whole pipeline of the hub, with all its components; fetched where needed, errors as of `fetch_repository`."""
    repository, _, revision = name.partition("@")
    index = _snapshot(repository, revision, ("model_index.json",)) / "model_index.json"
    if not index.is_file():
        raise UserError(f"{name} is no pipeline of diffusers: it has no model_index.json")
    parts = [part for part, value in read_json_object(index).items() if isinstance(value, list)]
    kinds = ("json", "safetensors", "txt", "model", "jinja")
    files = [f"{part}/*.{kind}" for part in parts for kind in kinds]
    return _snapshot(repository, revision, ("model_index.json", "README.md", *files))


def transformers_folder(name: str, what: str) -> Path:
    """The folder of a model of transformers by path or hub id, with its safetensors, configurations and tokenizer; fetched if needed.

    what: a noun phrase for messages. Raises UserError if there is none; WouldFetch if it is not cached in a dry run.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(name) or folder.parent.exists():
        raise UserError(f"no {what.partition(' ')[2]} at {name}: no such folder, and it is no hub id")
    repository, _, revision = name.partition("@")
    wanted = ("*.json", "merges.txt", "vocab.txt", "model.safetensors", "model-*-of-*.safetensors")
    folder = _snapshot(repository, revision, wanted)
    if not any(folder.glob("model*.safetensors")):
        _check_there(repository, revision, folder / "model.safetensors")
    return folder


def autoencoder_folder(name: str) -> Path:
    """The folder of an `AutoencoderKL` of diffusers by path or hub id, alone or as `vae/` of a pipeline; fetched if needed.

    Raises UserError if there is none, or it has no weights.
    """
    folder = Path(name)
    if folder.is_dir():
        folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    elif HUB_ID.fullmatch(name) and not folder.parent.exists():
        repository, _, revision = name.partition("@")
        folder = _snapshot(repository, revision, ("config.json", "vae/config.json", "model_index.json"))
        inside = "vae/" if (folder / "vae" / "config.json").is_file() else ""
        folder = _with_weights(repository, revision, inside) / inside
    else:
        raise UserError(f"no autoencoder at {name}: no such folder, and it is no hub id")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no autoencoder: wanted config.json and weights, as diffusers saves them")
    if not any(folder.glob(f"{DIFFUSERS_WEIGHTS}*")):
        raise UserError(f"{folder} holds no weights: wanted {DIFFUSERS_WEIGHTS}.safetensors or .bin")
    return folder


def _with_weights(repository: str, revision: str, inside: str) -> Path:
    """The folder with its weights: safetensors, or else a torch file."""
    stem = f"{inside}{DIFFUSERS_WEIGHTS}"
    folder = Path()
    for suffix in ("safetensors", "bin"):
        wanted = (f"{stem}.{suffix}", f"{stem}-*-of-*.{suffix}", f"{stem}.{suffix}.index.json")
        folder = _snapshot(repository, revision, (*_FACTS, *wanted))
        if any((folder / inside).glob(f"{DIFFUSERS_WEIGHTS}*.{suffix}")):
            return folder
    _check_there(repository, revision, folder / f"{stem}.safetensors")
    return folder


def _check_there(repository: str, revision: str, file: Path) -> None:
    """Raise WouldFetch if a file is not cached in a dry run."""
    if fetching_forbidden() and not file.is_file():
        raise WouldFetch(_described(repository, revision), _size_of(repository, revision))


def _described(repository: str, revision: str) -> str:
    return f"{repository}{f' at revision {revision}' if revision else ''} from the hub"


def _size_of(repository: str, revision: str) -> int | None:
    """Bytes of all weights of a repository, an upper limit; None if the hub does not answer."""
    from huggingface_hub import HfApi  # late: only hub ids need it

    try:
        info = HfApi().model_info(repository, revision=revision or None, files_metadata=True, timeout=_TIMEOUT_S)
    except Exception:  # its client raises errors of several libraries; only a size is lost
        return None
    sizes = [file.size for file in info.siblings or () if file.rfilename.endswith(".safetensors") and file.size]
    return sum(sizes) or None


def _snapshot(repository: str, revision: str, files: Sequence[str]) -> Path:
    """The cached folder of a repository, with those of `files` that exist."""
    from huggingface_hub import errors, snapshot_download  # late: only hub ids need it

    where = f"{repository} at revision {revision}" if revision else repository
    cached = fetching_forbidden()
    try:
        patterns = list(files)
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=patterns, local_files_only=cached)
        )
    except errors.LocalEntryNotFoundError as error:
        if cached:
            raise WouldFetch(_described(repository, revision), _size_of(repository, revision)) from error
        raise _unreachable(where, error) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"the hub has no revision {revision!r} of {repository}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"no model at {repository}: no such file or folder, and the hub has none of that id that may be read without "
            "logging in"
        ) from error
    except Exception as error:  # its client raises errors of several libraries without a network
        raise _unreachable(where, error) from error


def _unreachable(where: str, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0].strip() or type(error).__name__
    return UserError(
        f"no model at {where}: no such file or folder, nothing of it is in the cache, and the hub cannot be reached ({reason})"
    )


def upload_folder(folder: Path, repository: str) -> str:
    """Upload all files of a folder to a repository of the hub, created if needed; return its address.

    Raises UserError if the hub refuses, such as without a login.
    """
    from huggingface_hub import HfApi  # late: only uploads need it

    try:
        api = HfApi()
        address = str(api.create_repo(repository, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by tinyfusion")
    except Exception as error:  # its client raises errors of several libraries
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{folder} was written, and the hub did not take it as {repository}: {reason} (`hf auth login` makes you known to it)"
        ) from error
    return address
