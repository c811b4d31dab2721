"""The frozen matrices of a model that is on this machine, out of its files: no torch, no model loaded, no network.

    base = BaseFiles(folder_here("smollm2-135m"))
    base.W0(stored.sites["model.layers.3.self_attn.q_proj"])      # (out, in), one tensor read
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from lora_core.errors import UserError
from lora_core.stored import StoredSite
from lora_core.weights import Weights

CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # stored (in, out) in the whole family
CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
KEPT = 700  # matrices whose singular values are kept: some hundred numbers each


class BaseFiles:
    """The files of a model in transformers' format: config.json and safetensors."""

    def __init__(self, folder: str | Path) -> None:
        from lora_core.home import read_json

        self.folder = Path(folder)
        config = read_json(self.folder / "config.json")
        if not isinstance(config, dict):
            raise UserError(f"{self.folder} has no config.json that can be read, so it is no model")
        self.config: dict[str, Any] = config
        self.weights = Weights(self.folder)
        self.kind = str(config.get("model_type", ""))
        self._sigma: OrderedDict[str, np.ndarray] = OrderedDict()

    def find(self, name: str) -> str | None:
        """The tensor of that name; models are stored with and without the name of their body in front."""
        if name in self.weights:
            return name
        rest = name.partition(".")[2]
        if rest and rest in self.weights:
            return rest
        longer = [n for n in self.weights if n.endswith(f".{name}")]
        return longer[0] if len(longer) == 1 else None

    def W0(self, site: StoredSite) -> np.ndarray:
        """The matrix (out, in) of a stored site. UserError where the model has none there, or another shape."""
        name = self.find(f"{site.path}.{site.param}")
        if name is None:
            raise UserError(f"{self.folder.name} has no matrix at {site.path}: the adapter was made for another model")
        W = self.weights.read(name)
        if site.expert is not None and W.ndim == 3:
            W = W[site.expert]
        if W.ndim == 2 and self.turned(site):
            W = W.T
        if W.ndim == 2 and site.layout is not None and site.layout.full == W.shape[0]:
            W = W[site.layout.rows()]
        shape = (site.B.shape[0], site.A.shape[1])
        if W.shape != shape:
            raise UserError(f"{site.path} is {'×'.join(map(str, W.shape))} in {self.folder.name}, and the update"
                            f" {shape[0]}×{shape[1]}: the adapter was made for another model")  # fmt: skip
        return np.ascontiguousarray(W)

    def turned(self, site: StoredSite) -> bool:
        """Whether the weight is stored (in, out)."""
        return site.lookup or self.kind in CONV1D and site.path.rpartition(".")[2] in CONV1D_NAMES

    def sigma(self, site: StoredSite, W0: np.ndarray | None = None) -> np.ndarray:
        """The singular values of W0, largest first; kept, since every adapter of a model asks for the same."""
        if site.key not in self._sigma:
            self._sigma[site.key] = np.linalg.svd(self.W0(site) if W0 is None else W0, compute_uv=False)
            while len(self._sigma) > KEPT:
                self._sigma.popitem(last=False)
        return self._sigma[site.key]


def folder_here(name: str | None) -> Path | None:
    """The folder of a model that is on this machine by its name, folder or hub id, else None. Fetches nothing."""
    from lora_core import embedded, hub
    from lora_core.models import registry

    if not name:
        return None
    for entry in registry():
        if name.casefold() in (entry.name, (entry.hub_id or "").casefold()):
            if entry.source == "embedded":
                return embedded.folder_of(entry.name) if entry.cached else None
            return hub.cached_folder(entry.hub_id or "")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder if (folder / "config.json").is_file() and hub.missing_weights(folder) is None else None
    return hub.cached_folder(name) if hub.HUB_ID.match(name) else None
