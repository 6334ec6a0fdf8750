"""Side by side with transformers: the same weights and documents in both, on this machine's CPU, in float32.

    python -m benchmarks.vs_transformers [--json FILE] [--repeats N]

A random Idefics2 of 100 M parameters. Documents are ragged (benchmarks/ragged.py): transformers pads them to one batch,
as its processor does, and this package packs them; "equal sizes" has nothing to gain from packing. Before anything is
timed, logits, losses, updated weights and generated tokens of both sides are compared. Transformers runs with its
`sdpa` attention, on all cores, eagerly or through torch.compile, whichever is faster for each row of the table.

The two sides take turns, so that both meet the same weather; medians are compared.
"""

import dataclasses
import functools
import logging
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from absl import flags

from benchmarks import ragged
from idefics_jax import commands
from idefics_jax.batch import BatchShape
from idefics_jax.config import Idefics2Config
from idefics_jax.convert.hf import from_hf
from idefics_jax.convert.rules import leaves
from idefics_jax.inference.generate import Decoding, generate
from idefics_jax.models.idefics2 import Idefics2
from idefics_jax.param_transforms import lora, partition, paths
from idefics_jax.training.optimizer import OptimizerConfig, make_optimizer
from idefics_jax.training.step import init_state, make_train_step
from launch import report

_REPEATS = flags.DEFINE_integer("repeats", 3, "timed runs of each side", lower_bound=1)
_TORCH_COMPILE = flags.DEFINE_bool("torch_compile", True, "also try torch.compile, and keep it where it is faster")

VISION = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "image_size": 980,
    "patch_size": 14,
}
PERCEIVER = {
    "hidden_size": 512,
    "resampler_n_latents": 64,
    "resampler_depth": 3,
    "resampler_n_heads": 8,
    "resampler_head_dim": 64,
    "num_key_value_heads": 4,
}
TEXT = {
    "model_type": "mistral",
    "vocab_size": 32003,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "sliding_window": 4096,
}
ADAMW = OptimizerConfig(
    name="adamw",
    learning_rate=1e-4,
    muon_learning_rate=1e-4,
    schedule="constant",
    warmup_steps=0,
    b1=0.9,
    b2=0.95,
    clip_norm=1.0,
)
WEIGHT_DECAY = 0.05
RULE = partition.Rule(".*", "trainable", 1.0, WEIGHT_DECAY)
RANK, ALPHA = 16, 8.0
LORA = [lora.LoraTarget(f"{part}/layers/.*", RANK, ALPHA) for part in ("vision_model/encoder", "text_model")]
PEFT_TARGETS = r"model\.(vision_model\.encoder|text_model)\.layers\..*\.(\w+_proj|fc1|fc2)"
# Two pairs and three pages, and rows that hold them.
SEED, PAIRS, PAGES = 3, 2, 3
RAGGED = BatchShape(rows=2, tokens=384, vision_rows=2, patches=320, images=4)
# Five equal documents of 61 words and an image of 16 x 16 patches, each a row.
EQUAL_WORDS, EQUAL_GRID = 61, (16, 16)
EQUAL = BatchShape(rows=5, tokens=128, vision_rows=1, patches=256, images=1)
NEW_TOKENS = 32
# How transformers' generate compiles its steps, here on CPU too.
COMPILED_DECODING = {
    "cache_implementation": "static",
    "compile_config": transformers.CompileConfig(fullgraph=False, dynamic=False, mode="default"),
}
COMPILED_DECODING["compile_config"]._compile_all_devices = True
# Largest differences allowed between the sides: of logits, and of losses relative to them.
LOGITS, LOSS = 1e-4, 1e-4


