"""Decode attention over entropy-coded rows: codes come back as they were written, and backends agree."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.entropy_decode import entropy_decode, planes, streams
from pallas_kernels.entropy_decode.canonical import code_lengths, code_starts, look_up_table
from pallas_kernels.entropy_decode.cases import CASES, Case
from pallas_kernels.entropy_decode.formats import PlaneFormat, Planes, StreamFormat, Streams
from tests.kernels.backends import backends, results
from tests.kernels.test_quantized_decode import assert_same_attention

lengths_of = jax.jit(code_lengths, static_argnums=1)  # op by op, each operation would compile alone


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", backends("entropy_decode"))
def test_a_backend_equals_the_reference(backend, name):
    got, want = results(entropy_decode, CASES[name], backend)
    assert_same_attention(got, want, 2e-2 if CASES[name].dtype == "bfloat16" else 2e-4)


@pytest.mark.parametrize("name", ["planes", "positions", "positions-per-head", "sliding-window"])
def test_shapes_are_those_of_the_arguments_but_for_the_size_of_slots(name):
    """A drawn slot holds any codes."""

    def sizeless(arguments):
        return jax.tree.map(lambda x: x[..., :1] if x.dtype in (jnp.uint16, jnp.uint32) else x, arguments)

    shapes = jax.eval_shape(lambda *x: sizeless(x), *CASES[name].shapes())
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, sizeless(CASES[name].arguments()[0]))


def optimal_cost(weights):
    """Bits of an unbounded Huffman code, by merging."""
    import heapq

    heap, cost = list(map(int, weights)), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        cost += both
        heapq.heappush(heap, both)
    return cost


@pytest.mark.parametrize("n", [2, 3, 12, 22, 36, 256])
def test_lengths_are_optimal_where_the_bound_does_not_bind(n):
    weights = np.random.default_rng(n).integers(1, 50, (4, n))
    lengths = np.asarray(lengths_of(jnp.asarray(weights, jnp.int32), 15))
    assert (2.0 ** -lengths.astype(float)).sum(-1).max() <= 1
    for w, length in zip(weights, lengths, strict=True):
        assert (w * length).sum() == optimal_cost(w)


def test_lengths_are_bounded_optimal_and_complete_where_it_binds():
    """Fibonacci weights want 12 bits for 13 symbols; the best with at most 5 is found by trying all."""
    weights = np.array([1, 1, 2, 3, 5, 8, 13])
    best = min(
        sum(w * x for w, x in zip(weights, lengths, strict=True))
        for lengths in np.ndindex(*(5,) * 7)
        if min(lengths) >= 1 and sum(2.0**-x for x in lengths) <= 1
    )
    lengths = np.asarray(lengths_of(jnp.asarray(weights, jnp.int32), 4))
    assert lengths.max() == 4
    assert (weights * lengths).sum() == best


def test_symbols_of_weight_0_have_codes_and_impossible_bounds_are_refused():
    lengths = np.asarray(lengths_of(jnp.zeros(256, jnp.int32).at[3].set(1000), 10))
    assert lengths.min() == lengths[3]
    assert lengths.min() >= 1
    assert lengths.max() <= 10
    assert np.asarray(lengths_of(jnp.ones(1, jnp.int32), 8)).tolist() == [1]
    with pytest.raises(ValueError, match="max_bits=4 has room for 16 codes, not for 17"):
        lengths_of(jnp.ones(17, jnp.int32), 4)


def test_codes_are_canonical_and_tables_invert_them():
    lengths = lengths_of(jnp.asarray([[5, 1, 9, 1, 1, 30]], jnp.int32), 8)
    starts, table = np.asarray(code_starts(lengths, 8))[0], np.asarray(look_up_table(lengths, 8))[0]
    order = sorted(range(6), key=lambda s: (int(lengths[0, s]), s))
    code, before = 0, int(lengths[0, order[0]])
    for symbol in order:
        length = int(lengths[0, symbol])
        code <<= length - before
        assert starts[symbol] == code << (8 - length)
        for rest in range(2 ** (8 - length)):
            assert table[starts[symbol] + rest] == symbol + 256 * length
        code, before = code + 1, length


@pytest.mark.parametrize("along", ["token", "channel"])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128, 192, 256])
def test_streams_round_trip_and_take_the_bits_of_their_codes(along, head_dim):
    rng = np.random.default_rng(head_dim)
    fmt = StreamFormat(64, head_dim, along, 8, 5)
    codes = rng.normal(11, 3, (2, 128, head_dim)).round().clip(0, 21).astype(np.uint8)
    tables = np.asarray(lengths_of(jnp.asarray(rng.integers(0, 99, (2, 1, 22)), jnp.int32), 8))
    lengths = streams.with_plain(jnp.asarray(tables), fmt)
    choice = np.array([[0, 1], [1, 0]], np.uint8)
    words, ends = jax.jit(streams.write, static_argnums=(3, 4))(
        jnp.asarray(codes), lengths, jnp.asarray(choice), 64 * head_dim * 8 // 32, fmt
    )
    enc = Streams(words, ends, jnp.asarray(choice), None, None)
    np.testing.assert_array_equal(jax.jit(streams.read, static_argnums=2)(enc, lengths, fmt), codes)
    for row in range(2):
        for unit in range(2):
            block = codes[row, unit * 64 : unit * 64 + 64]
            flat = (block if along == "token" else block.T).reshape(fmt.num_streams, fmt.stream)
            bits = np.asarray(lengths)[row, choice[row, unit]][flat].sum(-1)
            np.testing.assert_array_equal(ends[row, unit], (bits + 7) // 8)


def test_streams_lie_most_significant_bit_first_from_whole_bytes():
    fmt = StreamFormat(2, 4, "token", 8, 2, longest=4)
    codes = jnp.asarray([[[0, 1, 2, 3], [3, 3, 3, 1]]], jnp.uint8)
    lengths = jnp.full((1, 1, 4), 2, jnp.uint8)
    words, ends = streams.write(codes, lengths, jnp.zeros((1, 1), jnp.uint8), 1, fmt)
    assert ends.tolist() == [[[1, 1]]]
    assert int(words[0, 0, 0]) == 0b00011011_11111101 << 16


@pytest.mark.parametrize("pack", [8, 16, 32])
@pytest.mark.parametrize("kind", ["random", "constant", "full range"])
def test_planes_round_trip(kind, pack):
    rng = np.random.default_rng(pack)
    codes = rng.integers(0, 12, (2, 128, 24)).astype(np.uint8)
    if kind == "constant":
        codes[:] = codes[:, :1, :1]
    if kind == "full range":
        codes[:, ::pack], codes[:, 1::pack] = 0, 15
    fmt = PlaneFormat(64, 24, pack, 4)
    stored, heads = planes.write(jnp.asarray(codes), fmt.num_packs * 4, fmt)
    np.testing.assert_array_equal(planes.read(Planes(stored, heads, None, None), fmt), codes)
    width = planes.stored_widths(heads, fmt)
    packs = codes.reshape(2, 2, 64 // pack, pack, 24)
    spread = (packs.max(3) - packs.min(3)).reshape(width.shape)
    np.testing.assert_array_equal(width, np.ceil(np.log2(spread + 1.0)))
    assert (width.sum(-1) == {"constant": 0, "full range": 4 * fmt.num_packs}.get(kind, width.sum(-1))).all()


def test_bad_calls_are_refused():
    (q, k, v, *tables, length, _, _), options = Case().arguments()
    with pytest.raises(ValueError, match="does not fit keys"):
        entropy_decode(q[..., :32], k, v, *tables, length, **options)
    with pytest.raises(ValueError, match="do not fit 256 slots of keys"):
        entropy_decode(q, k, jax.tree.map(lambda x: x[:, :, : x.shape[2] // 2], v), *tables, length, **options)
    with pytest.raises(ValueError, match="pos and q_pos come together"):
        entropy_decode(q, k, v, *tables, length, **{**options, "sliding_window": 3})
    with pytest.raises(TypeError, match="streams need tables"):
        entropy_decode(q, k, v, None, None, length, **options)
    chex.assert_shape(entropy_decode(q, k, v, *tables, length, **options, implementation="reference")[0], q.shape)
