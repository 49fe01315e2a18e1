"""The registered parts that every law runs over, and how inputs are drawn."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import kvcomp_jax as kvc
from kvcomp_jax.codecs import (
    AcrossHeads,
    Affine,
    Bounded,
    ChannelScaled,
    Codebook,
    Entropy,
    Float4,
    Float8,
    Homomorphic,
    Identity,
    LowRank,
    Outliers,
    Packs,
    PerChannel,
    PreRope,
    Rotated,
    Sketched,
    Stepped,
    TensorTrain,
)
from kvcomp_jax.types import Constant

HEAD_DIM = 64


def uneven(bits: int) -> Constant:
    """Levels between -1 and 1, denser around zero."""
    even = np.linspace(-1, 1, 2**bits)
    return Constant((np.sign(even) * np.abs(even) ** 1.5).astype(np.float32))


def per_channel(inner) -> PerChannel:
    """Scales from a half to two, for two heads."""
    draw = np.random.default_rng(1)
    scale, zero_point = draw.uniform(0.5, 2, (2, HEAD_DIM)), draw.standard_normal((2, HEAD_DIM))
    return PerChannel(
        inner=inner, scale=Constant(scale.astype(np.float32)), zero_point=Constant(zero_point.astype(np.float32))
    )


def low_rank(inner, rank: int, seed: int = 2) -> LowRank:
    """Random orthonormal directions, for two heads."""
    drawn = np.random.default_rng(seed).standard_normal((2, HEAD_DIM, rank))
    return LowRank(inner=inner, basis=Constant(np.linalg.qr(drawn)[0].astype(np.float32)))


ROPE = kvc.Rotary(Constant((1e4 ** -(np.arange(24) / 24)).astype(np.float32)), scale=1.2)  # 48 of 64 dimensions
PLAIN_LEVELS = Codebook(levels=uneven(3), normalise="none")

CODECS = [
    Identity(),
    *(Affine(bits=b, axis="token", group_size=32) for b in (2, 3, 4, 8)),
    *(Affine(bits=b, axis="channel", group_size=32) for b in (2, 3, 4, 8)),
    Affine(bits=8, axis="token", symmetric=True),
    Affine(bits=4, axis="token"),
    Affine(bits=4, axis="channel", group_size=64, symmetric=True),
    Affine(bits=2, axis="channel", group_size=32, metadata_dtype="float32"),
    *(Codebook(levels=uneven(b), normalise="range") for b in (2, 3, 4)),
    Codebook(levels=uneven(3), metadata_dtype="float32"),
    Codebook(levels=uneven(2), values=Constant(uneven(2).value * np.float32(1.1)), normalise="none"),
    Rotated(inner=Codebook(levels=uneven(4)), seed=0),
    Sketched(inner=Codebook(levels=uneven(1))),
    Rotated(inner=Sketched(inner=Affine(bits=2, axis="token"), seed=1, metadata_dtype="float32")),
    *(Float8(format=f, scale=s) for f in ("e4m3", "e5m2") for s in (0.25, "token")),
    *(Float4(group_size=16, block_scale="e4m3", scale=s) for s in (1.5, "token")),
    Float4(group_size=32, block_scale="e8m0"),
    Affine(bits=4, axis="token", clip=0.9),
    Rotated(inner=Identity()),
    *(Rotated(inner=Affine(bits=b, axis="token", clip=0.95)) for b in (2, 3, 4)),
    Rotated(inner=Affine(bits=4, axis="channel", group_size=32), seed=3),
    Outliers(inner=Affine(bits=2, axis="token", group_size=32), num_outliers=6),
    Outliers(inner=Affine(bits=4, axis="channel", group_size=32), num_outliers=2, value_dtype="bfloat16"),
    AcrossHeads(inner=Outliers(inner=Codebook(levels=uneven(3), normalise="range"), num_outliers=2), num_heads=2),
    AcrossHeads(inner=Outliers(inner=Identity(), num_outliers=2), num_heads=2),
    per_channel(PLAIN_LEVELS),
    PreRope(inner=Affine(bits=4, axis="channel", group_size=32), rope=ROPE),
    PreRope(inner=per_channel(AcrossHeads(inner=Outliers(inner=PLAIN_LEVELS, num_outliers=4), num_heads=2)), rope=ROPE),
    *(low_rank(Identity(), rank) for rank in (16, HEAD_DIM)),
    *(low_rank(Affine(bits=4, axis=axis, group_size=16), 32) for axis in ("token", "channel")),
    low_rank(Rotated(inner=Homomorphic(inner=Affine(bits=4, axis="token"))), 32),
    low_rank(AcrossHeads(inner=Outliers(inner=PLAIN_LEVELS, num_outliers=4), num_heads=2), 48),
    PreRope(inner=low_rank(Affine(bits=4, axis="channel", group_size=32), 48), rope=ROPE),
    Rotated(inner=Outliers(inner=Codebook(levels=uneven(2), normalise="range"), num_outliers=2)),
    *(Affine(bits=b, axis=a, group_size=32, rounding="stochastic") for b, a in ((2, "token"), (4, "channel"))),
    *(Homomorphic(inner=Affine(bits=2, axis=a, group_size=g)) for a in ("token", "channel") for g in (32, 64)),
    Homomorphic(inner=Affine(bits=3, axis="token")),
    *(Homomorphic(inner=Affine(bits=8, axis=a, group_size=32), keep_sums=False) for a in ("token", "channel")),
    Homomorphic(inner=Affine(bits=4, axis="channel", group_size=32, symmetric=True, rounding="stochastic", seed=3)),
    *(Rotated(inner=Homomorphic(inner=Affine(bits=2, axis=a, group_size=32)), seed=0) for a in ("token", "channel")),
    *(ChannelScaled(inner=Affine(bits=b, axis="token")) for b in (2, 3, 4)),
    TensorTrain(large=Affine(bits=4, axis="token", symmetric=True), block_size=64),
    TensorTrain(large=Affine(bits=3, axis="token"), block_size=32, rank=8, basis="run", dtype="float32"),
    TensorTrain(large=Identity(), block_size=16),
    Bounded(rel_scale=0.05, axis="block", group_size=64),
    Bounded(rel_scale=0.1, axis="token"),
    Bounded(rel_scale=0.25, axis="channel", group_size=32, metadata_dtype="float32"),
    Entropy(inner=Bounded(rel_scale=0.05, axis="block", group_size=64, zero_dtype="int8")),
    Entropy(inner=Bounded(rel_scale=0.1, axis="token"), budget=2.6, along="channel"),
    Entropy(inner=Bounded(rel_scale=0.25, axis="channel", group_size=32), block=32),
    Entropy(inner=Affine(bits=4, axis="token", group_size=32), budget=3.0),
    Entropy(inner=Affine(bits=8, axis="channel", group_size=32)),
    PreRope(inner=Entropy(inner=Bounded(rel_scale=0.1, axis="channel", group_size=32), block=32), rope=ROPE),
    Outliers(inner=Entropy(inner=Affine(bits=3, axis="token"), budget=2.5), num_outliers=2),
    *(Stepped(step=0.2, num_levels=n, group_size=32) for n in (12, 128)),
    per_channel(Entropy(inner=Stepped(step=0.3, group_size=16), budget=3.0, block=32, ratio=2.0)),
    Packs(inner=Bounded(rel_scale=0.1, axis="token")),
    Packs(inner=Bounded(rel_scale=0.05, axis="token"), budget=2.5, block=32, pack=8),
    Packs(inner=Affine(bits=4, axis="channel", group_size=64), budget=3.0),
    AcrossHeads(inner=TensorTrain(large=Affine(bits=4, axis="token", symmetric=True), block_size=32), num_heads=2),
    AcrossHeads(inner=ChannelScaled(inner=Affine(bits=4, axis="token")), num_heads=2),
    AcrossHeads(inner=Packs(inner=Bounded(rel_scale=0.1, axis="token"), budget=2.5), num_heads=2),
    AcrossHeads(inner=Entropy(inner=Bounded(rel_scale=0.1, axis="token"), along="channel"), num_heads=2),
]

CALIBRATIONS = Path(__file__).parents[1] / "golden" / "methods"
FISHER = "fisher_steps:block_size=32,calibration=fisher_steps.safetensors"
KVQUANT_3 = "kvquant:calibration=kvquant_3.safetensors"
KVQUANT_2 = "kvquant:bits=2,outliers=0.05,num_sinks=0,across_heads=False,calibration=kvquant_2.safetensors"
DUO = "duo_attention:num_sinks=3,recent=16,calibration=duo_attention_3_16.safetensors"
ZEROC = "zeroc:calibration=zeroc.safetensors"
PYRAMID = "pyramid_infer:thin=0.5,exceed=8"

QUEST = "quest:budget=48,full_layers=0"
CLUSTER_KV = "cluster_kv:budget=30,num_sinks=4,clusters=8,iterations=4,window=16,window_clusters=4,full_layers=0"
ARKVALE = "arkvale:budget=48,page_size=8,recalls=2,full_layers=0"

METHODS = [
    "full:block_size=16",
    "int8:block_size=16",
    "int4:block_size=16,window=8,num_sinks=3",
    "kivi:bits=2,residual=32",
    "kivi:k_bits=4,v_bits=3,residual=64",
    "hack:group_size=32,num_sinks=2",
    "hack:group_size=32,rotate=true,window=5",
    "kvcomp:block_size=32,k_recent=32,v_recent=128",
    "packkv:block_size=32,recent=48,pack=8",
    "packkv:block_size=32,recent=32,across_heads=true",
    "kvcomp:block_size=32,k_recent=32,v_recent=128,across_heads=true",
    "streaming_llm:budget=40",
    "streaming_llm:budget=0.5",
    "h2o:budget=40",
    "h2o:budget=0.5,num_sinks=2",
    "h2o:budget=64,block_size=4",
    "h2o:budget=90+int4",
    "streaming_llm:budget=100+kivi:bits=4",
    "quarot:k_bits=3,v_bits=2,seed=1,num_sinks=2",
    "turboquant:bits=2,sketch=true,block_size=32,num_sinks=2,window=5",
    "fp8:format=e5m2,scale=token,block_size=16",
    "nvfp4:block_size=16",
    "h2o:budget=90+mxfp4",
    f"{FISHER},window=5",
    f"{ZEROC},k_rank=32,v_rank=48,num_sinks=2,window=5",
    f"h2o:budget=90+{ZEROC},rank=32",
    f"{ZEROC},k_energy=0.8,v_energy=0.7,bits=4,prefill=stored",
    KVQUANT_3,
    f"h2o:budget=140+{KVQUANT_2}",
    "h2o:budget=140+packkv:block_size=32,pack=8",
    "snapkv:budget=140,window=16+kvcomp:block_size=32",
    "zipcache:block_size=40",
    "decoquant:block_size=32",
    "decoquant:bits=8,v_bits=2,basis=run,rank=8,block_size=16,num_sinks=2,window=5",
    "zipcache:bits=8,low_bits=3,low_share=0.5,divide_by=queries,num_sinks=2,window=5,across_heads=true",
    "snapkv:budget=40,window=8",
    "snapkv:budget=0.5,window=8,kernel_size=5,pooling=avg,num_sinks=2",
    "snapkv:budget=120,window=16+kivi:bits=4",
    "snapstream:budget=40,num_queries=6",
    "tova:budget=0.5",
    "knorm:budget=0.5,num_sinks=1",
    "expected_attention:budget=0.5,num_sinks=2",
    "scissorhands:budget=0.5,history=40,num_sinks=1",
    "r_kv:budget=0.5,buffer=12,recent=5,num_sinks=1",
    "ada_kv:budget=0.5,window=8",
    "ada_kv:budget=120,window=16+kivi:bits=4",
    "critical_kv:budget=0.5,by=snapkv,window=8,num_sinks=2,projected=false",
    DUO,
    f"{DUO}+int4",
    PYRAMID,
    QUEST,
    "quest:budget=0.5,page_size=8,heads=kv,full_layers=0",
    "quest:budget=64,heads=1,full_layers=0+kivi:bits=4",
    CLUSTER_KV,
    "cluster_kv:budget=0.5,num_sinks=2,window=16,window_clusters=3,heads=kv,full_layers=0+fp8",
    ARKVALE,
    ARKVALE + ",memory=host",
    CLUSTER_KV + ",memory=host",
    "arkvale:budget=0.5,page_size=8,n_groups=2,full_layers=0+int8",
    ARKVALE + ",volume=ball,radius=max+int4",
]

# One of each form of ladder, policy and contract of a codec; the others differ from one of these in codecs and options
# alone, and their laws are slow tests.
FORMS = {
    "full:block_size=16",
    "int4:block_size=16,window=8,num_sinks=3",
    "kivi:bits=2,residual=32",
    "hack:group_size=32,num_sinks=2",
    "streaming_llm:budget=40",
    "h2o:budget=0.5,num_sinks=2",
    f"{ZEROC},k_rank=32,v_rank=48,num_sinks=2,window=5",
    KVQUANT_3,
    "zipcache:block_size=40",
    "snapkv:budget=120,window=16+kivi:bits=4",
    "scissorhands:budget=0.5,history=40,num_sinks=1",
    "ada_kv:budget=120,window=16+kivi:bits=4",
    DUO,
    PYRAMID,
    QUEST,
    CLUSTER_KV,
    ARKVALE,
}

PROBING = [  # policies that judge a prompt by some of its queries
    kvc.Saliency(),
    kvc.Saliency(recent=0.2, random=0.3, num_sinks=2),
    kvc.Saliency(recent=1.0, random=0.0, divide_by="queries"),
]

RANKED = (
    "h2o",
    "zipcache",
    "snapkv",
    "snapstream",
    "tova",
    "knorm",
    "expected_attention",
    "scissorhands",
    "r_kv",
    "ada_kv",
    "critical_kv",
    "pyramid_infer",
)
BY_AGE = [m for m in METHODS if not m.startswith(RANKED)]
# What they store, or have at hand, depends on what the prompt was: a longer one leads to other tables.
FITTED = [m for m in METHODS if m.startswith(("kvcomp", "fisher_steps", "cluster_kv", "arkvale"))]

HEADS = [(4, 4), (6, 2), (3, 1)]  # multi-head, grouped-query, multi-query


# Jitted once: run op by op, each of the many small operations would compile alone, and cost more than the law.
prefill, decode, settle, attend, close_prompt, insert_row, free_row = map(
    jax.jit,
    (kvc.prefill, kvc.decode, kvc.settle, kvc.attend, kvc.close_prompt, kvc.insert_row, kvc.free_row),
)


@jax.jit
def encode(codec, x, pos):
    return codec.encode(x, pos)


@jax.jit
def decoded(codec, enc, pos):
    return codec.decode(enc, pos)


@jax.jit
def contracted(codec, q, p, enc, pos):
    """Both contractions, and those of the operands that they stand for with the decoded rows."""
    rows = codec.decode(enc, pos)
    wanted = jnp.matmul(codec.rounded_query(q), rows.mT), jnp.matmul(codec.rounded_probs(p), rows)
    return (codec.dot(q, enc, pos), codec.mix(p, enc, pos)), wanted


def normal(seed: int, *shape: int, dtype=jnp.float32):
    return jax.device_put(_drawn(seed, shape, dtype))  # unlike jnp.asarray, it compiles nothing


def qkv(seed: int, batch: int, tokens: int, heads=(4, 2), head_dim: int = HEAD_DIM, dtype=jnp.float32):
    """q [B, T, H, D], k, v [B, T, K, D]: arrays of NumPy's, of which slices compile nothing."""
    return tuple(
        _drawn(seed + i, (batch, tokens, num_heads, head_dim), dtype)
        for i, num_heads in enumerate((heads[0], heads[1], heads[1]))
    )