def build() -> tuple[transformers.Idefics2ForConditionalGeneration, Idefics2Config, dict]:
    """Returns the reference with random weights, our config, and our parameters with the same weights."""
    torch.manual_seed(0)
    hf_config = transformers.Idefics2Config(
        vision_config=VISION, perceiver_config=PERCEIVER, text_config=TEXT, image_token_id=ragged.IMAGE
    )
    hf_config._attn_implementation = "sdpa"
    hf = transformers.Idefics2ForConditionalGeneration(hf_config).eval()
    config = Idefics2Config.from_hf(hf_config.to_dict())
    with torch.no_grad():
        # The reference's equal latents would stay equal; see Resampler.
        latents = hf.model.connector.perceiver_resampler.latents
        latents.copy_(torch.randn(latents.shape))
    return hf, config, jax.device_put(from_hf({name: x.numpy() for name, x in hf.state_dict().items()}, config))


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: seconds of every timed run of either side, in turns.

    Attributes:
      ours, theirs: seconds.
      mode: how transformers ran, "eager" or "compiled".
      tokens: real tokens that a run works through.
    """

    ours: list[float]
    theirs: list[float]
    mode: str
    tokens: int

    @property
    def ratio(self) -> float:
        return statistics.median(self.theirs) / statistics.median(self.ours)


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def race(*runs: Callable[[], object]) -> list[list[float]]:
    """Times runs in turns, after a warm-up of each: seconds of all repetitions, run by run."""
    for run in runs:
        run()
    rounds = [[seconds(run) for run in runs] for _ in range(_REPEATS.value)]
    return [list(times) for times in zip(*rounds, strict=True)]


def faster(eager: Any, compiled: Any, run: Callable[[Any], object]) -> tuple[Callable[[], object], str]:
    """Returns `run` bound to the eager or to the compiled form, whichever is faster once warm, and which it is."""
    forms = {"eager": functools.partial(run, eager)}
    if _TORCH_COMPILE.value:
        forms["compiled"] = functools.partial(run, compiled)
    for form in forms.values():
        form()
    took = {mode: seconds(form) for mode, form in forms.items()}
    print("  transformers: " + ", ".join(f"{mode} {time:.2f} s" for mode, time in took.items()), flush=True)
    mode = min(took, key=took.get)
    return forms[mode], mode


def check(what: str, difference: float, allowed: float) -> None:
    """Stops the benchmark unless both sides computed the same."""
    if not difference <= allowed:
        raise AssertionError(f"{what} of the two sides differ by {difference:.2e}, more than {allowed:.0e}")
    print(f"  {what} differ by {difference:.1e}", flush=True)


def total(documents: list[ragged.Document]) -> int:
    return sum(len(it.tokens) for it in documents)


def torch_inputs(documents: list[ragged.Document], *, side: str) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in ragged.padded(documents, side=side).items()}


def forward(hf, model: Idefics2, params: dict, documents: list[ragged.Document], shape: BatchShape) -> Row:
    """The logits of every token."""
    batch, order = ragged.packed(documents, shape, model.config)
    batch = jax.device_put(batch)
    inputs = torch_inputs(documents, side="right")
    inputs.pop("labels")
    compute = jax.jit(functools.partial(model.apply, method="full_logits"))

    def ours():
        return compute({"params": params}, batch).block_until_ready()

    def run(module):
        with torch.inference_mode():
            return module(**inputs, use_cache=False).logits

    real = inputs["attention_mask"].bool()
    wanted = {id(it): row[mask].numpy() for it, row, mask in zip(documents, run(hf), real, strict=True)}
    found = zip(order, ragged.per_document(batch, ours()), strict=True)
    check("logits", max(np.abs(logits - wanted[id(it)]).max() for it, logits in found), LOGITS)
    theirs, mode = faster(hf, torch.compile(hf), run)
    return Row(*race(ours, theirs), mode, total(documents))


def training(
    hf, model: Idefics2, trainable: dict, frozen: dict, spec: lora.LoraSpec, documents: list[ragged.Document]
) -> Row:
    """Steps of training: loss, gradients, clipping by global norm, AdamW."""
    batch = jax.device_put(ragged.packed(documents, RAGGED, model.config)[0])
    inputs = torch_inputs(documents, side="right")
    chosen = dict.fromkeys([path for tree in trainable.values() for path in paths.flatten(tree)], RULE)
    optimizer = make_optimizer(ADAMW, trainable, chosen, steps=1000)
    step = jax.jit(
        make_train_step(model, optimizer, spec, accumulation=1, chunk=RAGGED.tokens, seed=0, max_skipped=0),
        donate_argnums=0,
    )
    # Copied, as the step takes over its state's memory.
    state = jax.tree.map(jnp.copy, init_state(trainable, optimizer))
    losses: dict[str, list[float]] = {"ours": [], "theirs": []}

    def ours():
        nonlocal state
        state, metrics = step(state, frozen, batch)
        losses["ours"].append(float(metrics["loss"]))
        jax.block_until_ready(state)

    trained = [x for x in hf.parameters() if x.requires_grad]
    betas = (ADAMW.b1, ADAMW.b2)
    adamw = torch.optim.AdamW(trained, ADAMW.learning_rate, betas, weight_decay=WEIGHT_DECAY, fused=True)

    def run(module):
        loss = module(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, ADAMW.clip_norm)
        adamw.step()
        adamw.zero_grad()
        losses["theirs"].append(loss.item())

    theirs, mode = faster(hf, torch.compile(hf), run)
    while len(losses["ours"]) < len(losses["theirs"]):
        ours()
    times = race(ours, theirs)
    # Both trained on the same batch, step after step: as long as losses are equal, so were gradients and updates.
    check(f"losses of {len(losses['ours'])} steps", np.abs(np.divide(*losses.values()) - 1).max(), LOSS)
    return Row(*times, mode, total(documents))


def adapters(hf: peft.PeftModel, config: Idefics2Config) -> dict:
    """Returns peft's adapters as ours."""
    tensors, flat = dict(hf.named_parameters()), {}
    for leaf in leaves(config):
        for half in ("lora_A", "lora_B"):
            names = [f"base_model.model.{name.removesuffix('weight')}{half}.default.weight" for name in leaf.names]
            if names[0] in tensors:
                layers = [tensors[name].detach().numpy().T for name in names]
                flat[f"{leaf.rule.ours.removesuffix('kernel')}{half}"] = jnp.asarray(np.stack(layers))
    return paths.unflatten(flat)


