"""Writes the embedded data: real handwritten digits, laid out as documents of every kind Idefics2 learns from.

    python -m data_pipelines.digits OUT [--seed N]

The scans are scikit-learn's bundled digits: 1,797 of 8 x 8 pixels, of which 360 are held out; no training document
shows a held-out scan. OUT then holds

    pairs.parquet           an image of one digit and its caption (img2dataset's schema)
    interleaved.parquet     pages of 2 to 4 images with text between (OBELICS' schema), images in interleaved_images/
    conversations.parquet   questions and answers about one image, or several (The Cauldron's schema)
    numbers.parquet         rows of 1 to 4 digits to be read (The Cauldron's schema)
    warmup.parquet          pairs whose image is cropped to its digit, to begin with
    heldout.parquet         questions about held-out scans, one turn each (The Cauldron's schema)
    processor/              a tokenizer trained on the training texts, and the image rules

The layout is easier than the world: digits are 28 pixels high and lie on the grid of 14-pixel patches, on canvases of
2 to 8 patches a side and at most 16 in all. Training scans are turned, shifted and scaled a little each time.
"""

import argparse
import dataclasses
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

from data_pipelines import cauldron, obelics, pairs
from idefics_jax.errors import UserError
from idefics_jax.images import ImageRules
from idefics_jax.processor import Processor
from idefics_jax.tokenizer import Tokenizer, train_tokenizer

HELD_OUT_SCANS = 360
PATCH = 14
DIGIT = 2 * PATCH
# Largest turn in degrees, shift in pixels and change of scale of a training scan.
TURN, SHIFT, SCALE = 10.0, 1.5, 0.1
# (rows, columns) of patches that hold a digit, are at most 8 long and at most 16 in all.
CANVASES = [(rows, columns) for rows in range(2, 9) for columns in range(2, 9) if rows * columns <= 16]
COUNTS = {"pairs": 2000, "interleaved": 1200, "conversations": 2000, "numbers": 4000, "warmup": 1000, "heldout": 360}
ROW_GROUP = 500
RULES = ImageRules(
    patch_size=PATCH,
    longest_edge=8 * PATCH,
    shortest_edge=DIGIT,
    positions_per_side=8,
    split=False,
    max_pixels=64_000_000,
)
NUM_LATENTS = 4
VOCABULARY = 400
MANIFEST = "digits.json"


@dataclasses.dataclass
class Scans:
    """Scans of one part, and the generator that draws from them.

    Attributes:
      images: grey, 28 x 28, one a scan.
      labels: int [n], the digit each shows.
      rng: draws scans, layouts and distortions.
      distort: whether scans are turned, shifted and scaled.
    """

    images: list[PIL.Image.Image]
    labels: np.ndarray
    rng: np.random.Generator
    distort: bool

    def draw(self) -> tuple[PIL.Image.Image, int]:
        """Returns a grey image of 28 x 28, and the digit it shows."""
        scan = int(self.rng.integers(len(self.labels)))
        image = self.images[scan]
        if self.distort:
            image = image.transform(
                image.size, PIL.Image.Transform.AFFINE, self._affine(), PIL.Image.Resampling.BILINEAR
            )
        return image, int(self.labels[scan])

    def _affine(self) -> tuple[float, ...]:
        """Returns the six numbers of a random affine map about the centre."""
        turn = np.deg2rad(self.rng.uniform(-TURN, TURN))
        scale = self.rng.uniform(1 - SCALE, 1 + SCALE)
        cosine, sine = np.cos(turn) / scale, np.sin(turn) / scale
        centre = DIGIT / 2
        right, down = self.rng.uniform(-SHIFT, SHIFT, 2)
        return (
            cosine,
            sine,
            centre + right - centre * (cosine + sine),
            -sine,
            cosine,
            centre + down - centre * (cosine - sine),
        )


def canvas(scans: Scans) -> tuple[bytes, int]:
    """Returns a PNG with one digit somewhere on a canvas, and the digit."""
    rows, columns = CANVASES[scans.rng.integers(len(CANVASES))]
    digit, label = scans.draw()
    sheet = PIL.Image.new("L", (columns * PATCH, rows * PATCH))
    sheet.paste(digit, (int(scans.rng.integers(columns - 1)) * PATCH, int(scans.rng.integers(rows - 1)) * PATCH))
    return _png(sheet), label


def strip(scans: Scans, length: int) -> tuple[bytes, str]:
    """Returns a PNG of digits side by side, and the number they make."""
    sheet = PIL.Image.new("L", (length * DIGIT, DIGIT))
    labels = ""
    for i in range(length):
        digit, label = scans.draw()
        sheet.paste(digit, (i * DIGIT, 0))
        labels += str(label)
    return _png(sheet), labels


