"""Idefics2-8B, second pretraining stage: images of up to 980 pixels, and pages of scanned text among the data.

    python -m idefics_jax.train --config configs/idefics2_8b/stage2.py --workdir work/idefics2_8b/stage2

What is not said here is as in stage1.py, and so are the words for where a value comes from.
"""

from ml_collections import ConfigDict

from configs.idefics2_8b import stage1

SHARES = {"obelics": 0.45, "pairs": 0.35, "pdf": 0.20}  # paper
POSITIONS = 70  # 980 pixels in patches of 14 (paper; code)

# As in stage 1. v4 and v5p have room for a base in float32; in bfloat16 what stage 1 added to it is rounded.
ROOM = {
    "v4": {"remat": "linear", "vision_remat": "full", "rows_a_device": 1, "frozen_dtype": "float32"},
    "v5e": {"remat": "full", "vision_remat": "full", "rows_a_device": 1},
    "v5p": {"remat": "linear", "vision_remat": "linear", "rows_a_device": 1, "frozen_dtype": "float32"},
}


def get_config(chip: str = "") -> ConfigDict:
    config = stage1.get_config()
    config.steps = (
        9000  # ours: 225 B text tokens at 2.5 M a batch (paper) are 90,000 steps, of which stage 1 took 80,000
    )
    config.init_from = f"{stage1.WORKDIR}/stage1"
    config.init_parts = ConfigDict()
    config.image_rules = image_rules()
    config.model = stage1.model(positions_a_side=POSITIONS, vocab_size=32_002)
    config.frozen_dtype = "bfloat16"  # ours: what every slice has room for; it is read alone
    config.resize_positions = True  # paper: interpolated; code: bicubic, from 27 x 27, at the start of this stage
    config.grow_vocabulary = "none"
    config.init_std = ()
    config.optimizer.warmup_steps = 200  # ours: the moments start anew
    # Random up-scaling (paper); chance and largest factor as the operation's defaults in the code.
    augmentation = {"upscale": 0.7, "upscale_to": 3.0}
    config.data.stages = {"stage2": {"sources": stage1.sources(SHARES, augmentation=augmentation), "documents": None}}
    config.data.after = f"{stage1.WORKDIR}/stage1"  # ours: pages and pairs that stage 1 has not seen come first
    # Ours: vision rows for an image of 980 x 980 pixels and a small one, as many as benchmarks.packing finds full.
    config.data.shape.update({"vision_rows": 9, "patches": 7680, "images": 32})
    return stage1.fit(config, chip, ROOM)


def image_rules() -> dict[str, int | bool | str]:
    """From 378 pixels (code) to 980 (paper), at the image's own aspect ratio."""
    return {
        "longest_edge": 980,
        "shortest_edge": 378,
        "positions_per_side": POSITIONS,
        "split": False,  # as in stage 1
        "resizer": stage1.RESIZER,
    }
