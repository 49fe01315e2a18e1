"""Faithfulness of QuaRot's cache: rotations, errors, bytes and what is exact."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvcomp_jax as kvc
from kvcomp_jax.codecs import Affine, Rotated
from kvcomp_jax.types import pytree
from pallas_kernels.hadamard import hadamard, hadamard_matrix
from pallas_kernels.packing import unpack
from tests.laws.parts import HEAD_DIM, attend, decode_many, decoded, encode, make, normal, prefill, qkv

INT4 = Affine(bits=4, axis="token")


@pytest.mark.parametrize("dim", [1, 2, 12, 20, 36, 40, 60, 64, 80, 96, 112, 128, 140, 256, 512, 576, 1536, 14336])
def test_rotations_are_orthonormal(dim):
    x = normal(0, 3, dim)
    y = hadamard(x)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)
    np.testing.assert_allclose(y @ y.T, x @ x.T, atol=2e-6 * dim)
    np.testing.assert_allclose(hadamard(y), x, atol=4e-6)


def test_a_power_of_two_is_the_walsh_matrix():
    i = np.arange(8)
    parity = np.array([[bin(a & b).count("1") % 2 for b in i] for a in i])
    np.testing.assert_array_equal(hadamard_matrix(8), 1 - 2 * parity)


@pytest.mark.parametrize("seed", [None, 7])
def test_rotated_queries_see_rotated_keys_as_before_and_values_come_back(seed):
    exact = Rotated(inner=kvc.Identity(), seed=seed)
    q, k, v = (normal(i, 2, 24, HEAD_DIM) for i in range(3))
    p, pos = jax.nn.softmax(normal(3, 2, 5, 24)), None
    kept_k, kept_v = encode(exact, k, pos), encode(exact, v, pos)
    assert float(jnp.abs(kept_k - k).max()) > 0.5  # what is kept is rotated
    np.testing.assert_allclose(exact.dot(q, kept_k, pos), q @ k.mT, atol=3e-5)
    np.testing.assert_allclose(exact.mix(p, kept_v, pos), p @ v, atol=3e-6)


@pytest.mark.parametrize(("factor", "least"), [(10, 3), (20, 6), (50, 15)])
def test_rotation_spreads_an_outlier_channel(factor, least):
    x = normal(0, 512, 128).at[:, 5].mul(factor)
    plain, turned = (
        float(jnp.square(decoded(codec, encode(codec, x, None), None) - x).mean())
        for codec in (INT4, Rotated(inner=INT4))
    )
    assert plain / turned > least


@pytest.mark.parametrize("clip", [1.0, 0.8])
def test_errors_stay_within_half_a_step_inside_the_range_and_keep_their_norm(clip):
    x = np.asarray(normal(1, 64, 128), np.float64)
    codec = Rotated(inner=Affine(bits=4, axis="token", clip=clip, metadata_dtype="float32"))
    enc = encode(codec, jnp.asarray(x, jnp.float32), None)
    turned = x @ hadamard_matrix(128) * 128**-0.5
    low, high = (f(turned, axis=-1, keepdims=True) * clip for f in (np.min, np.max))
    error = np.asarray(decoded(codec.inner, enc, None)) - turned
    inside = (turned >= low) & (turned <= high)
    assert inside.all() == (clip == 1)
    step = np.broadcast_to((high - low) / 15, error.shape)
    assert (np.abs(error[inside]) <= step[inside] * 0.5001).all()
    back = np.asarray(decoded(codec, enc, None)) - x
    np.testing.assert_allclose(np.linalg.norm(back, axis=-1), np.linalg.norm(error, axis=-1), rtol=1e-5)


def test_codes_are_the_released_quantisers():
    """scale = (max - min) / 15, zero = -min, code = round((x - min) / scale); with a clip ratio on both ends."""
    x = normal(2, 48, 128)
    enc = Rotated(inner=Affine(bits=4, axis="token", clip=0.95, metadata_dtype="float32")).encode(x, None)
    turned = np.asarray(x, np.float64) @ hadamard_matrix(128) * 128**-0.5
    low, high = (f(turned, axis=-1, keepdims=True) * 0.95 for f in (np.min, np.max))
    quotient = (turned - low) / ((high - low) / 15)
    tie = np.abs(quotient % 1 - 0.5) < 1e-4
    codes = np.clip(np.round(quotient), 0, 15)
    np.testing.assert_array_equal(np.asarray(unpack(enc.codes, 4))[~tie], codes[~tie])
    assert tie.mean() < 1e-2


@pytest.mark.parametrize(("bits", "per_value"), [(4, 4.25), (3, 3.25), (2, 2.25)])
def test_bits_a_value_and_packed_shapes(bits, per_value):
    heads, dim, tokens = 8, 128, 4096
    spec = kvc.parse(f"quarot:bits={bits}").spec(max_len=tokens, head_dim=dim)
    cache = jax.eval_shape(lambda: kvc.init(spec, batch=1, num_kv_heads=heads, head_dim=dim, dtype=jnp.bfloat16))
    (tier,) = cache.tiers
    for enc in (tier.k, tier.v):
        assert enc.codes.size * enc.codes.dtype.itemsize == heads * tokens * dim * bits // 8
        assert enc.scale.shape == enc.zero_point.shape == (1, heads, tokens, 1)
        assert enc.scale.dtype == enc.zero_point.dtype == jnp.float16
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((tier.k, tier.v)))
    assert stored * 8 / (2 * heads * tokens * dim) == per_value


@pytest.mark.parametrize(("bits", "shared"), [(4, 8), (2, 16), (3, 32)])
def test_only_tokens_that_wait_for_their_words_are_exact(bits, shared):
    q, k, v = qkv(0, 1, 120)
    cache = make(f"quarot:bits={bits}", batch=1, num_kv_heads=2, max_len=120)
    whole = kvc.causal_attention(q, k, v)
    out, cache = prefill(cache, q[:, :70], k[:, :70], v[:, :70])
    np.testing.assert_allclose(out, whole[:, :70], atol=1e-5)  # the prompt is attended to exactly
    assert int(cache.length[0] - cache.settled[0]) == 70 % shared
    _, cache = decode_many(cache, q[:, 70:], k[:, 70:], v[:, 70:])  # settles every `shared` steps
    assert cache.spec.block_size == shared
    assert int(cache.length[0] - cache.settled[0]) < 2 * shared
    assert cache.spec.window_slots == 2 * shared - 1


def test_a_step_reads_the_codes_of_earlier_ones():
    """A decoded token's output equals attention over what the codec makes of all settled tokens."""
    q, k, v = qkv(4, 1, 41, heads=(4, 2))
    cache = make("quarot", batch=1, num_kv_heads=2, max_len=48)
    _, cache = prefill(cache, q[:, :8], k[:, :8], v[:, :8])
    _, cache = decode_many(cache, q[:, 8:40], k[:, 8:40], v[:, 8:40])
    assert int(cache.settled[0]) == 40
    out, _ = decode_many(cache, q[:, 40:], k[:, 40:], v[:, 40:])
    codec = cache.tiers[0].k_codec
    coded = lambda x: decoded(codec, encode(codec, x[:, :40].swapaxes(1, 2), None), None).swapaxes(1, 2)
    k_hat, v_hat = (jnp.concatenate([coded(x), x[:, 40:]], 1) for x in (k, v))
    np.testing.assert_allclose(out[:, 0], kvc.causal_attention(q, k_hat, v_hat)[:, 40], atol=1e-4)


