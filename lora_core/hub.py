"""Models from the Hugging Face hub: from its cache on this machine where they are there, else over the network.

Only weights in safetensors are taken (a pickle runs code when it is read), and nothing is asked of the hub when the
model is already here. Telemetry is off. No torch here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_core.errors import UserError
from lora_core.home import read_json, writing

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}$")
WANTED = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
          "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
          "*.jinja")  # fmt: skip
TIMEOUT_S = 8.0  # for the first answer of the hub; a machine without network should hear so within seconds
CONVERTED_BY, CONVERTED = "SFconvertbot", "Adding `safetensors` variant of this model"


def cached_folder(hub_id: str) -> Path | None:
    """The folder of a hub model that is whole on this machine, or None. Never asks the network."""
    from huggingface_hub import try_to_load_from_cache

    for revision in (None, *_converted_revisions(hub_id)):
        with suppress(ValueError, OSError):  # not a name that the hub could have
            config = try_to_load_from_cache(hub_id, "config.json", revision=revision)
            if isinstance(config, str) and missing_weights(Path(config).parent) is None:
                return Path(config).parent
    return None


def missing_weights(folder: Path) -> str | None:
    """What keeps the weights in a model folder from being read, or None when its safetensors files are all there."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        value = read_json(index, limit=64 << 20)
        names = value.get("weight_map") if isinstance(value, dict) else None
        if not isinstance(names, dict):
            return f"{index.name} cannot be read"
        absent = sorted({str(n) for n in names.values() if not (folder / Path(str(n)).name).exists()})
        return f"{absent[0]} is missing" if absent else None
    if (folder / "model.safetensors").exists():
        return None
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    if pickles:
        return f"it has its weights only as a pickle ({pickles[0]}), which can run code; safetensors are needed"
    return "there is no model.safetensors in it"


def download(hub_id: str, here: Iterable[str]) -> Path:
    """The folder of a hub model, fetched where it is not here yet.

    hub_id  "owner/name"
    here    the names that can be loaded without network, for the error's sentence

    Raises UserError: no network, no such model, one that needs permission, one without safetensors.
    """
    if folder := cached_folder(hub_id):
        return folder
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    local = f"possible without it: {' '.join(here)}, or a local folder"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"model '{hub_id}' is not on this machine, and HF_HUB_OFFLINE forbids to fetch it; {local}")
    try:
        api = HfApi()
        info = api.model_info(hub_id, timeout=TIMEOUT_S)
        names = [s.rfilename for s in info.siblings or []]
        revision = info.sha
        if not any(n.endswith(".safetensors") and "/" not in n for n in names):
            revision = _converted(api, hub_id)
            if revision is None:
                pickled = f"model '{hub_id}' has only pickles on the hub, which can run code; safetensors are needed"
                raise UserError(f"{pickled}; {local}")
        with writing(constants.HF_HUB_CACHE):
            return Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*WANTED], etag_timeout=TIMEOUT_S))
    except errors.GatedRepoError as error:
        raise UserError(f"model '{hub_id}' needs permission on the hub: ask there, then `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(f"the hub has no model '{hub_id}', or not for you; {local}") from error
    except UserError:
        raise
    except Exception as error:
        if not _is_network(error):
            raise
        gone = f"model '{hub_id}' is not on this machine, and the hub cannot be reached from here"
        raise UserError(f"{gone}; {local}") from error


def _converted(api: Any, hub_id: str) -> str | None:
    """The pull request in which the hub's own bot put safetensors beside a pickle (opt-125m has only that), or None."""
    for talk in api.get_repo_discussions(hub_id, author=CONVERTED_BY, discussion_type="pull_request"):
        if talk.title == CONVERTED and talk.author == CONVERTED_BY and talk.status in ("open", "draft"):
            return f"refs/pr/{talk.num}"
    return None


def _converted_revisions(hub_id: str) -> list[str]:
    """Such pull requests that are in the cache already."""
    from huggingface_hub import constants

    refs = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}" / "refs" / "refs" / "pr"
    return [f"refs/pr/{p.name}" for p in sorted(refs.glob("*")) if p.name.isdigit()]


def _is_network(error: BaseException) -> bool:
    """Whether an error means that the hub was not reached or gave no answer, rather than a fault of ours."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    hub = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)
    return isinstance(error, (*hub, httpx.HTTPError, ConnectionError, TimeoutError))
