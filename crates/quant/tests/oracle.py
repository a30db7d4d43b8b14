#!/usr/bin/env python3
"""Golden files of every coding: stored tensors, and the weights that they are, computed one by one in plain loops.

    pip install numpy
    python crates/quant/tests/oracle.py

Writes crates/quant/tests/golden/NAME.safetensors and blocks.gguf. Each of the first holds one matrix, or several on top of each other, as some checkpoint would
keep it, and beside it `expected` F32: the same weights as float32. Its metadata says under which name a plain checkpoint would keep the
tensor, and what its configuration hints at. blocks.gguf holds a tensor of each format, and beside
each NAME its weights, NAME.expected. Nothing here is fast, and nothing is shared with what it judges.
"""

import json
import math
import struct
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
f32 = np.float32


# --- Numbers -----------------------------------------------------------------------------------------------------------------------

def e4m3(code):
    code = int(code)
    exponent, fraction = code >> 3 & 15, code & 7
    assert code & 0x7F != 0x7F, "NaN"
    size = fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -size if code & 0x80 else size


def e5m2(code):
    code = int(code)
    exponent, fraction = code >> 2 & 31, code & 3
    assert exponent != 31, "NaN or infinity"
    size = fraction / 4 * 2.0**-14 if exponent == 0 else (1 + fraction / 4) * 2.0 ** (exponent - 15)
    return -size if code & 0x80 else size


def e2m1(code):
    return [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][code & 7] * (-1 if code & 8 else 1)


def e8m0(code):
    assert code != 255, "NaN"
    return 2.0 ** (int(code) - 127)


def bf16_bits(value):
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def bf16(bits):
    return struct.unpack("<f", struct.pack("<I", int(bits) << 16))[0]


def times(value, scale):
    """A product of two float32, rounded to float32."""
    return f32(float(value) * float(scale))  # float64 holds such a product exactly


# --- Files -------------------------------------------------------------------------------------------------------------------------

KINDS = {"F32": f32, "F16": np.float16, "BF16": np.uint16, "F8_E4M3": np.uint8, "F8_E5M2": np.uint8, "F8_E8M0": np.uint8, "U8": np.uint8,
         "I8": np.int8, "I32": np.int32, "I64": np.int64}