@pytest.mark.parametrize("text", ["quarot", "quarot:seed=5,k_bits=3", "quarot:rotate_v=false,symmetric=true"])
def test_a_fused_kernel_reads_the_rotated_codes(text):
    cache = make(text, batch=2, num_kv_heads=2, max_len=64)
    (rung,) = kvc.kernels_in_use(cache, num_heads=4)
    assert rung.operation == "quantized_decode"
    assert rung.codecs == ("Rotated(Affine)", "Affine" if "rotate_v" in text else "Rotated(Affine)")
    q, k, v = qkv(7, 2, 65)
    _, cache = prefill(cache, q[:, :64], k[:, :64], v[:, :64])
    fused, _ = attend(cache, q[:, 64:], k[:, 64:], v[:, 64:])
    (tier,) = cache.tiers
    k_hat, v_hat = (
        jnp.concatenate([decoded(c, e, None).swapaxes(1, 2), x[:, 64:]], 1)
        for c, e, x in ((tier.k_codec, tier.k, k), (tier.v_codec, tier.v, v))
    )
    np.testing.assert_allclose(fused[:, 0], kvc.causal_attention(q, k_hat, v_hat)[:, 64], atol=1e-4)


def test_head_dims_without_a_matrix_are_refused():
    with pytest.raises(ValueError, match="quarot: dim=50 has no Hadamard matrix here"):
        kvc.parse("quarot").spec(max_len=64, head_dim=50)


def test_rotated_values_survive_where_a_model_rotated_them_already():
    """With signs, a second rotation is no way back."""
    x = normal(3, 64, 64).at[:, 9].mul(40)
    twice = lambda seed: Rotated(inner=kvc.Identity(), seed=seed).encode(hadamard(x), None)
    peak = lambda y: float((jnp.abs(y).max(-1) / jnp.linalg.norm(y, axis=-1)).mean())
    assert peak(twice(None)) > 0.8
    assert peak(twice(1)) < 0.5


@pytree
class Centred(kvc.Identity):
    """Keeps the mean of a prompt as its parameter."""

    mean: jax.Array | None = None

    def prepare(self, batch, num_kv_heads, head_dim):
        return dataclasses.replace(self, mean=jnp.zeros((batch, num_kv_heads, head_dim)))

    def fit(self, x, live):
        return dataclasses.replace(self, mean=jnp.where(live[..., None], x, 0).sum(2) / live.sum(-1)[..., None])


def test_an_inner_codec_is_fitted_to_rotated_rows():
    x = normal(6, 2, 3, 20, 64)
    live = jnp.ones((2, 1, 20), bool)
    fitted = Rotated(inner=Centred()).prepare(2, 3, 64).fit(x, live)
    np.testing.assert_allclose(fitted.inner.mean, hadamard(x).mean(2), atol=1e-6)
