"""Serving: requests that come and go in the slots of one batch."""

from kvcomp_jax.serving.engine import Engine, Request

__all__ = ["Engine", "Request"]
