"""The kernel that Triton compiles for a GPU: `make_batch`, one program of which makes one image.

A program finds its row (round keys, permutation and all) and draws its augmentation in scalars, then gathers,
scales, rounds and writes tiles. A row of a tile is one of the output's memory: of an image, or of one of its
planes. No function here reads or writes outside the tensors it is given, whatever `position` holds.

    make_batch[(batch,)](images=images, labels=labels, ..., epoch=3, start=0, size=512, ..., num_warps=2)

Legend: n images in the store, N samples in the split, H x W pixels, C channels, B rows of a batch.
"""

# Triton gives what stands in its functions types of its own.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from fastcifar.kernels.plan import IGNORE
from fastcifar.kernels.rng import AUGMENT, FIRST_FLIP, MIX, ORDER, PHILOX, WINDOW

__all__ = ["make_batch"]

_M0, _M1, _W0, _W1 = (tl.constexpr(word) for word in PHILOX)
_MIX0, _MIX1 = (tl.constexpr(word) for word in MIX)
_AUGMENT, _FIRST_FLIP, _ORDER, _WINDOW = (tl.constexpr(purpose) for purpose in (AUGMENT, FIRST_FLIP, ORDER, WINDOW))
_IGNORE = tl.constexpr(IGNORE)
_PLAIN = [  # arguments whose values select no code, so that nothing compiles again within an epoch
    *("epoch", "start", "size", "batch_size", "steps", "last_start", "last_size"),
    *("key0", "key1", "samples", "offset", "bits", "window_bits", "last_bits"),
]


@triton.jit
def _times(word, factor: tl.constexpr):
    """All 64 bits of a product of words: one instruction. With TRITON_DEBUG no product of 32 bits may wrap."""
    return word.to(tl.uint64) * factor


