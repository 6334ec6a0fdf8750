"""Idefics2-8B, chatty: a few hundred steps on dialogues with long answers, after instruction tuning.

    python -m idefics_jax.train --config configs/idefics2_8b/chat.py --workdir work/idefics2_8b/chat

What is not said here is as in instruct.py; the words for where a value comes from are in stage1.py.
"""

from ml_collections import ConfigDict

from configs.idefics2_8b import instruct, stage1


def get_config(chip: str = "") -> ConfigDict:
    config = instruct.get_config(chip)
    config.steps = 300  # paper: a few hundred, with a large batch
    config.init_from = f"{stage1.WORKDIR}/instruct"
    config.grow_vocabulary = "none"
    # Of this stage the paper tells no rate or schedule; ours: those of the instruction tuning, 1e-4 and linear.
    config.optimizer.warmup_steps = 30  # ours
    # Ours: answers are long, so a row has room for fewer patches; as many as benchmarks.packing finds full.
    config.data.shape.update({"vision_rows": 6, "patches": 7168})
    config.data.stages = {"chat": {"sources": sources(), "documents": None}}
    return config


def sources() -> dict[str, dict]:
    """LLaVA-Conv and ShareGPT4V (paper), in The Cauldron's schema, by their sizes (ours)."""
    conversations = {"llava_conv": 58_000, "sharegpt4v": 102_000}
    return {
        name: {
            "kind": "cauldron",
            "paths": (f"{stage1.DATA}/{name}",),
            "weight": float(count),
            "image_root": None,
            "augmentation": instruct.augmentation(shuffle_turns=False),  # ours: a dialogue goes on from turn to turn
        }
        for name, count in conversations.items()
    }
