"""Integer codes to dense words and back: the bit layouts that the on-disk formats share.

Eight codes of `bits` bits fill exactly `bits` bytes, whatever the width: three halving steps on 64-bit lanes press
eight bytes of codes together, and the lower `bits` bytes of each lane are the stream. So no width needs code of its
own, not even 3 bits, whose codes straddle 32-bit words. Little-endian hosts only, as safetensors files are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of codes into one little-endian bit stream: code k lies at bits `k·bits .. k·bits + bits - 1`.

    This is the stream of GPTQ's `qweight` (along the inputs) and of compressed-tensors' `weight_packed`.

    Args:
        codes: uint8 [rows, n], each below `2**bits`; any device, meta included.
        bits: 1 to 8.

    Returns:
        int32 [rows, ceil(n * bits / 32)]; the bits past the last code are zero.
    """
    rows, n = codes.shape
    words = math.ceil(n * bits / 32)
    packed = codes.new_empty(rows, 4 * words)
    if codes.is_meta:
        return packed.view(torch.int32)
    for some in _chunks(codes):
        chunk = _flat(pad(codes[some], (0, -n % 8)) if n % 8 else codes[some])
        lanes = _press(chunk.view(torch.int64), bits).view(torch.uint8)
        stream = lanes.view(len(packed[some]), -1, 8)[:, :, :bits]
        if stream.numel() == packed[some].numel():
            packed[some].view(stream.shape).copy_(stream)
        else:  # a row may end inside a word, and the last lane of eight codes outside it
            stream = stream.flatten(1)
            packed[some] = pad(stream, (0, 4 * words - stream.shape[1]))
    return packed.view(torch.int32)


def unpack(words: Tensor, bits: int, n: int) -> Tensor:
    """Invert `pack`.

    Args:
        words: int32 [rows, ceil(n * bits / 32)]; any device, meta included.
        bits: 1 to 8.
        n: codes in a row.

    Returns:
        uint8 [rows, n].
    """
    codes = torch.empty(words.shape[0], n, dtype=torch.uint8, device=words.device)
    if words.is_meta:
        return codes
    stream = _flat(words).view(torch.uint8).view(words.shape[0], -1)
    lane_bytes = math.ceil(n / 8) * bits
    for some in _chunks(codes):
        chunk = pad(stream[some], (0, lane_bytes - stream.shape[1]))
        lanes = pad(chunk.reshape(len(chunk), -1, bits), (0, 8 - bits)).view(torch.int64)
        codes[some] = _spread(lanes, bits).view(torch.uint8).view(len(chunk), -1)[:, :n]
    return codes


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack 4-bit codes, flattened, two to a byte with the first in the high nibble: the layout of bitsandbytes.

    Args:
        codes: uint8 [m, n], each below 16; any device, meta included.

    Returns:
        uint8 [ceil(m * n / 2), 1]; an odd count is filled up with code 7, as bitsandbytes does (it pads the weight
        with 0, and 7 is NF4's code for 0).
    """
    if codes.is_meta:
        return codes.new_empty(math.ceil(codes.numel() / 2), 1)
    flat = _flat(codes)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_full((1,), 7)])
    pairs = flat.view(torch.int16)
    return ((pairs << 4) | (pairs >> 8)).to(torch.uint8)[:, None]


def unpack_nibbles(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Invert `pack_nibbles`: uint8 [ceil(m * n / 2), 1] to uint8 [m, n] = `shape`."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=-1).reshape(-1)[: math.prod(shape)].reshape(shape)


def _chunks(codes: Tensor) -> list[slice]:
    """Slices of whole rows, so that the temporaries stay in a processor's cache, or in bounds on an accelerator."""
    rows, n = codes.shape
    step = max(1, (1 << 18 if codes.device.type == "cpu" else 1 << 26) // max(1, n))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _flat(codes: Tensor) -> Tensor:
    """One-dimensional, and fit for a view as a wider type: the data must start at a multiple of its width."""
    flat = codes.contiguous().view(-1)
    return flat if flat.storage_offset() % 8 == 0 else flat.clone()


def _press(lanes: Tensor, bits: int) -> Tensor:
    """Move the eight codes of each 64-bit lane, one per byte, together towards the lowest bit."""
    for slot in (8, 16, 32):  # two neighbouring slots, each with slot/8 codes at its low end, become one
        width = slot // 8 * bits
        if width < slot:
            low = _mask(width, 2 * slot)
            lanes = (lanes & low).bitwise_or_((lanes >> (slot - width)).bitwise_and_(low << width))
    return lanes


def _spread(lanes: Tensor, bits: int) -> Tensor:
    """Invert `_press`."""
    for slot in (32, 16, 8):
        width = slot // 8 * bits
        if width < slot:
            low = _mask(width, 2 * slot)
            lanes = (lanes & low).bitwise_or_((lanes << (slot - width)).bitwise_and_(low << slot))
    return lanes


def _mask(width: int, period: int) -> int:
    """A 64-bit mask: `width` ones at the low end of every `period` bits."""
    return sum(((1 << width) - 1) << start for start in range(0, 64, period))
