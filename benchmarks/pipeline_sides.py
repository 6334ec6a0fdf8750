"""The sides of benchmarks/pipeline.py, each a process of its own that turns the same shards into what it makes of them.

    python -m benchmarks.pipeline_sides SIDE FOLDER WORKERS

reads a number of images from each line of its input, makes at least so many, and answers with one line of JSON.

    ours                our pipeline, from ArrayRecord to packed batches
    transformers-pil    Idefics2Processor with its Pillow image processor, in a DataLoader over the same records
    transformers-fast   the same with its torchvision image processor
    bare                decoding and resizing alone, of bytes in memory, to [height, width, 3]
"""

import concurrent.futures
import functools
import io
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import simplejpeg
from cykooz_resizer import FilterType, ResizeAlg, ResizeOptions, Resizer

from data_pipelines import manifest, pipeline
from data_pipelines.records import RecordRows
from data_pipelines.source_config import SourceConfig
from idefics_jax import images
from idefics_jax.batch import BatchShape
from idefics_jax.images import ImageRules
from idefics_jax.processor import Processor
from idefics_jax.scratch import scratch

SIDES = ("ours", "transformers-pil", "transformers-fast", "bare")
RULES = ImageRules(
    patch_size=14,
    longest_edge=980,
    shortest_edge=378,
    positions_per_side=70,
    split=False,
    max_pixels=64_000_000,
    resizer="simd",
)
# A vision row holds one image of 980 x 980; a batch about 24 photographs.
SHAPE = BatchShape(rows=4, tokens=3072, vision_rows=6, patches=4900, images=32)
LOOKAHEAD, LOOKAHEAD_MIB, ROUNDS, PREFETCH = 128, 256, 16, 2
PADDED_BATCH = 8  # documents that transformers pads to one size


def config(folder: Path, workers: int) -> pipeline.DataConfig:
    """Returns what a config file would say, of shards of one size."""
    return pipeline.DataConfig(
        stages=(pipeline.Stage((SourceConfig("photographs", "pairs", (str(folder / "shards"),)),)),),
        seed=0,
        shape=SHAPE,
        document_tokens=SHAPE.tokens,
        virtual_shards=1,
        lookahead=LOOKAHEAD,
        lookahead_mib=LOOKAHEAD_MIB,
        rounds=ROUNDS,
        max_bad_fraction=0.0,
        num_threads=workers if workers > 1 else 0,  # one core decodes where it waits
        prefetch=PREFETCH,
        row_groups_mib=1,
        cache_mib=0,
    )


def processor_of(folder: Path, **changes) -> Processor:
    return Processor.load(folder / "processor").with_image_rules({"max_pixels": RULES.max_pixels, **changes})


def records(folder: Path) -> RecordRows:
    told = manifest.load(folder / "shards")
    return RecordRows(told.shards, told.columns)


def ours(folder: Path, workers: int) -> Iterator[int]:
    """Yields the images of each batch."""
    processor = processor_of(folder, resizer="simd")
    for batch in pipeline.batches(config(folder, workers), processor, process_index=0, process_count=1):
        yield int(batch.arrays["image_mask"].sum())


class Photographs:
    """The same records as a torch data set: (picture, caption)."""

    def __init__(self, folder: Path):
        self._rows = records(folder)

    def __len__(self) -> int:
        return int(self._rows.group_rows.sum())

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, str]:
        groups = self._rows.group_rows
        group = int(np.searchsorted(np.cumsum(groups), index, side="right"))
        row = self._rows.row(group, index - int(groups[:group].sum()))
        return PIL.Image.open(io.BytesIO(row["image"])), row["caption"]


def _collate(processor, documents: list[tuple[PIL.Image.Image, str]]) -> dict:
    return processor(
        text=[f"<image>{caption}" for _, caption in documents],
        images=[[picture] for picture, _ in documents],
        padding=True,
        return_tensors="pt",
    )


