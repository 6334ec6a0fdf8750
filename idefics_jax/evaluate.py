"""Evaluates a checkpoint: asks every question of a source and scores the answers.

    python -m idefics_jax.evaluate --checkpoint work/digits --config configs/eval/digits.py

Figures, samples and a contact sheet go to DIR/eval, or to --out. Several processes, one a machine of a pod, share the
questions; each holds a whole model (idefics_jax/processes.py says how they find each other).
"""

from absl import flags, logging

from idefics_jax import buckets, commands, processes

_CONFIG = commands.define_config(None, "what to ask, configs/eval/NAME.py")
_CHECKPOINT = commands.define_folder("checkpoint", None, "a work directory, a model folder or a Hugging Face folder")
_OUT = flags.DEFINE_string("out", None, "folder for the results; by default CHECKPOINT/eval")
_TENSOR = commands.define_tensor()


def main() -> None:
    logging.set_verbosity(logging.WARNING)
    # Imported here, so that a wrong flag is answered at once.
    import idefics_jax
    from idefics_jax import settings
    from idefics_jax.evaluation.run import EvalConfig, evaluate
    from idefics_jax.model import cut_over

    config = settings.build(EvalConfig, _CONFIG.value.to_dict(), "config")
    checkpoint = buckets.absolute(_CHECKPOINT.value)
    with processes.joined():
        model = idefics_jax.load(checkpoint, **cut_over(_TENSOR.value))
        figures = evaluate(model, config, buckets.absolute(_OUT.value) if _OUT.value else checkpoint / "eval")
        print(f"{config.metric}: {figures[config.metric]:.3f} over {figures['questions']} questions")


if __name__ == "__main__":
    commands.run(main, required=("config", "checkpoint"))