@triton.jit
def _philox(c0, c1, c2, purpose: tl.constexpr, k0, k1):
    """`rng.philox` of one counter, in uint32."""
    c3 = tl.full((), purpose, tl.uint32)
    for _ in tl.static_range(10):
        p0, p1 = _times(c0, _M0), _times(c2, _M1)
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0, k1 = (k0.to(tl.uint64) + _W0).to(tl.uint32), (k1.to(tl.uint64) + _W1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _mix(h):
    h ^= h >> 16
    h = _times(h, _MIX0).to(tl.uint32)
    h ^= h >> 13
    h = _times(h, _MIX1).to(tl.uint32)
    return h ^ (h >> 16)


@triton.jit
def _two_rounds(left, right, left_mask, right_mask, even, odd):
    right ^= _mix(left ^ even) & right_mask
    left ^= _mix(right ^ odd) & left_mask
    return left, right


@triton.jit
def _network(value, bits, a0, a1, a2, a3, b0, b1, b2, b3):
    """The Feistel network, once: of a uint64 of `bits` bits, whose halves have 32 bits at most."""
    left_bits = (bits // 2).to(tl.uint64)
    right_bits = bits.to(tl.uint64) - left_bits
    one = tl.full((), 1, tl.uint64)
    left_mask = ((one << left_bits) - 1).to(tl.uint32)
    right_mask = ((one << right_bits) - 1).to(tl.uint32)
    left, right = (value >> right_bits).to(tl.uint32), value.to(tl.uint32) & right_mask
    left, right = _two_rounds(left, right, left_mask, right_mask, a0, a1)
    left, right = _two_rounds(left, right, left_mask, right_mask, a2, a3)
    left, right = _two_rounds(left, right, left_mask, right_mask, b0, b1)
    left, right = _two_rounds(left, right, left_mask, right_mask, b2, b3)
    return (left.to(tl.uint64) << right_bits) | right.to(tl.uint64)


@triton.jit
def _permute(position, samples, bits, second, epoch, purpose: tl.constexpr, key0, key1):
    """`rng.permute` of one position; the round keys are of the counters (0 and 1, second, epoch, purpose)."""
    zero = tl.full((), 0, tl.uint32)
    a0, a1, a2, a3 = _philox(zero, second, epoch, purpose, key0, key1)
    b0, b1, b2, b3 = _philox(zero + 1, second, epoch, purpose, key0, key1)
    limit = samples.to(tl.uint64)
    value = _network(position.to(tl.uint64), bits, a0, a1, a2, a3, b0, b1, b2, b3)
    while value >= limit:
        value = _network(value, bits, a0, a1, a2, a3, b0, b1, b2, b3)
    return value.to(tl.int64)


@triton.jit
def _permute_blocks(
    position, samples, bits, window_bits, last_bits, epoch, key0, key1, block: tl.constexpr, span: tl.constexpr
):
    """`rng.permute_blocks` of one position."""
    zero = tl.full((), 0, tl.uint32)
    window = position // span
    first = window * span
    length = tl.minimum(samples - first, span)
    own_bits = tl.where(length == span, window_bits, last_bits)
    place = first + _permute(position - first, length, own_bits, window.to(tl.uint32), epoch, _WINDOW, key0, key1)
    slot, offset = place // block, place % block
    full = samples // block
    if slot < full:
        slot = _permute(slot, full, bits, zero, epoch, _ORDER, key0, key1)
    w0, w1, _, _ = _philox(zero + 2, zero, epoch, _ORDER, key0, key1)
    limit = samples.to(tl.uint64)
    sample = (slot * block + offset).to(tl.uint64) + ((w1.to(tl.uint64) << 32) | w0.to(tl.uint64)) % limit
    return tl.where(sample < limit, sample, sample - limit).to(tl.int64)


@triton.jit
def _draw(
    row, epoch, key0, key1, height: tl.constexpr, width: tl.constexpr,
    crop: tl.constexpr, flip: tl.constexpr, cutout: tl.constexpr,
):  # fmt: skip
    """`rng.draws` of one row."""
    low, high = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    w0, w1, w2, w3 = _philox(low, high, epoch, _AUGMENT, key0, key1)
    span = tl.full((), 2 * crop + 1, tl.uint32)
    dy = tl.umulhi(w0, span).to(tl.int32) - crop
    dx = tl.umulhi(w1, span).to(tl.int32) - crop
    flipped = w2 >> 31
    if flip == "alternating":
        first, _, _, _ = _philox(low, high, tl.full((), 0, tl.uint32), _FIRST_FLIP, key0, key1)
        flipped = (first >> 31) ^ (epoch & 1)
    # the halves of w3 times 2**16, so that the high words of the products are what `draws` shifts down
    y0 = tl.umulhi(w3 & 0xFFFF0000, tl.full((), height - cutout + 1, tl.uint32)).to(tl.int32)
    x0 = tl.umulhi(w3 << 16, tl.full((), width - cutout + 1, tl.uint32)).to(tl.int32)
    return dy, dx, flipped, y0, x0


@triton.jit
def _reflect(index, length: tl.constexpr):
    """Mirrored at 0 and at length - 1, once."""
    return length - 1 - tl.abs(length - 1 - tl.abs(index))


@triton.jit
def _factor(factors, c, channels: tl.constexpr):
    """`factors[c]`, chosen from scalars: gathered, they would have to change threads through shared memory."""
    chosen = tl.where(c == 0, tl.load(factors), 0.0)
    if channels <= 4:
        for j in tl.static_range(1, channels):
            chosen = tl.where(c == j, tl.load(factors + j), chosen)
    else:
        for j in range(1, channels):
            chosen = tl.where(c == j, tl.load(factors + j), chosen)
    return chosen


@triton.jit(do_not_specialize=_PLAIN)
def make_batch(
    images,  # uint8[n, H, W, C], or uint8[size, H, W, C] where staged
    rows,  # int64[N] or None, or int64[size] where staged
    labels,  # int64[n], or int64[size] where staged
    scale,  # float32[C]
    shift,  # float32[C]
    position,  # int64[2], (epoch, step), or None
    out,  # float[B, H, W, C], or float[B, C, H, W] where planar
    targets,  # int64[B]
    epoch: tl.uint32,  # unless `position` says
    start: tl.int64,  # first position; where `position` says which batch, counted from that one's
    size: tl.int64,
    batch_size: tl.int64,
    steps: tl.int64,  # in an epoch
    last_start: tl.int64,  # start and size in its last step
    last_size: tl.int64,
    key0: tl.uint32,
    key1: tl.uint32,
    samples: tl.int64,
    offset: tl.int64,
    bits: tl.int32,  # of the permutation of samples or blocks, of that within a window, and within the last
    window_bits: tl.int32,
    last_bits: tl.int32,
    staged: tl.constexpr,
    order: tl.constexpr,
    block: tl.constexpr,
    span: tl.constexpr,  # of a window, in samples
    height: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    crop: tl.constexpr,
    padding: tl.constexpr,
    flip: tl.constexpr,
    cutout: tl.constexpr,
    planar: tl.constexpr,
    tile_rows: tl.constexpr,  # powers of 2
    tile_columns: tl.constexpr,
):
    """Make a batch: the samples at positions start to start + size - 1, or those of the step that `position` holds."""
    i = tl.program_id(0).to(tl.int64)
    epoch, key0, key1 = epoch.to(tl.uint32), key0.to(tl.uint32), key1.to(tl.uint32)  # the interpreter knows no types
    if position is not None:
        epoch, step = tl.load(position).to(tl.uint32), tl.load(position + 1)
        is_last = step == steps - 1
        start = step * batch_size + tl.where(is_last, last_start, start)
        size = tl.where((step >= 0) & (step < steps), tl.where(is_last, last_size, size), 0)

    memory_rows: tl.constexpr = channels * height if planar else height
    memory_columns: tl.constexpr = width if planar else width * channels
    elements: tl.constexpr = height * width * channels
    out += i * elements
    if i >= size:
        for r0 in range(0, memory_rows, tile_rows):
            r = r0 + tl.arange(0, tile_rows)[:, None]
            for k0 in range(0, memory_columns, tile_columns):
                k = k0 + tl.arange(0, tile_columns)[None, :]
                zeros = tl.full((tile_rows, tile_columns), 0.0, out.dtype.element_ty)
                tl.store(out + r * memory_columns + k, zeros, mask=(r < memory_rows) & (k < memory_columns))
        tl.store(targets + i, _IGNORE)
    else:
        if staged:
            row = tl.load(rows + i)
            image = i
        else:
            row = start + i
            if order == "random":
                row = _permute(row, samples, bits, tl.full((), 0, tl.uint32), epoch, _ORDER, key0, key1)
            elif order == "block":
                row = _permute_blocks(row, samples, bits, window_bits, last_bits, epoch, key0, key1, block, span)
            row = row + offset if rows is None else tl.load(rows + row)
            image = row
        label = tl.load(labels + image)
        images += image * elements
        dy, dx, flipped, y0, x0 = _draw(row, epoch, key0, key1, height, width, crop, flip, cutout)
        for k0 in range(0, memory_columns, tile_columns):
            k = k0 + tl.arange(0, tile_columns)[None, :]  # [1, tile_columns]
            x = k if planar else k // channels
            source_x = x
            inside_x = k < memory_columns
            present_x = inside_x
            if crop > 0:
                source_x += dx
                if padding == "reflect":
                    source_x = _reflect(source_x, width)
                else:
                    present_x &= (source_x >= 0) & (source_x < width)
            if flip != "none":
                source_x = tl.where(flipped == 1, width - 1 - source_x, source_x)
            at_x = source_x * channels if planar else source_x * channels + k % channels
            for r0 in range(0, memory_rows, tile_rows):
                r = r0 + tl.arange(0, tile_rows)[:, None]  # [tile_rows, 1]
                y = r % height if planar else r
                source_y = y
                inside_y = r < memory_rows
                present_y = inside_y
                if crop > 0:
                    source_y += dy
                    if padding == "reflect":
                        source_y = _reflect(source_y, height)
                    else:
                        present_y &= (source_y >= 0) & (source_y < height)
                c = r // height if planar else k % channels
                at_y = source_y * (width * channels) + c if planar else source_y * (width * channels)
                pixel = tl.load(images + at_y + at_x, mask=present_y & present_x, other=0)  # [tile_rows, tile_columns]
                a, b = _factor(scale, c, channels), _factor(shift, c, channels)
                if cutout > 0:  # 0 * pixel + 0: were the results chosen, they would be converted one by one
                    cut = (y >= y0) & (y < y0 + cutout) & (x >= x0) & (x < x0 + cutout)
                    a, b = tl.where(cut, 0.0, a), tl.where(cut, 0.0, b)
                value = a * pixel.to(tl.float32) + b
                tl.store(out + r * memory_columns + k, value.to(out.dtype.element_ty), mask=inside_y & inside_x)
        tl.store(targets + i, label)  # at the end, as nothing above waits for it