def save(name, tensor, stored, expected, hints={}):
    stored = stored | {"expected": ("F32", np.asarray(expected, f32))}
    header, data = {"__metadata__": {"tensor": tensor, "hints": json.dumps(hints)}}, b""
    for key, (kind, values) in stored.items():
        values = np.ascontiguousarray(values)
        assert values.dtype == KINDS[kind], (key, kind, values.dtype)
        header[key] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [len(data), len(data) + values.nbytes]}
        data += values.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (GOLDEN / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


# --- Codings -----------------------------------------------------------------------------------------------------------------------

def random_fp8(rng, shape):
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[codes & 0x7F >= 0x7C] = 0x38  # neither NaN nor, for e5m2, infinity
    return codes


def scales(rng, kind, shape):
    """Stored scales of some format, and their values."""
    values = rng.uniform(0.5, 2, shape) * 2.0 ** rng.integers(-9, -4, shape)
    if kind == "F8_E8M0":
        stored = rng.integers(118, 126, shape).astype(np.uint8)
        return stored, np.vectorize(e8m0)(stored)
    if kind == "BF16":
        stored = np.vectorize(bf16_bits)(values).astype(np.uint16)
        return stored, np.vectorize(bf16)(stored)
    stored = values.astype(KINDS[kind])
    return stored, stored.astype(float)


def fp8(name, rng, shape, block, kind="F32", dtype="F8_E4M3", grid=None, suffix=".weight_scale_inv"):
    """Blocks of rows × columns; `grid` is the shape under which the scales are stored, where it is another."""
    value = e4m3 if dtype == "F8_E4M3" else e5m2
    *lead, n, k = shape
    codes = random_fp8(rng, shape)
    stored, scale = scales(rng, kind, (*lead, math.ceil(n / block[0]), math.ceil(k / block[1])))
    expected = np.zeros(shape, f32)
    for index in np.ndindex(*shape):
        *e, i, j = index
        expected[index] = times(value(codes[index]), scale[(*e, i // block[0], j // block[1])])
    tensor = "x.weight" if suffix.startswith(".") else "x"
    stored = stored if grid is None else stored.reshape(grid)
    save(name, tensor, {tensor: (dtype, codes), "x" + suffix: (kind, stored)}, expected, {"block": block})


def nibbles(codes):
    """Pairs along the last dimension in a byte, the even one low."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def words(codes, bits=4):
    """Neighbours along the last dimension in words, the first lowest; padded with zeros."""
    each = 32 // bits
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % each)])
    out = np.zeros((*codes.shape[:-1], codes.shape[-1] // each), np.uint64)
    for i in range(each):
        out |= codes[..., i::each].astype(np.uint64) << np.uint64(bits * i)
    return out.astype(np.uint32).view(np.int32)


def mxfp4(name, rng, shape, tensor, codes_as, scales_as, arrange=lambda packed: packed):
    codes = rng.integers(0, 16, shape).astype(np.uint8)
    scale = rng.integers(110, 135, (*shape[:-1], math.ceil(shape[-1] / 32))).astype(np.uint8)
    scale.flat[0] = 0  # 2^−127, below the normal numbers
    expected = np.zeros(shape, f32)
    for index in np.ndindex(*shape):
        expected[index] = f32(e2m1(codes[index]) * e8m0(scale[(*index[:-1], index[-1] // 32)]))
    packed = arrange(nibbles(codes))
    packed = packed.view(np.int8) if codes_as[1] == "I8" else packed
    save(name, tensor, {codes_as[0]: (codes_as[1], packed), scales_as[0]: (scales_as[1], scale)}, expected)


def nvfp4(name, rng, shape, codes_as, global_as, inverse):
    n, k = shape
    codes = rng.integers(0, 16, shape).astype(np.uint8)
    scale = rng.integers(8, 0x78, (n, k // 16)).astype(np.uint8)
    whole = f32(3.7) if inverse else f32(0.0137)
    expected = np.zeros(shape, f32)
    for i, j in np.ndindex(*shape):
        exact = e2m1(codes[i, j]) * e4m3(scale[i, j // 16])
        expected[i, j] = f32(exact / float(whole)) if inverse else times(exact, whole)
    stored = {codes_as: ("U8", nibbles(codes)), "x.weight_scale": ("F8_E4M3", scale), global_as: ("F32", np.array([whole]))}
    save(name, "x.weight", stored, expected)


def packed_int(name, rng, shape, group, kind="BF16", zeros=False, bits=4):
    """compressed-tensors, pack-quantized. Codes are stored plus half their range, and so are zeros."""
    n, k = shape
    half = 1 << (bits - 1)
    q = rng.integers(-half, half, shape)
    stored, scale = scales(rng, kind, (n, k // group))
    z = rng.integers(-half, half, (n, k // group)) if zeros else np.zeros((n, k // group), int)
    expected = np.zeros(shape, f32)
    for i, j in np.ndindex(*shape):
        expected[i, j] = times(q[i, j] - z[i, j // group], scale[i, j // group])
    tensors = {"x.weight_packed": ("I32", words(q + half, bits)), "x.weight_scale": (kind, stored),
               "x.weight_shape": ("I64", np.array(shape))}
    if zeros:
        tensors["x.weight_zero_point"] = ("I32", np.ascontiguousarray(words((z + half).T, bits).T))
    save(name, "x.weight", tensors, expected, {"group": group})


def int8(name, rng, shape, zeros):
    n, k = shape
    q = rng.integers(-128, 128, shape).astype(np.int8)
    stored, scale = scales(rng, "BF16", (n, 1))
    z = rng.integers(-20, 20, (n, 1)).astype(np.int8) if zeros else np.zeros((n, 1), np.int8)
    expected = np.zeros(shape, f32)
    for i, j in np.ndindex(*shape):
        expected[i, j] = times(int(q[i, j]) - int(z[i, 0]), scale[i, 0])
    tensors = {"x.weight": ("I8", q), "x.weight_scale": ("BF16", stored)}
    save(name, "x.weight", tensors | ({"x.weight_zero_point": ("I8", z)} if zeros else {}), expected, {"group": k})


def awq(name, rng, shape, group):
    n, k = shape
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(codes):  # along N
        out = np.zeros((codes.shape[0], n // 8), np.uint32)
        for row, word, nibble in np.ndindex(codes.shape[0], n // 8, 8):
            out[row, word] |= np.uint32(int(codes[row, 8 * word + order[nibble]]) << (4 * nibble))
        return out.view(np.int32)

    q, z = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (k // group, n))
    stored, scale = scales(rng, "F16", (k // group, n))
    expected = np.zeros(shape, f32)
    for i, j in np.ndindex(*shape):
        expected[i, j] = times(int(q[j, i]) - int(z[j // group, i]), scale[j // group, i])
    save(name, "x.weight", {"x.qweight": ("I32", pack(q)), "x.qzeros": ("I32", pack(z)), "x.scales": ("F16", stored)}, expected, {"group": group})


def gptq(name, rng, shape, group, version, order=None):
    """`order` is the group of each column, where it is not that of its place."""
    n, k = shape
    order = np.arange(k) // group if order is None else order
    q, stored_z = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (math.ceil(k / group), n))
    z = stored_z + (1 if version == 1 else 0)
    stored, scale = scales(rng, "F16", (math.ceil(k / group), n))
    expected = np.zeros(shape, f32)
    for i, j in np.ndindex(*shape):
        expected[i, j] = times(int(q[j, i]) - int(z[order[j], i]), scale[order[j], i])
    tensors = {"x.qweight": ("I32", np.ascontiguousarray(words(q.T).T)), "x.qzeros": ("I32", words(stored_z)), "x.scales": ("F16", stored),
               "x.g_idx": ("I32", order.astype(np.int32))}
    save(name, "x.weight", tensors, expected, {"group": group, "gptq_v2": version == 2})


# --- GGUF --------------------------------------------------------------------------------------------------------------------------
# Each takes a block of bytes and the number of a weight in it.

def half_at(b, at):
    return float(np.frombuffer(bytes(b[at:at + 2]), np.float16)[0])


def low_then_high(b, at, i):
    """Nibble i of 32: low nibbles of sixteen bytes, then their high nibbles."""
    return b[at + i] & 15 if i < 16 else b[at + i - 16] >> 4


def fifth(b, at, i):
    return int.from_bytes(b[at:at + 4], "little") >> i & 1


def scale_and_min(s, j):
    """Six bits each from twelve bytes."""
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4


def minus(a, b):
    return f32(f32(a) - f32(b))


def q4_0(b, i):
    return half_at(b, 0) * (low_then_high(b, 2, i) - 8)


def q4_1(b, i):
    return minus(half_at(b, 0) * low_then_high(b, 4, i), -half_at(b, 2))


def q5_0(b, i):
    return half_at(b, 0) * ((low_then_high(b, 6, i) | fifth(b, 2, i) << 4) - 16)


def q5_1(b, i):
    return minus(half_at(b, 0) * (low_then_high(b, 8, i) | fifth(b, 4, i) << 4), -half_at(b, 2))


def q8_0(b, i):
    return half_at(b, 0) * int(np.int8(np.uint8(b[2 + i])))


def q2_k(b, i):
    scale, q = b[i // 16], b[16 + i // 128 * 32 + i % 32] >> (i % 128 // 32 * 2) & 3
    return minus(half_at(b, 80) * (scale & 15) * q, half_at(b, 82) * (scale >> 4))


def q3_k(b, i):
    j = i // 16
    scale = b[96 + j % 8] >> (0 if j < 8 else 4) & 15 | (b[104 + j % 4] >> (2 * (j // 4)) & 3) << 4
    q = b[32 + i // 128 * 32 + i % 32] >> (i % 128 // 32 * 2) & 3 | (b[i % 32] >> (i // 32) & 1) << 2
    return f32(half_at(b, 108) * (scale - 32) * (q - 4))


def q4_k(b, i):
    scale, least = scale_and_min(b[4:16], i // 32)
    q = b[16 + i // 64 * 32 + i % 32] >> (i % 64 // 32 * 4) & 15
    return minus(half_at(b, 0) * scale * q, half_at(b, 2) * least)


def q5_k(b, i):
    scale, least = scale_and_min(b[4:16], i // 32)
    q = b[48 + i // 64 * 32 + i % 32] >> (i % 64 // 32 * 4) & 15 | (b[16 + i % 32] >> (i // 32) & 1) << 4
    return minus(half_at(b, 0) * scale * q, half_at(b, 2) * least)


def q6_k(b, i):
    part, row, at = i // 128, i % 128 // 32, i % 32
    low = b[64 * part + 32 * (row % 2) + at] >> (4 if row >= 2 else 0) & 15
    high = b[128 + 32 * part + at] >> (2 * row) & 3
    return f32(half_at(b, 208) * int(np.int8(np.uint8(b[192 + i // 16]))) * ((low | high << 4) - 32))


IQ4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def iq4_nl(b, i):
    return half_at(b, 0) * IQ4[low_then_high(b, 2, i)]


def iq4_xs(b, i):
    j = i // 32
    scale = b[4 + j // 2] >> (4 * (j % 2)) & 15 | (int.from_bytes(b[2:4], "little") >> (2 * j) & 3) << 4
    return f32(half_at(b, 0) * (scale - 32) * IQ4[low_then_high(b, 8 + 16 * j, i % 32)])


def gguf_mxfp4(b, i):
    return e2m1(low_then_high(b, 1, i)) * e8m0(b[0])


# Number, weights of a block, bytes of a block, where its half-precision scales are.
BLOCKS = {q4_0: (2, 32, 18, [0]), q4_1: (3, 32, 20, [0, 2]), q5_0: (6, 32, 22, [0]), q5_1: (7, 32, 24, [0, 2]), q8_0: (8, 32, 34, [0]),
          q2_k: (10, 256, 84, [80, 82]), q3_k: (11, 256, 110, [108]), q4_k: (12, 256, 144, [0, 2]), q5_k: (13, 256, 176, [0, 2]),
          q6_k: (14, 256, 210, [208]), iq4_nl: (20, 32, 18, [0]), iq4_xs: (23, 256, 136, [0]), gguf_mxfp4: (39, 32, 17, [])}


def save_gguf(name, tensors):
    """Tensors: name → (number of the format, shape slowest first, bytes)."""
    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 1) + text("general.architecture") + struct.pack("<I", 8) + text("golden")
    data = b""
    for key, (number, shape, values) in tensors.items():
        header += text(key) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", width) for width in reversed(shape))
        header += struct.pack("<IQ", number, len(data))
        data += values + b"\0" * (-len(values) % 32)
    (GOLDEN / f"{name}.gguf").write_bytes(header + b"\0" * (-len(header) % 32) + data)


def gguf_blocks(rng):
    tensors = {}
    for decode, (number, weights, size, halves) in BLOCKS.items():
        rows, columns = (3, 96) if weights == 32 else (2, 512)
        blocks = rng.integers(0, 256, (rows, columns // weights, size)).astype(np.uint8)
        for at in halves:
            blocks[..., at:at + 2] = rng.uniform(-0.1, 0.1, blocks.shape[:2]).astype(np.float16)[..., None].view(np.uint8)
        if decode is gguf_mxfp4:
            blocks[..., 0] = rng.integers(110, 135, blocks.shape[:2])
        expected = np.zeros((rows, columns), f32)
        for row, column in np.ndindex(rows, columns):
            block = [int(byte) for byte in blocks[row, column // weights]]
            expected[row, column] = decode(bytes(block), column % weights)
        key = decode.__name__.removeprefix("gguf_")
        tensors[key] = (number, (rows, columns), blocks.tobytes())
        tensors[f"{key}.expected"] = (0, (rows, columns), expected.tobytes())
    save_gguf("blocks", tensors)


def main():
    GOLDEN.mkdir(exist_ok=True)
    rng = np.random.default_rng(17)
    fp8("fp8_block", rng, (36, 72), (16, 32))  # partial blocks at both ends
    fp8("fp8_block_bf16_scales", rng, (32, 64), (16, 32), kind="BF16")
    fp8("fp8_block_f16_scales", rng, (24, 40), (16, 32), kind="F16")
    fp8("fp8_block_e8m0_scales", rng, (36, 72), (16, 32), kind="F8_E8M0", suffix=".scale")
    fp8("fp8_block_odd", rng, (36, 60), (12, 24), suffix=".weight_scale")
    fp8("fp8_block_stacked", rng, (3, 20, 40), (16, 32), suffix="_scale_inv")
    fp8("fp8_channel", rng, (24, 48), (1, 48), kind="BF16", suffix=".weight_scale")
    fp8("fp8_channel_flat", rng, (24, 48), (1, 48), suffix=".weight_scale", grid=(24,))
    fp8("fp8_tensor", rng, (24, 48), (24, 48), suffix=".weight_scale", grid=())
    fp8("fp8_stacked_tensor", rng, (3, 10, 16), (10, 16), suffix="_scale", grid=(3, 1, 1))
    fp8("fp8_e5m2", rng, (24, 48), (1, 16), dtype="F8_E5M2", suffix=".weight_scale")
    mxfp4("mxfp4_blocks", rng, (3, 10, 96), "x", ("x_blocks", "U8"), ("x_scales", "U8"), lambda p: p.reshape(3, 10, 3, 16))
    mxfp4("mxfp4_signed_bytes", rng, (20, 64), "x.weight", ("x.weight", "I8"), ("x.scale", "F8_E8M0"))
    mxfp4("mxfp4_packed", rng, (20, 80), "x.weight", ("x.weight_packed", "U8"), ("x.weight_scale", "U8"))
    nvfp4("nvfp4_modelopt", rng, (20, 64), "x.weight", "x.weight_scale_2", False)
    nvfp4("nvfp4_packed", rng, (20, 64), "x.weight_packed", "x.weight_global_scale", True)
    packed_int("int4_group", rng, (20, 96), 32)
    packed_int("int4_channel", rng, (12, 44), 44, kind="F32")  # half a word is left at the end of a row
    packed_int("int4_zeros", rng, (20, 64), 32, zeros=True)
    packed_int("int8_group", rng, (20, 64), 32, bits=8)
    packed_int("int8_zeros", rng, (18, 64), 32, bits=8, zeros=True)
    int8("int8_channel", rng, (20, 48), False)
    int8("int8_channel_zeros", rng, (20, 48), True)
    awq("awq", rng, (24, 128), 32)
    gptq("gptq", rng, (24, 128), 32, 1)
    gptq("gptq_partial_group", rng, (16, 160), 128, 1)
    gptq("gptq_v2", rng, (24, 128), 64, 2)
    gguf_blocks(rng)
    # After the others, whose numbers stay what they were.
    gptq("gptq_act_order", rng, (16, 160), 32, 1, rng.permutation(np.arange(160) // 32))


main()
