"""prepare.json, the record that `haste prepare` leaves beside its data, and what training takes from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from haste.data.archive import Archive
from haste.errors import BadFile, UserError
from haste.io import parse_json
from haste.vae import PUBLISHED_VAES, SD_LATENTS, LatentFormat

RECORD = "prepare.json"

# Of MS-COCO's public features, which have no record.
COCO_LATENTS = replace(SD_LATENTS, vae=PUBLISHED_VAES["ema"])


def read_record(root: Archive) -> dict[str, Any]:
    """The content of prepare.json; empty if there is none. Raises UserError if it cannot be read."""
    if not root.has(RECORD):
        return {}
    try:
        data = root.read(RECORD)
    except BadFile as fault:
        raise UserError(f"{fault}; it must be the record of haste prepare") from fault
    return parse_json(data, root.locate(RECORD), "the record of haste prepare", needs=["latents"])


def latent_format(
    record: dict[str, Any], where: str, vae: str | None, vae_stats: str | None, default: LatentFormat = SD_LATENTS
) -> LatentFormat:
    """The format of --vae, else the recorded one, else `default`. Raises UserError if --vae has other latents."""
    values = record.get("latents")
    recorded = None if values is None else LatentFormat.from_dict(values, f"latents in {where}")
    latents = LatentFormat.of(vae) if vae is not None else recorded or default
    if recorded is not None and (recorded.channels, recorded.factor) != (latents.channels, latents.factor):
        raise UserError(f"--vae must have the latents of {recorded.vae}, as in {where}, got {vae}")
    return latents if vae_stats is None else latents.with_statistics(vae_stats)
