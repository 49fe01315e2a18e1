"""Laws 1, 2 and 7: contractions agree with decode, errors are bounded, nbits is what is stored."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import checkify

from kvcomp_jax.codecs import Affine, Identity, Rotated
from kvcomp_jax.codecs.budgeted import Budgeted
from pallas_kernels.packing import BITS, pack, pack_unit, unpack
from tests.laws.parts import CODECS, HEAD_DIM, contracted, decoded, encode, normal, ready

AFFINE = [c for c in CODECS if isinstance(c, Affine) and c.clip == 1]


def draw(seed, tokens, scale=1.0):
    x = normal(seed, 1, 2, tokens, HEAD_DIM) * scale
    pos = jnp.broadcast_to(jnp.arange(tokens), (1, 2, tokens))
    return x, pos


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@given(seed=st.integers(0, 2**16))
def test_dot_and_mix_agree_with_decode(codec, seed):
    x, pos = draw(seed, 192)
    q, p = normal(seed + 1, 1, 2, 5, HEAD_DIM), normal(seed + 2, 1, 2, 5, 192)
    codec = ready(codec, x)
    (logits, mixed), wanted = contracted(codec, q, p, encode(codec, x, pos), pos)
    # Products on symbols count from code 0; where that stands far from the values, large sums cancel in float32.
    atol = 5e-4 if "Stepped" in repr(codec) else 5e-5
    chex.assert_trees_all_close(logits, wanted[0], atol=atol)
    chex.assert_trees_all_close(mixed, wanted[1], atol=atol)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_operands_are_rounded_by_half_of_an_8_bit_step_at_most(codec):
    """In the basis that the codec multiplies in: queries enter it, probabilities have none."""
    codec = ready(codec, draw(0, 64)[0])
    q, p = normal(1, 1, 2, 5, HEAD_DIM), jnp.abs(normal(2, 1, 2, 5, 192))
    operands = (codec.enter(q), codec.enter(codec.rounded_query(q))), (p, codec.rounded_probs(p))
    for x, taken in operands:
        largest_step = (x.max(-1) - x.min(-1)) / 255
        assert bool((jnp.abs(taken - x) <= 0.501 * largest_step[..., None]).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_identity_is_exact(dtype):
    x, pos = draw(0, 7)
    x = x.astype(dtype)
    codec = Identity().bind(dtype)
    chex.assert_trees_all_equal(decoded(codec, encode(codec, x, pos), pos), x)


@pytest.mark.parametrize("codec", AFFINE, ids=repr)
@given(seed=st.integers(0, 2**16), scale=st.sampled_from([1e-3, 1.0, 300.0]))
def test_affine_error_is_half_a_step_or_a_whole_one_beyond_metadata_rounding(codec, seed, scale):
    x, pos = draw(seed, 64, scale)
    enc = encode(codec, x, pos)
    step = jnp.repeat(
        enc.scale.astype(jnp.float32),
        codec.group_size or HEAD_DIM,
        axis=-1 if codec.axis == "token" else -2,
    )
    unit = float(jnp.finfo(codec.metadata_dtype).eps)
    largest = jnp.abs(x).max()
    slack = (
        4 * unit * largest + (2**codec.bits) * unit * step + float(jnp.finfo(codec.metadata_dtype).tiny) * 2**codec.bits
    )
    bound = step / 2 if codec.rounding == "nearest" else step
    assert bool((jnp.abs(decoded(codec, enc, pos) - x) <= bound + slack).all())


def code_bytes(enc):
    """Bytes that are not metadata: exact rows, and all that is called codes, at any depth."""
    if isinstance(enc, jax.Array):
        return enc.nbytes
    parts = enc._asdict() if isinstance(enc, tuple) else vars(enc)
    codes = sum(parts[name].nbytes for name in ("codes", "words", "planes") if name in parts)
    return codes + sum(code_bytes(parts[name]) for name in ("inner", "dense", "rows", "large") if name in parts)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_nbits_is_what_is_stored(codec):
    x, pos = draw(0, 192)
    codec = ready(codec, x)
    enc = encode(codec, x, pos)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(enc)) * 8
    total, metadata = codec.size(192, 2, HEAD_DIM)
    assert stored == total
    assert stored - 8 * code_bytes(enc) == metadata
    if not codec.joins_heads:
        assert (total, metadata) == (2 * codec.nbits(192, HEAD_DIM), 2 * codec.metadata_bits(192, HEAD_DIM))


@pytest.mark.slow
@pytest.mark.parametrize("codec", {codec.name: codec for codec in CODECS}.values(), ids=repr)
def test_values_that_are_not_finite_are_an_error_under_checkify_or_stay(codec):
    """Never numbers of their own: codes cannot say them, and outliers and exact rows hold them as they are."""
    x, pos = draw(4, 192)
    codec = ready(codec, x)
    checked = jax.jit(checkify.checkify(lambda x: codec.decode(codec.encode(x, pos), pos)))
    checkify.check_error(checked(x)[0])
    for bad in (jnp.nan, jnp.inf):
        error, rows = checked(x.at[0, 1, 70, 5].set(bad))
        if error.get() is None:
            assert not np.isfinite(rows[0, 1, 70, 5])
        else:
            assert "not finite; they have no codes" in error.get()


@pytest.mark.parametrize("codec", [c for c in CODECS if isinstance(c, Budgeted)], ids=repr)
def test_what_slots_have_to_spare_is_empty_and_all_of_it(codec):
    """Zeroing the spare end of each slot changes nothing; one byte or plane more of a full stream would."""
    x, pos = draw(1, 192)
    codec = ready(codec, x)
    enc = encode(codec, x, pos)
    spare = np.asarray(codec.spare_bits(enc))
    assert spare.min() >= 0
    assert codec.nbits(192, HEAD_DIM) * 2 - spare.sum() < sum(leaf.nbytes for leaf in jax.tree.leaves(enc)) * 8
    name = "words" if hasattr(enc, "words") else "planes"
    slots = np.array(getattr(enc, name))
    size = slots.dtype.itemsize * 8
    in_order = slots[..., None].astype(f">u{size // 8}").view(np.uint8)
    bits = np.unpackbits(in_order, axis=-1).reshape(*spare.shape, -1)
    assert bits.shape[-1] == codec.slot_bits(HEAD_DIM)
    for unit in np.ndindex(spare.shape):
        used = bits.shape[-1] - spare[unit]
        assert not bits[unit][used:].any()
        assert bits[unit][used - 64 : used].any()


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_encodings_of_consecutive_units_concatenate(codec):
    x, pos = draw(3, 192)
    codec = ready(codec, x)
    whole = encode(codec, x, pos)
    parts = [encode(codec, x[:, :, i : i + 64], pos[:, :, i : i + 64]) for i in (0, 64, 128)]
    chex.assert_trees_all_equal(whole, jax.tree.map(lambda *leaves: jnp.concatenate(leaves, 2), *parts))


@pytest.mark.parametrize("bits", [1, *BITS])
@given(seed=st.integers(0, 2**16), size=st.sampled_from([(1, 9), (5, 1)]))
def test_packing_round_trips_at_exactly_bits_a_code(bits, seed, size):
    units, dim = size
    tokens = units * pack_unit(bits)
    codes = np.random.default_rng(seed).integers(0, 2**bits, (3, tokens, dim), dtype=np.uint8)
    words = pack(jnp.asarray(codes), bits)
    assert words.nbytes * 8 == codes.size * bits
    np.testing.assert_array_equal(unpack(words, bits), codes)


def test_words_are_little_endian_along_tokens():
    codes = jnp.arange(8, dtype=jnp.uint8)[:, None]
    assert int(pack(codes, 4)[0, 0]) == 0x76543210


@pytest.mark.parametrize("codec", AFFINE, ids=repr)
def test_constant_groups_and_zeros_come_back_exactly(codec):
    pos = jnp.zeros((1, 64), jnp.int32)
    for value in (0.0,) if codec.symmetric else (0.0, -1.5, 7.0):
        x = jnp.full((1, 64, HEAD_DIM), value)
        chex.assert_trees_all_equal(decoded(codec, encode(codec, x, pos), pos), x)


def test_huge_values_stay_finite():
    codec = Affine(bits=2, axis="token", group_size=32)
    x = jnp.full((1, 16, HEAD_DIM), 1e9).at[..., ::2].set(-1e9)
    assert bool(jnp.isfinite(decoded(codec, encode(codec, x, None), None)).all())


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"bits": 5, "axis": "token"}, "bits=5 must be one of 2, 3, 4, 8"),
        ({"bits": 4, "axis": "token", "rounding": "up"}, "rounding='up' must be 'nearest' or 'stochastic'"),
        ({"bits": 4, "axis": "row"}, "axis='row' must be 'token' or 'channel'"),
        ({"bits": 4, "axis": "channel"}, "needs a group_size"),
        ({"bits": 2, "axis": "channel", "group_size": 24}, "group_size=24 must be a multiple of 16"),
        ({"bits": 4, "axis": "token", "clip": 0.0}, r"clip=0.0 must be in \(0, 1\]"),
        ({"bits": 2, "axis": "token", "group_size": 0}, "group_size=0 must be at least 1"),
    ],
)
def test_impossible_codecs_are_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        Affine(**kwargs)


@pytest.mark.parametrize("codec", [c for c in CODECS if isinstance(c, Rotated)], ids=repr)
def test_rotation_keeps_norms_and_undoes_itself(codec):
    x, _ = draw(5, 16)
    y = codec.enter(x)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(codec.leave(y), x, atol=2e-6)


def test_rotation_of_other_head_dims_is_refused():
    with pytest.raises(ValueError, match="dim=6 has no Hadamard matrix"):
        Rotated(inner=Affine(bits=4, axis="token")).check(6, 64)


def test_group_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="group_size=48 must divide head_dim=64"):
        Affine(bits=4, axis="token", group_size=48).check(64, 64)
    with pytest.raises(ValueError, match="group_size=64 must divide block_size=96"):
        Affine(bits=4, axis="channel", group_size=64).check(64, 96)