def generation(hf, model: Idefics2, params: dict, documents: list[ragged.Document]) -> tuple[Row, Row]:
    """Greedy generation: prefill is what the first token takes, decoding what NEW_TOKENS more take."""
    batch = jax.device_put(ragged.prompts(documents, model.config))
    inputs = torch_inputs(documents, side="left")

    def ours(count):
        decoding = Decoding(count, stop_ids=(), banned_ids=(), temperature=0.0, top_p=1.0, unroll=True)
        return generate(model, {"params": params}, batch, decoding, jax.random.key(0))[0].block_until_ready()

    def theirs(settings, count):
        ids = hf.generate(
            **inputs, **settings, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return ids[:, inputs["input_ids"].shape[1] :].numpy()

    many = NEW_TOKENS + 1
    check("generated tokens", np.mean(np.asarray(ours(many)) != theirs({}, many)), 0.0)
    # Only the steps after the first are ever compiled.
    decode, mode = faster({}, COMPILED_DECODING, lambda settings: theirs(settings, many))
    runs = (lambda: ours(1), lambda: theirs({}, 1), lambda: ours(many), decode)
    ours_first, theirs_first, ours_all, theirs_all = race(*runs)
    rest = (np.subtract(ours_all, ours_first).tolist(), np.subtract(theirs_all, theirs_first).tolist())
    return (
        Row(ours_first, theirs_first, "eager", total(documents)),
        Row(*rest, mode, NEW_TOKENS * len(documents)),
    )


def measure() -> dict[str, Row]:
    """Runs everything; the names are those of the ratios."""
    hf, config, params = build()
    model, rng = Idefics2(config), np.random.default_rng(SEED)
    documents = ragged.draw(rng, pairs=PAIRS, pages=PAGES, config=config)
    equal = [ragged.document(rng, EQUAL_WORDS, [EQUAL_GRID], config=config) for _ in range(EQUAL.rows)]
    print(f"{hf.num_parameters() / 1e6:.1f} M parameters, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(ragged.describe(documents, RAGGED, config), flush=True)
    rows = {"forward": forward(hf, model, params, documents, RAGGED)}
    rows["forward_equal_sizes"] = forward(hf, model, params, equal, EQUAL)
    rows["prefill"], rows["decode"] = generation(hf, model, params, documents)
    rows["train"] = training(hf, model, {"params": params}, {}, (), documents)
    hf, _, params = build()
    hf = peft.get_peft_model(hf, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=PEFT_TARGETS)).eval()
    rows["lora"] = training(hf, model, {"adapters": adapters(hf, config)}, params, LORA, documents)
    return rows


def main() -> None:
    torch.set_num_threads(os.cpu_count())
    transformers.logging.set_verbosity_error()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # it tells of every graph break
    rows = measure()
    table, numbers = [], {}
    for name, row in rows.items():
        median = {"ours": statistics.median(row.ours), "theirs": statistics.median(row.theirs)}
        rates = {side: row.tokens / taken for side, taken in median.items()}
        table.append([name, *rates.values(), *median.values(), min(row.ours), min(row.theirs), row.mode, row.ratio])
        numbers |= {f"{name}_ratio": row.ratio} | {f"{name}_tokens_per_s_{side}": rate for side, rate in rates.items()}
    report.print_table(
        ["", "tokens/s", "theirs", "median s", "theirs", "min s", "theirs", "theirs ran", "ratio"], table
    )
    report.write_json(numbers)


if __name__ == "__main__":
    commands.run(main)