def transformers(folder: Path, workers: int, *, fast: bool) -> Iterator[int]:
    """Yields the images of each padded batch.

    One worker works in this process, which spares it handing tensors over; more are processes of the DataLoader.
    """
    import torch
    from transformers import AutoTokenizer, Idefics2Processor

    if fast:
        from transformers.models.idefics2.image_processing_idefics2 import Idefics2ImageProcessor as ImageProcessor
    else:
        from transformers.models.idefics2.image_processing_pil_idefics2 import (
            Idefics2ImageProcessorPil as ImageProcessor,
        )
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "processor")
    processor = Idefics2Processor(ImageProcessor(do_image_splitting=False), tokenizer)
    loader = torch.utils.data.DataLoader(
        photographs := Photographs(folder),
        batch_size=PADDED_BATCH,
        sampler=torch.utils.data.RandomSampler(photographs, replacement=True, num_samples=10**9),
        num_workers=0 if workers == 1 else workers,
        collate_fn=functools.partial(_collate, processor),
    )
    for batch in loader:
        yield len(batch["input_ids"])


def bare(folder: Path, workers: int) -> Iterator[int]:
    """Yields 1 for each photograph that was decoded and resized; they go round."""
    rows = records(folder)
    group_rows = enumerate(rows.group_rows)
    stored = [rows.row(group, row)["image"] for group, count in group_rows for row in range(count)]
    sizes = [images.resized_size(*images.image_size(data, RULES), RULES, 1.0) for data in stored]
    for data, size in zip(stored, sizes, strict=True):
        check_pixels(data, size)
    if workers == 1:
        while True:
            for data, size in zip(stored, sizes, strict=True):
                decode_and_resize(data, size)
                yield 1
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        while True:
            for _ in pool.map(decode_and_resize, stored, sizes):
                yield 1


BILINEAR = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.bilinear), use_alpha=False)


def decode_and_resize(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """The fastest way found to an antialiased bilinear resize: uint8 [height, width, 3].

    libjpeg-turbo through simplejpeg, then both passes at once with vector instructions, then four bytes a pixel to
    three as images.cut does it, all in memory kept from image to image. OpenCV decodes 10 % slower and has no such
    filter; Pillow is slower at both.
    """
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    if size == (width, height):
        return simplejpeg.decode_jpeg(data, "RGB", buffer=scratch("bare", (height, width, 3)))
    pixels = simplejpeg.decode_jpeg(data, "RGBX", buffer=scratch("bare", (height, width, 4)))
    resized = scratch("bare resized", (size[1], size[0], 4))
    as_image = functools.partial(PIL.Image.frombuffer, "CMYK")
    Resizer().resize_pil(
        as_image((width, height), pixels, "raw", "CMYK", 0, 1), as_image(size, resized, "raw", "CMYK", 0, 1), BILINEAR
    )
    count = size[0] * size[1]
    packed = scratch("bare packed", (count * 3 + 1,))
    np.ndarray(count, np.uint32, packed, strides=(3,))[...] = resized.view(np.uint32).reshape(-1)
    return packed[:-1].reshape(size[1], size[0], 3)


def check_pixels(data: bytes, size: tuple[int, int]) -> None:
    """Raises AssertionError if the bare side's pixels are not the reference's, to 2 levels of 255 in the mean."""
    wanted = np.asarray(PIL.Image.open(io.BytesIO(data)).resize(size, PIL.Image.Resampling.BILINEAR))
    off = np.abs(decode_and_resize(data, size).astype(int) - wanted).mean()
    if not off <= 2:
        raise AssertionError(f"the bare side's pixels are {off:.2f} levels beside the reference's")


RUNS: dict[str, Callable[[Path, int], Iterator[int]]] = {
    "ours": ours,
    "transformers-pil": functools.partial(transformers, fast=False),
    "transformers-fast": functools.partial(transformers, fast=True),
    "bare": bare,
}


def main() -> None:
    side, folder, workers = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    made = RUNS[side](folder, workers)
    for line in sys.stdin:
        count, began, cpu = 0, time.perf_counter(), time.process_time()
        while count < int(line):
            count += next(made)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        answer = {"images": count, "seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        print(json.dumps({**answer, "gib": peak}), flush=True)
    os._exit(0)  # threads that read ahead are not waited for


if __name__ == "__main__":
    main()
