"""What several test files share."""

import hashlib
import importlib.util
from pathlib import Path

import pytest

MISTRAL_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"


@pytest.fixture(scope="session")
def mistral_model() -> Path:
    """The real sentencepiece file of Mistral 7B v0.1, which the mistral-common package carries."""
    folder = importlib.util.find_spec("mistral_common").submodule_search_locations[0]
    path = Path(folder) / "data" / "tokenizer.model.v1"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == MISTRAL_SHA256
    return path
