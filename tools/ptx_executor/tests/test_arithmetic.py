"""The executor's arithmetic against exact rationals: integers, floats, comparisons, conversions, approximations."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from tools.ptx_executor import Options
from tools.ptx_executor.exact import as_floats, edge_floats, round_fraction
from tools.ptx_executor.scalar_types import SIGNED, UNSIGNED, Array, bf16_to_f32, bits
from tools.ptx_executor.snippets import evaluate, raw_bits

COUNT = 512
NUMPY_TYPES: dict[str, type] = {f"u{w}": t for w, t in UNSIGNED.items()} | {f"s{w}": t for w, t in SIGNED.items()}
FLOAT_STORAGE = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64}


def integers(type_name: str, seed: int, count: int = COUNT) -> Array:
    """Random integers, a third of them at the edges of the type."""
    dtype = NUMPY_TYPES[type_name]
    limits, rng = np.iinfo(dtype), np.random.default_rng(seed)
    values = rng.integers(limits.min, limits.max, count, dtype=dtype, endpoint=True)
    edges: Array = np.array([limits.min, limits.max, 0, 1, limits.max - 1, limits.max // 2], dtype)
    return np.where(rng.random(count) < 1 / 3, edges[rng.integers(0, len(edges), count)], values)


def wrap(value: int, type_name: str) -> int:
    """A whole number modulo 2^width, in the range of the type."""
    width = bits(type_name)
    value &= (1 << width) - 1
    return value - (1 << width) if type_name[0] == "s" and value >> (width - 1) else value


def truncated_quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


# -- integers ----------------------------------------------------------------------------------------------------------
WHOLE: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": lambda a, b: truncated_quotient(a, b) if b else -1,
    "rem": lambda a, b: a - b * truncated_quotient(a, b) if b else a,
}


@pytest.mark.parametrize("type_name", ["u16", "u32", "u64", "s16", "s32", "s64"])
@pytest.mark.parametrize("name", WHOLE)
def test_integer_arithmetic_wraps(name: str, type_name: str) -> None:
    a, b = integers(type_name, 1), integers(type_name, 2)
    result = evaluate(f"{name}.{type_name} %out, %a, %b;", NUMPY_TYPES[type_name], a, b)
    expected = [wrap(WHOLE[name](x, y), type_name) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert result.tolist() == expected


@pytest.mark.parametrize("type_name", ["u16", "u32", "u64", "s16", "s32", "s64"])
def test_high_products(type_name: str) -> None:
    a, b = integers(type_name, 1), integers(type_name, 2)
    result = evaluate(f"mul.hi.{type_name} %out, %a, %b;", NUMPY_TYPES[type_name], a, b)
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    assert result.tolist() == [wrap(x * y >> bits(type_name), type_name) for x, y in pairs]


@pytest.mark.parametrize("type_name", ["u16", "u32", "s16", "s32"])
def test_wide_products_and_sums(type_name: str) -> None:
    wide = f"{type_name[0]}{2 * bits(type_name)}"
    a, b, c = integers(type_name, 1), integers(type_name, 2), integers(wide, 3)
    triples = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    product = evaluate(f"mul.wide.{type_name} %out, %a, %b;", NUMPY_TYPES[wide], a, b)
    assert product.tolist() == [x * y for x, y, _ in triples]
    total = evaluate(f"mad.wide.{type_name} %out, %a, %b, %c;", NUMPY_TYPES[wide], a, b, c)
    assert total.tolist() == [wrap(x * y + z, wide) for x, y, z in triples]


def test_saturating_sum() -> None:
    a, b = integers("s32", 1), integers("s32", 2)
    expected = [max(-(2**31), min(2**31 - 1, x + y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert evaluate("add.sat.s32 %out, %a, %b;", np.int32, a, b).tolist() == expected


@pytest.mark.parametrize("type_name", ["u16", "u32", "u64", "s16", "s32", "s64"])
def test_shifts_clamp_their_amount(type_name: str) -> None:
    a = integers(type_name, 1)
    amount = np.random.default_rng(2).choice(np.array([0, 1, 7, 15, 16, 31, 32, 63, 64, 2**32 - 1], np.uint32), COUNT)
    pairs = list(zip(a.tolist(), amount.tolist(), strict=True))
    right = evaluate(f"shr.{type_name} %out, %a, %b;", NUMPY_TYPES[type_name], a, amount)
    assert right.tolist() == [x >> min(n, 64) for x, n in pairs]
    left = evaluate(f"shl.b{bits(type_name)} %out, %a, %b;", NUMPY_TYPES[type_name], a, amount)
    assert left.tolist() == [wrap(x << min(n, 64), type_name) for x, n in pairs]


@pytest.mark.parametrize("type_name", ["u32", "u64", "s32", "s64"])
def test_bit_field_extract(type_name: str) -> None:
    width, rng = bits(type_name), np.random.default_rng(3)
    a = integers(type_name, 1)
    position, length = (rng.integers(0, 70, COUNT, dtype=np.uint32) for _ in range(2))

    def extract(value: int, start: int, count: int) -> int:  # the manual's pseudocode, bit by bit
        last = width - 1
        sign = value >> min(start + count - 1, last) & 1 if type_name[0] == "s" and count else 0
        field = [value >> (start + i) & 1 if i < count and start + i <= last else sign for i in range(width)]
        return wrap(sum(bit << i for i, bit in enumerate(field)), type_name)

    result = evaluate(f"bfe.{type_name} %out, %a, %b, %c;", NUMPY_TYPES[type_name], a, position, length)
    assert result.tolist() == [extract(*t) for t in zip(a.tolist(), position.tolist(), length.tolist(), strict=True)]


@pytest.mark.parametrize("width", [32, 64])
def test_bit_field_insert(width: int) -> None:
    rng = np.random.default_rng(3)
    a, b = integers(f"u{width}", 1), integers(f"u{width}", 2)
    position, length = (rng.integers(0, 70, COUNT, dtype=np.uint32) for _ in range(2))

    def insert(source: int, target: int, start: int, count: int) -> int:
        for i in range(count):
            if start + i < width:
                target = target & ~(1 << (start + i)) | (source >> i & 1) << (start + i)
        return target

    result = evaluate(f"bfi.b{width} %out, %a, %b, %c, %d;", UNSIGNED[width], a, b, position, length)
    columns = zip(a.tolist(), b.tolist(), position.tolist(), length.tolist(), strict=True)
    assert result.tolist() == [insert(*column) for column in columns]


def test_bit_counts_and_permutations() -> None:
    a, b, c = (integers("u32", seed) for seed in (1, 2, 3))
    rows = list(zip(a.tolist(), b.tolist(), c.tolist(), strict=True))
    assert evaluate("popc.b32 %out, %a;", np.uint32, a).tolist() == [x.bit_count() for x, *_ in rows]
    assert evaluate("clz.b32 %out, %a;", np.uint32, a).tolist() == [32 - x.bit_length() for x, *_ in rows]
    assert evaluate("brev.b32 %out, %a;", np.uint32, a).tolist() == [int(f"{x:032b}"[::-1], 2) for x, *_ in rows]
    found = [x.bit_length() - 1 if x else 2**32 - 1 for x, *_ in rows]
    assert evaluate("bfind.u32 %out, %a;", np.uint32, a).tolist() == found
    majority = evaluate("lop3.b32 %out, %a, %b, %c, 0xE8;", np.uint32, a, b, c)
    assert majority.tolist() == [x & y | y & z | x & z for x, y, z in rows]
    shifted = evaluate("shf.r.wrap.b32 %out, %a, %b, %c;", np.uint32, a, b, c)
    assert shifted.tolist() == [((y << 32 | x) >> (z & 31)) & 0xFFFFFFFF for x, y, z in rows]
    swapped = evaluate("prmt.b32 %out, %a, %b, 0x7104;", np.uint32, a, b)
    byte = [[*x.to_bytes(4, "little"), *y.to_bytes(4, "little")] for x, y, _ in rows]
    assert swapped.tolist() == [int.from_bytes([e[4], e[0], e[1], e[7]], "little") for e in byte]


# -- floats ------------------------------------------------------------------------------------------------------------
def expect_equal(result: Array, expected: list[float], type_name: str) -> None:
    """Equal numbers (zeros of either sign) and NaN where NaN is expected."""
    got = as_floats(result, type_name)
    wrong = [i for i, (x, y) in enumerate(zip(got, expected, strict=True)) if x != y and not (x != x and y != y)]
    assert not wrong, [(got[i], expected[i]) for i in wrong[:5]]


@pytest.mark.parametrize(
    ("type_name", "mode"),
    [*((t, "rn") for t in ("f16", "bf16", "f64")), *(("f32", m) for m in ("rn", "rz", "rm", "rp"))],
)
def test_fma_rounds_once(type_name: str, mode: str) -> None:
    a, b, c = (edge_floats(type_name, COUNT, seed) for seed in (1, 2, 3))
    if type_name == "f32":  # cancellation: c close to -a * b
        with np.errstate(all="ignore"):
            c = np.where(np.arange(COUNT) % 3 == 0, -(a * b) * np.float32(1 + 2.0**-23), c)
    result = evaluate(f"fma.{mode}.{type_name} %out, %a, %b, %c;", FLOAT_STORAGE[type_name], a, b, c)
    expected = []
    for x, y, z in zip(*(as_floats(v, type_name) for v in (a, b, c)), strict=True):
        if math.isfinite(x) and math.isfinite(y) and math.isfinite(z):
            expected.append(round_fraction(Fraction(x) * Fraction(y) + Fraction(z), type_name, mode))
        else:
            expected.append(x * y + z if math.isnan(x * y) or math.isinf(x) or math.isinf(y) else z)
    expect_equal(result, expected, type_name)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_float_arithmetic_in_every_rounding_mode(name: str, mode: str) -> None:
    a, b = edge_floats("f32", COUNT, 1), edge_floats("f32", COUNT, 2)
    keep = np.isfinite(a) & np.isfinite(b) & (b != 0)
    a, b = a[keep], b[keep]
    exact = {
        "add": Fraction.__add__,
        "sub": Fraction.__sub__,
        "mul": Fraction.__mul__,
        "div": Fraction.__truediv__,
    }[name]
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    expected = [round_fraction(exact(Fraction(x), Fraction(y)), "f32", mode) for x, y in pairs]
    expect_equal(evaluate(f"{name}.{mode}.f32 %out, %a, %b;", np.float32, a, b), expected, "f32")


@pytest.mark.parametrize("type_name", ["f16", "bf16"])
def test_half_precision_arithmetic(type_name: str) -> None:
    a, b = edge_floats(type_name, COUNT, 1), edge_floats(type_name, COUNT, 2)
    finite = np.isfinite([as_floats(a, type_name), as_floats(b, type_name)]).all(0)
    a, b = np.resize(a[finite], 256), np.resize(b[finite], 256)
    pairs = list(zip(as_floats(a, type_name), as_floats(b, type_name), strict=True))
    for name, exact in (("add", Fraction.__add__), ("mul", Fraction.__mul__)):
        expected = [round_fraction(exact(Fraction(x), Fraction(y)), type_name) for x, y in pairs]
        result = evaluate(f"{name}.{type_name} %out, %a, %b;", FLOAT_STORAGE[type_name], a, b)
        expect_equal(result, expected, type_name)
    single = evaluate(f"add.{type_name} %out, %a, %b;", FLOAT_STORAGE[type_name], a, b)
    both = evaluate(f"add.{type_name}x2 %out, %a, %b;", np.uint32, a.view(np.uint32), b.view(np.uint32))
    assert both.view(np.uint16).tolist() == raw_bits(single).tolist()


@pytest.mark.parametrize("name", ["min", "max"])
def test_min_and_max_order_zeros_and_treat_nan(name: str) -> None:
    nan, inf = math.nan, math.inf
    a = np.array([1, nan, 1, nan, 0.0, -0.0, -inf, 2], np.float32)
    b = np.array([2, 1, nan, nan, -0.0, 0.0, inf, 2], np.float32)
    ordered = {"min": [1, 1, 1, nan, -0.0, -0.0, -inf, 2], "max": [2, 1, 1, nan, 0.0, 0.0, inf, 2]}[name]
    expected = np.array(ordered, np.float32)
    expected_nan = np.where(np.isnan(a) | np.isnan(b), np.float32(nan), expected)
    for modifier, wanted in (("", expected), (".NaN", expected_nan)):
        result = raw_bits(evaluate(f"{name}{modifier}.f32 %out, %a, %b;", np.float32, a, b))
        canonical = np.where(np.isnan(wanted), np.uint32(0x7FFFFFFF), raw_bits(wanted))
        assert result.tolist() == canonical.tolist()


def test_ftz_and_sat() -> None:
    a = np.array([2.0**-130, -(2.0**-130), 0.25, 3.0, -1.0, math.nan], np.float32)
    one = np.ones_like(a)
    flushed = evaluate("mul.ftz.f32 %out, %a, %b;", np.float32, a, one)
    assert raw_bits(flushed)[:2].tolist() == [0, 0x80000000]
    assert evaluate("mul.sat.f32 %out, %a, %b;", np.float32, a, one).tolist() == [2.0**-130, 0, 0.25, 1, 0, 0]


COMPARISONS = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y and x == x and y == y,
    "lt": lambda x, y: x < y,
    "geu": lambda x, y: not x < y,
    "neu": lambda x, y: x != y,
    "nan": lambda x, y: x != x or y != y,
    "num": lambda x, y: x == x and y == y,
}


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("type_name", ["f16", "bf16", "f32", "f64"])
def test_setp_with_nan_and_selp(name: str, type_name: str) -> None:
    a, b = edge_floats(type_name, COUNT, 1), edge_floats(type_name, COUNT, 2)
    b = np.where(np.arange(COUNT) % 4 == 0, a, b)
    code = f"setp.{name}.{type_name} %p1|%p2, %a, %b; selp.b32 %r1, 1, 0, %p1; selp.b32 %r2, 2, 0, %p2;"
    code += "or.b32 %out, %r1, %r2;"
    pairs = zip(as_floats(a, type_name), as_floats(b, type_name), strict=True)
    assert evaluate(code, np.uint32, a, b).tolist() == [1 if COMPARISONS[name](x, y) else 2 for x, y in pairs]


def test_setp_combines_with_a_predicate() -> None:
    a, b = integers("s32", 1), integers("s32", 2)
    code = "setp.gt.s32 %p0, %a, 0; setp.lt.and.s32 %p1, %a, %b, !%p0; selp.u32 %out, 1, 0, %p1;"
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    assert evaluate(code, np.uint32, a, b).tolist() == [int(x < y and x <= 0) for x, y in pairs]


# -- conversions -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "f64", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("target", ["f16", "bf16", "f32", "f64"])
def test_conversions_to_float(target: str, source: str, mode: str) -> None:
    floats = source in FLOAT_STORAGE
    a = edge_floats(source, COUNT, 1) if floats else integers(source, 1)
    values = as_floats(a, source) if floats else a.tolist()
    finite = [i for i, v in enumerate(values) if math.isfinite(v)]
    expected = [round_fraction(Fraction(values[i]), target, mode) for i in finite]
    rounding = "" if source == target else f".{mode}"
    result = evaluate(f"cvt{rounding}.{target}.{source} %out, %a;", FLOAT_STORAGE[target], a)
    expect_equal(result[finite], expected, target)
    if floats:
        others = [i for i in range(COUNT) if i not in finite]
        expect_equal(result[others], [values[i] for i in others], target)


@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("target", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_conversions_from_float_clamp(target: str, source: str, mode: str) -> None:
    a = edge_floats(source, COUNT, 1)
    limits = np.iinfo(NUMPY_TYPES[target])
    functions: dict[str, Callable[[float], int]] = {
        "rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil,
    }  # fmt: skip
    function = functions[mode]

    def convert(value: float) -> int:
        if math.isnan(value):
            return 0
        if math.isinf(value):
            return limits.max if value > 0 else limits.min
        return max(limits.min, min(limits.max, function(value)))

    result = evaluate(f"cvt.{mode}.{target}.{source} %out, %a;", NUMPY_TYPES[target], a)
    assert result.tolist() == [convert(v) for v in as_floats(a, source)]


@pytest.mark.parametrize("source", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("target", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_conversions_between_integers(target: str, source: str) -> None:
    a, limits = integers(source, 1), np.iinfo(NUMPY_TYPES[target])
    plain = evaluate(f"cvt.{target}.{source} %out, %a;", NUMPY_TYPES[target], a)
    assert plain.tolist() == [wrap(v, target) for v in a.tolist()]
    clamped = evaluate(f"cvt.sat.{target}.{source} %out, %a;", NUMPY_TYPES[target], a)
    assert clamped.tolist() == [max(limits.min, min(limits.max, v)) for v in a.tolist()]


def test_packed_conversion_puts_the_first_source_high() -> None:
    a, b = edge_floats("f32", COUNT, 1), edge_floats("f32", COUNT, 2)
    packed = evaluate("cvt.rn.bf16x2.f32 %out, %a, %b;", np.uint32, a, b)
    halves = packed.view(np.uint16).reshape(-1, 2)
    for half, source in ((halves[:, 0], b), (halves[:, 1], a)):
        expected = torch.from_numpy(source).to(torch.bfloat16).float().numpy()
        assert np.array_equal(bf16_to_f32(half), expected, equal_nan=True)


# -- approximate instructions ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "exact", "ulps"),
    [
        ("div.full.f32 %out, %a, %b", lambda a, b: a / b, 2),
        ("div.approx.f32 %out, %a, %b", lambda a, b: a / b, 2),
        ("ex2.approx.f32 %out, %a", lambda a, b: 2**a, 2),
        ("lg2.approx.f32 %out, %a", lambda a, b: np.log2(a), 8),
        ("rsqrt.approx.f32 %out, %a", lambda a, b: a**-0.5, 2),
        ("sqrt.approx.f32 %out, %a", lambda a, b: a**0.5, 1),
        ("rcp.approx.f32 %out, %a", lambda a, b: 1 / a, 1),
    ],
)
def test_noise_is_bounded_and_seeded(text: str, exact: Callable[[Array, Array], Array], ulps: int) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(1.5, 9, COUNT).astype(np.float32) for _ in range(2))
    true = exact(a.astype(np.float64), b.astype(np.float64))
    rounded = true.astype(np.float32)
    assert np.array_equal(evaluate(f"{text};", np.float32, a, b), rounded)
    noisy = [evaluate(f"{text};", np.float32, a, b, options=Options(noise=True, seed=seed)) for seed in (1, 1, 2)]
    assert np.array_equal(noisy[0], noisy[1])
    assert not np.array_equal(noisy[0], noisy[2])
    distance = np.abs(raw_bits(noisy[0]).astype(np.int64) - raw_bits(rounded).astype(np.int64))
    assert 1 <= distance.max() <= ulps
