"""Devices that are only described: what their real compilers need to know."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.dispatch import Target, compile_for


@dataclasses.dataclass(frozen=True)
class Device:
    """A device to compile for.

    Attributes:
      target: What kernels are chosen by.
      backends: Those that are compiled for it, one by one.
      topology: Returns JAX's description of it.
    """

    target: Target
    backends: tuple[str, ...]
    topology: Callable[[], Any]


def _tpu(name: str) -> Callable[[], Any]:
    return functools.partial(topologies.get_topology_desc, platform="tpu", topology_name=name)


def _h200() -> Any:
    config = Path(__file__).with_name("h200.txtpb").read_text()
    return topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=config)


DEVICES = {
    "v5e": Device(Target("tpu"), ("tpu",), _tpu("v5e:2x2")),
    "v6e": Device(Target("tpu"), ("tpu",), _tpu("v6e:2x2")),
    "h200": Device(Target("gpu", 90), ("hopper", "gpu"), _h200),
}


@contextlib.contextmanager
def compiling(device: Device) -> Iterator[Callable[[Any], Any]]:
    """Trace and compile for one device; yields what puts ShapeDtypeStructs on it."""
    mesh = Mesh(device.topology().devices[:1], ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())

    def place(shapes: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)

    with compile_for(device.target), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield place
