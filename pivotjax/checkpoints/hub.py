"""Where a checkpoint is: a local path, `hf://OWNER/NAME` on the Hugging Face hub, or `gs://BUCKET/PATH`."""

import re
from pathlib import Path

from etils import epath

from pivotjax.errors import InputError
from pivotjax.progress import say

_HUB, _BUCKET = "hf://", "gs://"
_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Weights in formats that are not read, and other copies of them.
_NOT_WANTED = ("*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "*.pth", "*.tflite", "original/*", "onnx/*", "*/*.bin")
_PICKLES = ("*.bin", "*.pt")


def located(where: str, download: bool = False, revision: str | None = None) -> Path | epath.Path:
    """The path of a checkpoint; one of the hub is downloaded (or gone on with) into the hub's own cache.

    Args:
        where: a path, `hf://OWNER/NAME`, `gs://BUCKET/PATH`; with `download` also `OWNER/NAME` if no such path exists.
        download: fetch what is no local path.
        revision: branch, tag or commit.

    Raises:
        InputError: there is no such repository, it cannot be reached, or the name is wrong.
    """
    name = where.removeprefix(_HUB)
    asked = where.startswith(_HUB) or (download and not Path(where).exists())
    if not asked:
        if revision is not None:
            raise InputError(f"--revision {revision} goes with a model of the hub (hf://OWNER/NAME), not with {where}")
        return path_of(where)
    if not _ID.fullmatch(name):
        raise InputError(f"{where} is neither a path that exists nor a name on the hub; write hf://OWNER/NAME")
    return _downloaded(name, revision)


def path_of(where: str) -> Path | epath.Path:
    """A local path, or one in a bucket."""
    return epath.Path(where) if where.startswith(_BUCKET) else Path(where)


def _downloaded(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    say(f"downloading {name} from the Hugging Face hub (what is there already is kept)")
    try:
        unwanted = [*_NOT_WANTED, *(_PICKLES if _has_safetensors(name, revision) else ())]
        return Path(huggingface_hub.snapshot_download(name, revision=revision, ignore_patterns=unwanted))
    except errors.GatedRepoError as error:
        raise InputError(f"{name} is gated: accept its terms on the hub, and log in with `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        at = f" at revision {revision}" if revision else ""
        raise InputError(f"the Hugging Face hub has no model {name}{at}, or it is private; check the name") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot download {name}: {reason}; the same command goes on where this ended") from error


def _has_safetensors(name: str, revision: str | None) -> bool:
    """Whether the pickles beside them are not needed."""
    import huggingface_hub

    try:
        found = huggingface_hub.list_repo_files(name, revision=revision)
    except huggingface_hub.errors.HfHubHTTPError:
        raise
    except Exception:  # whatever its HTTP library raises without a connection: what is in the cache must be enough
        return True
    return any(file.endswith(".safetensors") and "/" not in file for file in found)
