"""What several test files share."""

import gc
import hashlib
import importlib.util
import os
from pathlib import Path

# Tests run each small program a few times, so compiling costs far more than running. Set before jax is imported, and
# for the processes that tests start too.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",  # one core compiles the parts that the other has no time for
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests compile the same program; so do the processes they start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / "build" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Where an operation was written stands in no result.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import pytest  # noqa: E402

from idefics_jax.images import ImageRules  # noqa: E402
from idefics_jax.processor import Processor  # noqa: E402
from idefics_jax.tokenizer import Tokenizer  # noqa: E402

# Tracing makes and drops many objects; looking through all that torch and JAX hold each time is 6 % of the suite.
gc.set_threshold(100_000, 20, 100)

# Files that take longest, started first so that the last minutes do not belong to one process alone.
SLOW = ("sharding", "recipes", "loop", "processes", "sweep", "adapted_run", "divergence", "idefics2", "aot", "step")
MISTRAL_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"


def pytest_collection_modifyitems(items):
    slow = {f"test_{name}.py": place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: slow.get(item.path.name, len(slow)))


@pytest.fixture(scope="session")
def mistral_model() -> Path:
    """The real sentencepiece file of Mistral 7B v0.1, which the mistral-common package carries."""
    folder = importlib.util.find_spec("mistral_common").submodule_search_locations[0]
    path = Path(folder) / "data" / "tokenizer.model.v1"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == MISTRAL_SHA256
    return path


@pytest.fixture(scope="session")
def mistral(mistral_model) -> Tokenizer:
    return Tokenizer.load(mistral_model)


@pytest.fixture(scope="session")
def released(mistral) -> Processor:
    """The processor of the released base model."""
    rules = ImageRules(
        patch_size=14,
        longest_edge=980,
        shortest_edge=378,
        positions_per_side=70,
        split=False,
        max_pixels=64_000_000,
    )
    return Processor(mistral, rules, 64)
