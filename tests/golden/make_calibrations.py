"""Make the calibrations that the laws run with: of normally distributed keys and values, one layer, two heads of 64.

Run: python -m tests.golden.make_calibrations
"""

from pathlib import Path

import numpy as np

from kvcomp_jax.calibrate import About, Activations, save
from kvcomp_jax.methods import METHODS

FOLDER = Path(__file__).parent / "methods"
OPTIONS = {
    "fisher_steps": ("fisher_steps", {"num_sinks": 4}),
    "kvquant_3": ("kvquant", {"bits": 3, "outliers": 0.01, "num_sinks": 1, "across_heads": True}),
    "kvquant_2": ("kvquant", {"bits": 2, "outliers": 0.05, "num_sinks": 0, "across_heads": False}),
    "zeroc": ("zeroc", {}),
    "duo_attention_3_16": ("duo_attention", {"num_sinks": 3, "recent": 16}),
}


def main() -> None:
    """Write a file for each entry of OPTIONS."""
    draw = np.random.default_rng(0).standard_normal
    shape = (2, 512, 2, 64)
    k, v, k_weight, v_weight, q = draw(shape), draw(shape), draw(shape) ** 2, draw(shape) ** 2, draw(shape)
    layer = Activations(k, v, k_weight, v_weight, q, o_weight=draw((96, 2 * 64)))
    for name, (method, options) in OPTIONS.items():
        tensors = {key: x[None] for key, x in METHODS[method].calibrate(layer, **options).items()}
        save(FOLDER / f"{name}.safetensors", tensors, About(method, options, "made up"))


if __name__ == "__main__":
    main()
