"""How a pretrained model is best adapted, in small: frozen, LoRA, DoRA or full, as the paper's Table 3 asks.

    python -m launch.sweep --config configs/sweeps/adaptation.py

A model is pretrained on captions, pages and conversations about single digits, and then adapted to reading rows of
digits as numbers, which it has never seen, with each arm's parameters trainable, on several seeds. One run, by hand:

    python -m idefics_jax.train --config configs/sweeps/adaptation.py:lora --config.seed=1 --workdir work/lora-1

Every value is our choice, to fit twelve runs into twenty minutes on two cores.
"""

from ml_collections import ConfigDict

from configs import digits
from idefics_jax.errors import UserError

WORKDIR = "work/sweeps/adaptation"
PRETRAIN = "pretrain"
ARMS = ("frozen", "lora", "dora", "full")
# Adapters start from zero and take a higher rate than whole kernels do. Not tuned.
LEARNING_RATES = {"frozen": 4e-3, "lora": 4e-3, "dora": 4e-3, "full": 2e-3}


def get_config(arm: str = "") -> ConfigDict:
    """Returns the training config of an arm or of the pretraining; one must be named."""
    if arm not in (PRETRAIN, *ARMS):
        raise UserError(f"configs/sweeps/adaptation.py:{arm} is none of {', '.join((PRETRAIN, *ARMS))}")
    config = digits.get_config("full" if arm == PRETRAIN else arm)
    sources = config.data.stages.stage2.sources
    config.checkpoint_every = 10_000  # at the end alone
    config.keep_checkpoints = 1
    if arm == PRETRAIN:
        config.steps = 700
        del sources["numbers"]
        return config
    config.steps = 300
    config.init_from = f"{WORKDIR}/{PRETRAIN}"
    config.model = ConfigDict()
    config.init_std = ()
    del config.data.stages["stage1"], sources["pairs"], sources["interleaved"]
    # One optimizer for all arms, so that they differ in what trains alone.
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = LEARNING_RATES[arm]
    return config


def sweep() -> dict:
    """Returns what launch.sweep runs: every arm on three seeds."""
    return {
        "workdir": WORKDIR,
        "data": ("data_pipelines.digits", digits.DATA),
        "pretrain": PRETRAIN,
        "runs": [
            {"argument": arm, "settings": {"seed": seed, "data.seed": seed}} for seed in (0, 1, 2) for arm in ARMS
        ],
        "evaluate": "configs/eval/digits.py",
        "metric": "exact_match",
    }
