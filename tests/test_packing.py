"""Bit layouts, against numpy's bit functions and the libraries that read them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loftq_cli.quantizers.packing import pack, pack_nibbles, unpack, unpack_nibbles


def codes_like(rows: int, n: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, n), dtype=torch.uint8, generator=generator)


def pack_by_numpy(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """One bit at a time: slow, and nothing to do with lanes and masks."""
    stream = np.unpackbits(codes.numpy()[:, :, None], axis=2, bitorder="little", count=bits).reshape(len(codes), -1)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return torch.from_numpy(np.packbits(stream, axis=1, bitorder="little").view("<i4").copy())


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 130), st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_pack_is_a_dense_little_endian_stream(bits: int, rows: int, n: int, seed: int) -> None:
    codes = codes_like(rows, n, bits, seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert torch.equal(words, pack_by_numpy(codes, bits))
    assert torch.equal(unpack(words, bits, n), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_extreme_codes_do_not_bleed_into_their_neighbours(bits: int) -> None:
    for pattern in ([0, 2**bits - 1], [2**bits - 1, 0], [2**bits - 1] * 2):
        codes = torch.tensor(pattern, dtype=torch.uint8).repeat(2, 64)
        assert torch.equal(unpack(pack(codes, bits), bits, 128), codes)
        assert torch.equal(pack(codes, bits), pack_by_numpy(codes, bits))


def test_three_bit_codes_straddle_words() -> None:
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 10] = 0b101  # bits 30, 31 and 32
    assert pack(codes, 3).tolist() == [[0b01 << 30, 1, 0]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(700, 1000), (3, 400_000), (1, 300_001)])
def test_chunks_join_without_a_seam(bits: int, shape: tuple[int, int]) -> None:
    codes = codes_like(*shape, bits)
    words = pack(codes, bits)
    assert torch.equal(words, pack_by_numpy(codes, bits))
    assert torch.equal(unpack(words, bits, shape[1]), codes)


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_views_pack_as_their_copies_do(bits: int) -> None:
    codes = codes_like(65, 65, bits)
    for view in (codes.T, codes[1:, 1:], codes[::2, ::2], codes[:, :1].T, codes[:1].T, codes.reshape(-1)[3:67][None]):
        words = pack(view, bits)
        assert torch.equal(words, pack(view.clone(memory_format=torch.contiguous_format), bits))
        assert torch.equal(unpack(words.T.contiguous().T, bits, view.shape[1]), view)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_agrees_with_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = codes_like(5, 100, bits)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), helpers.pack_to_int32(signed, bits))


@given(st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_nibbles_go_high_half_first(m: int, n: int) -> None:
    codes = codes_like(m, n, 4)
    packed = pack_nibbles(codes)
    flat = [*codes.reshape(-1).tolist(), 7]
    assert packed.shape == ((m * n + 1) // 2, 1)
    assert packed[:, 0].tolist() == [flat[k] * 16 + flat[k + 1] for k in range(0, m * n, 2)]
    assert torch.equal(unpack_nibbles(packed, (m, n)), codes)


@pytest.mark.parametrize(("bits", "n"), [(2, 64), (3, 33), (4, 1), (8, 7)])
def test_meta_tensors_have_the_shapes_and_dtypes_of_real_ones(bits: int, n: int) -> None:
    codes = codes_like(3, n, bits)
    words, packed = pack(codes, bits), pack_nibbles(codes & 15)
    on_meta = pack(codes.to("meta"), bits), pack_nibbles(codes.to("meta"))
    assert [(t.shape, t.dtype) for t in on_meta] == [(t.shape, t.dtype) for t in (words, packed)]
    assert unpack(words.to("meta"), bits, n).shape == codes.shape
    assert unpack_nibbles(packed.to("meta"), (3, n)).shape == codes.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_gpu_packs_the_same_bytes(bits: int) -> None:
    codes = codes_like(33, 1000, bits)
    there = codes.cuda()
    torch.cuda.set_sync_debug_mode("error")  # and does not wait for it
    try:
        words, nibbles = pack(there, bits), pack_nibbles(there)
        restored = unpack(words, bits, 1000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(words.cpu(), pack(codes, bits))
    assert torch.equal(nibbles.cpu(), pack_nibbles(codes))
    assert torch.equal(restored.cpu(), codes)