def _drawn(seed, shape, dtype):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def make(
    text: str,
    *,
    batch: int,
    num_kv_heads: int,
    max_len: int,
    prompt_lens=None,
    dtype=jnp.float32,
    window=None,
    num_heads=None,
):
    """Return the cache of one layer for a method in textual form; two query heads a KV head unless stated."""
    layout = kvc.Layout(
        num_layers=1,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        sliding_windows=(window,) if window else (),
        ropes=(ROPE,),
        calibrations=str(CALIBRATIONS),
        num_heads=num_heads or 2 * num_kv_heads,
    )
    longest = max(prompt_lens) if prompt_lens else max_len
    plan = kvc.parse(text).plan(layout, max_len=max_len, prompt_len=longest)
    return plan.init(batch=batch, dtype=dtype, prompt_lens=prompt_lens)[0]


@jax.jit
def ready(codec, x):
    """A codec with the parameters that fit rows x [1, K, S, D], as a cache would have it."""
    heads, tokens, dim = x.shape[1:]
    return codec.bind(x.dtype).prepare(1, heads, dim).fit(x, jnp.ones((1, 1, tokens), bool))


def decode_many(cache, q, k, v):
    """Feed tokens one by one, settling when due; return outputs [B, T, H, D] and the cache."""
    outs = []
    for t in range(q.shape[1]):
        out, cache = decode(cache, q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1])
        outs.append(out)
        if (t + 1) % cache.spec.block_size == 0:
            cache = settle(cache)
    return jnp.concatenate(outs, 1), cache


def first_rows(tier, num_tokens: int):
    """What a rung stores for its first tokens."""
    return jax.tree.map(lambda x: x[:, :, : num_tokens * x.shape[2] // tier.capacity], (tier.k, tier.v))