def _png(image: PIL.Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def pair(scans: Scans, draw: Callable[[Scans], tuple[bytes, Any]], key: str) -> dict[str, Any]:
    """Returns a row of img2dataset's schema."""
    image, label = draw(scans)
    return {"key": key, "png": image, "caption": f"the digit {label}", "url": f"digits/{key}.png"}


def page(scans: Scans, folder: Path, key: str) -> dict[str, Any]:
    """Returns a row of OBELICS' schema, and writes its images into a folder beside the parquet file."""
    images, texts, metadata = [], [], []
    for i in range(int(scans.rng.integers(2, 5))):
        data, label = canvas(scans)
        name = f"{folder.name}/{key}-{i}.png"
        (folder / f"{key}-{i}.png").write_bytes(data)
        images += [name, None]
        texts += [None, f" is {label}."]
        metadata += [{"src": name, "format": "png"}, None]
    return {
        "images": images,
        "metadata": json.dumps(metadata),
        "general_metadata": json.dumps({"url": f"digits/{key}"}),
        "texts": texts,
    }


def conversation(images: list[bytes], turns: list[tuple[str, str]], source: str) -> dict[str, Any]:
    """Returns a row of The Cauldron's schema."""
    return {
        "images": [{"bytes": data, "path": None} for data in images],
        "texts": [{"user": user, "assistant": answer, "source": source} for user, answer in turns],
    }


def number(scans: Scans) -> dict[str, Any]:
    """Returns a conversation about a row of digits."""
    image, labels = strip(scans, int(scans.rng.integers(1, 5)))
    return conversation([image], [("Read the number.", labels)], "digits_number")


def single(scans: Scans) -> dict[str, Any]:
    """Returns a one-turn conversation about one digit."""
    image, label = canvas(scans)
    return conversation([image], [("What is the digit?", str(label))], "digits_single")


def several(scans: Scans) -> dict[str, Any]:
    """Returns a one-turn conversation about the digits of several images."""
    drawn = [canvas(scans) for _ in range(int(scans.rng.integers(2, 5)))]
    answer = " ".join(str(label) for _, label in drawn)
    return conversation([image for image, _ in drawn], [("What are the digits?", answer)], "digits_several")


def dialogue(scans: Scans) -> dict[str, Any]:
    """Returns a conversation of two or three turns about one digit."""
    image, label = canvas(scans)
    turns = [
        ("What is the digit?", str(label)),
        ("Is it even?", "no" if label % 2 else "yes"),
        ("Is it above 4?", "yes" if label > 4 else "no"),
    ]
    return conversation([image], turns[: int(scans.rng.integers(2, 4))], "digits_dialogue")


def write(folder: Path, *, seed: int, counts: Mapping[str, int]) -> None:
    """Writes the data into a new folder; the same seed and counts write the same bytes."""
    training, held_out = _split(seed)
    (folder / "interleaved_images").mkdir(parents=True)
    rows = {
        "pairs": [pair(training, canvas, f"{i:06}") for i in range(counts["pairs"])],
        "interleaved": [page(training, folder / "interleaved_images", f"{i:06}") for i in range(counts["interleaved"])],
        "conversations": [(dialogue, single, several)[i % 3](training) for i in range(counts["conversations"])],
        "numbers": [number(training) for _ in range(counts["numbers"])],
        "warmup": [pair(training, lambda scans: strip(scans, 1), f"{i:06}") for i in range(counts["warmup"])],
        "heldout": [(single, number, several)[i % 3](held_out) for i in range(counts["heldout"])],
    }
    schemas = {"pairs": pairs.SCHEMA, "warmup": pairs.SCHEMA, "interleaved": obelics.SCHEMA}
    for name, documents in rows.items():
        table = pa.Table.from_pylist(documents, schema=schemas.get(name, cauldron.SCHEMA))
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=ROW_GROUP, write_page_checksum=True)
    texts = _texts(row for name, documents in rows.items() if name != "heldout" for row in documents)
    tokenizer = Tokenizer(train_tokenizer(texts, VOCABULARY))
    Processor(tokenizer, RULES, NUM_LATENTS).save(folder / "processor")
    (folder / MANIFEST).write_text(json.dumps({"seed": seed, "documents": dict(counts)}, indent=2) + "\n")


def _split(seed: int) -> tuple[Scans, Scans]:
    """Returns the training scans and the held-out ones."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    training, held_out = order[HELD_OUT_SCANS:], order[:HELD_OUT_SCANS]
    return tuple(
        Scans(
            [_enlarge(scan) for scan in digits.images[part]],
            digits.target[part],
            np.random.default_rng((seed, len(part))),
            distort=part is training,
        )
        for part in (training, held_out)
    )


def _enlarge(scan: np.ndarray) -> PIL.Image.Image:
    """Turns a scan of 8 x 8 with ink from 0 to 16 into a grey image of 28 x 28."""
    ink = PIL.Image.fromarray(np.clip(scan * 16, 0, 255).astype(np.uint8))
    return ink.resize((DIGIT, DIGIT), PIL.Image.Resampling.BICUBIC)


def _texts(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    """Yields the texts of rows in the forms the processor will encode them in."""
    for row in rows:
        if "caption" in row:
            yield row["caption"]
        elif "general_metadata" in row:
            yield from (text for text in row["texts"] if text is not None)
        else:
            for i, turn in enumerate(row["texts"]):
                yield f"\nUser: {turn['user']}" if i else f"User: {turn['user']}"
                yield f"\nAssistant: {turn['assistant']}"


def build(out: Path, *, seed: int, counts: Mapping[str, int]) -> None:
    """Writes the data aside and puts it in the place of OUT, which is never seen half-written.

    Args:
      out: an empty folder, one that this function wrote, or one that does not exist.
      seed: of the held-out scans, the layout and the distortions.
      counts: documents in each file (COUNTS).

    Raises:
      UserError: OUT holds something else.
    """
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds something else than this command's data; name an empty or a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        write(aside / "new", seed=seed, counts=counts)
        if out.exists():
            out.rename(aside / "old")
        (aside / "new").rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the layout, 0 or more")
    arguments = parser.parse_args()
    try:
        if arguments.seed < 0:
            raise UserError(f"--seed is {arguments.seed}; it must be 0 or more")
        build(arguments.out, seed=arguments.seed, counts=COUNTS)
    except (UserError, OSError) as error:
        what = f"{arguments.out} cannot be written: {error}" if isinstance(error, OSError) else error
        print(f"error: {what}", file=sys.stderr)
        sys.exit(2)
    print(f"{arguments.out}: " + ", ".join(f"{count} {name}" for name, count in COUNTS.items()))


if __name__ == "__main__":
    main()
