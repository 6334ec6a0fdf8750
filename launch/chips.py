"""What one chip of each TPU generation can do: the limits that estimates are held against.

Sources: [page] Google's page of the generation (cloud.google.com/tpu/docs/{v4,v5e,v5p}); [book] the table of TPU
specifications in "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus); [compiler] what libtpu 0.0.42 says is
left to a program where one does not fit; [reckoned] the peak divided by the multiply-adds of a cycle, which are two
operations in each cell of the chip's 128 x 128 matrix units (eight of them; four on v5e).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
      cores: TensorCores, which share a device's work [page].
      peak: bfloat16 operations a second [page].
      clock: cycles a second of its matrix units, in which the compiler's estimates are counted [reckoned].
      hbm_bytes: memory that a program may use [compiler].
      hbm_bandwidth: bytes a second between memory and chip [page].
      link_bandwidth: bytes a second of one link to a neighbour, each way [book].
      ring: chips along an axis from which on its ends are linked to each other [page].
      network_bandwidth: bytes a second to other slices, of each chip, each way [book: 25 GB/s a host of 4, 8 on v5e].
    """

    cores: int
    peak: float
    clock: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    ring: int
    network_bandwidth: float


CHIPS = {
    "v4": Chip(2, 275e12, 275e12 / (8 * 2 * 128**2), 30.75 * 2**30, 1.2e12, 45e9, 4, 25e9 / 4),
    "v5e": Chip(1, 197e12, 197e12 / (4 * 2 * 128**2), 15.75 * 2**30, 0.81e12, 45e9, 16, 25e9 / 8),
    "v5p": Chip(2, 459e12, 459e12 / (8 * 2 * 128**2), 95.74 * 2**30, 2.765e12, 90e9, 4, 25e9 / 4),
}
