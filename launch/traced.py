"""Operations of a program as it is traced: its products, loops multiplied out, recomputation and padding included.

Kernels of our own are not among them (launch/kernels.py): what they compute depends on the data.
"""

import math
from collections.abc import Iterator
from typing import Any


def traced_flops(jaxpr: Any) -> float:
    """Returns the operations of all products of a jaxpr, over all devices; a multiply-add is two.

    Of a branch the dearest counts, and a `while` without a known length as one trip.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
        elif name == "cond":
            total += max(traced_flops(branch.jaxpr) for branch in params["branches"])
        elif name != "pallas_call":
            times = params["length"] if name == "scan" else 1
            if name == "shard_map":  # shapes within are those of one device, along the axes that it names
                times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            total += times * sum(traced_flops(inner) for inner in inner_jaxprs(params))
    return total


def inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the programs within an equation, from its parameters."""
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one
