"""Published systems: one a file, each a function that returns a spec; `METHODS` is the table, `parse` reads text."""

from kvcomp_jax.methods.ada_kv import ada_kv
from kvcomp_jax.methods.arkvale import arkvale
from kvcomp_jax.methods.cluster_kv import cluster_kv
from kvcomp_jax.methods.critical_kv import critical_kv
from kvcomp_jax.methods.decoquant import decoquant
from kvcomp_jax.methods.duo_attention import duo_attention
from kvcomp_jax.methods.expected_attention import expected_attention
from kvcomp_jax.methods.fisher_steps import fisher_steps
from kvcomp_jax.methods.fp8 import fp8
from kvcomp_jax.methods.full import full
from kvcomp_jax.methods.h2o import h2o
from kvcomp_jax.methods.hack import hack
from kvcomp_jax.methods.int8_int4 import int4, int8
from kvcomp_jax.methods.kivi import kivi
from kvcomp_jax.methods.knorm import knorm
from kvcomp_jax.methods.kvcomp import kvcomp
from kvcomp_jax.methods.kvquant import kvquant
from kvcomp_jax.methods.kvzip import kvzip
from kvcomp_jax.methods.nvfp4 import mxfp4, nvfp4
from kvcomp_jax.methods.packkv import packkv
from kvcomp_jax.methods.pyramid_infer import pyramid_infer
from kvcomp_jax.methods.pyramid_kv import pyramid_kv
from kvcomp_jax.methods.quarot import quarot
from kvcomp_jax.methods.quest import quest
from kvcomp_jax.methods.r_kv import r_kv
from kvcomp_jax.methods.registry import METHODS, Context, Method, MethodInfo, method, parse
from kvcomp_jax.methods.scissorhands import scissorhands
from kvcomp_jax.methods.snapkv import snapkv
from kvcomp_jax.methods.snapstream import snapstream
from kvcomp_jax.methods.streaming_llm import streaming_llm
from kvcomp_jax.methods.tova import tova
from kvcomp_jax.methods.turboquant import turboquant
from kvcomp_jax.methods.zeroc import zeroc
from kvcomp_jax.methods.zipcache import zipcache

__all__ = [
    "METHODS",
    "Context",
    "Method",
    "MethodInfo",
    "ada_kv",
    "arkvale",
    "cluster_kv",
    "critical_kv",
    "decoquant",
    "duo_attention",
    "expected_attention",
    "fisher_steps",
    "fp8",
    "full",
    "h2o",
    "hack",
    "int4",
    "int8",
    "kivi",
    "knorm",
    "kvcomp",
    "kvquant",
    "kvzip",
    "method",
    "mxfp4",
    "nvfp4",
    "packkv",
    "parse",
    "pyramid_infer",
    "pyramid_kv",
    "quarot",
    "quest",
    "r_kv",
    "scissorhands",
    "snapkv",
    "snapstream",
    "streaming_llm",
    "tova",
    "turboquant",
    "zeroc",
    "zipcache",
]
