"""Memory of the model's weights in each rank, whole or with blocks that are fetched."""

from dataclasses import replace

import torch

from gradproj.formatting import human_bytes
from gradproj.job.plan import Plan
from gradproj.model.block_shards import PlacedBytes, placed_bytes
from gradproj.model.config import MODEL_DTYPES
from gradproj.model.loading import loads_one_by_one, model_skeleton


def weights_lines(plan: Plan, whole: int) -> list[str]:
    """Return the line of a rank's weights if blocks are fetched, beside that of whole ones.

    ``whole``, here and below, are the bytes of the whole model, of which some may stay packed.
    """
    if (placed := _placed(plan, whole)) is None:
        return []
    job = plan.config.job
    parts = f"1/{job.ranks_per_model} of the blocks"
    held = f"{parts} {human_bytes(placed.share)}, " if not job.offload else ""
    away = f"; {human_bytes(placed.share)} of blocks in the host's memory" if job.offload else ""
    return [
        f"weights       {human_bytes(_on_device(plan, placed))} a rank in place of "
        f"{human_bytes(placed.whole)}: {held}two blocks {human_bytes(placed.buffers)}, the rest "
        f"{human_bytes(placed.rest)}{away}"
    ]


def host_weight_bytes(plan: Plan, device: torch.device, whole: int) -> int:
    """Return the bytes of weights in a rank's host memory; on a GPU, those in transit or kept."""
    if (placed := _placed(plan, whole)) is None:
        return whole
    if device.type == "cpu":
        kept, held = placed.share, placed.rest + placed.share + placed.buffers
    else:
        kept = placed.pinned if plan.config.job.offload else 0
        held = placed.rest + kept
    return held if loads_one_by_one(plan.files) else max(held, whole + kept)


def gpu_weight_bytes(plan: Plan, whole: int) -> int:
    """Return the bytes of weights on a rank's GPU."""
    placed = _placed(plan, whole)
    return whole if placed is None else _on_device(plan, placed)


def _placed(plan: Plan, whole: int) -> PlacedBytes | None:
    job = plan.config.job
    if job.ranks_per_model == 1 and not job.offload:
        return None
    skeleton = model_skeleton(plan.files).to(MODEL_DTYPES[plan.config.model.model_dtype])
    placed = placed_bytes(skeleton, job.ranks_per_model)
    # Layers that stay packed are those of blocks.
    packed = max(0.0, min(1.0, (whole - placed.rest) / max(1, placed.whole - placed.rest)))
    scaled = ("share", "pinned", "buffers")
    sizes = {name: int(packed * getattr(placed, name)) for name in scaled}
    return replace(placed, whole=whole, **sizes)


def _on_device(plan: Plan, placed: PlacedBytes) -> int:
    return placed.rest + placed.buffers + (0 if plan.config.job.offload else placed.share)
