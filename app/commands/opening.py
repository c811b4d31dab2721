"""`lora-lab spectra` and `audit` of what is no PEFT folder: single files, zips, whole checkpoints beside their base."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.commands.output import say
from lora_core.errors import UserError

if TYPE_CHECKING:
    from lora_core.foreign import Opened
    from lora_core.spectra import Spectrum


def foreign(path: Path) -> bool:
    """Whether it takes more than the reader of PEFT's folders."""
    from lora_core.peft_format import CONFIG

    return path.is_file() or path.is_dir() and not (path / CONFIG).is_file() and any(path.glob("*.safetensors"))


@contextmanager
def opened(path: Path, base: str | None) -> Iterator[tuple[Opened, dict[str, Spectrum]]]:
    """(what is there, the spectra of it); its remarks go to standard error. A zip is unpacked for so long."""
    from tqdm import tqdm

    from lora_core.foreign import open_any
    from lora_core.spectra import spectra

    with tempfile.TemporaryDirectory(prefix="lora-lab-") as scratch:
        found = open_any(path, base=base, scratch=scratch)
        for remark in found.remarks:
            say(remark)
        if found.difference is None:
            assert found.stored is not None
            yield found, spectra(found.stored)
        else:
            d = found.difference
            say(f"the difference to {found.base}, matrix by matrix")
            yield found, dict(tqdm(d.spectra(), total=len(d), unit=" matrices", disable=len(d) < 30))


def beside(found: Opened, base: str) -> list[dict[str, Any]]:
    """For each matrix ‖W0‖_F, ‖ΔW‖_F/‖W0‖_F and the amplification, from the base model's files."""
    import numpy as np

    from lora_core.base_files import BaseFiles, folder_here
    from lora_core.beside import beside as of
    from lora_core.beside import svd

    folder = folder_here(base)
    if folder is None:
        raise UserError(f"the base model '{base}' is not on this machine; give its folder, or a name of those here")
    files, rows = BaseFiles(folder), []
    assert found.stored is not None
    for site in found.stored.sites.values():
        W0 = files.W0(site)
        b = of(*svd(site.B, site.A, site.scaling), W0, np.zeros(0))
        rows.append({"base_norm": b.base_norm, "relative_norm": b.norm / b.base_norm, "amplification": b.amplification})
    return rows


def about(found: Opened) -> dict[str, Any]:
    """What a script is told beside the matrices."""
    return {"kind": found.kind, "model": found.base, "metadata": found.metadata, "remarks": list(found.remarks)}
