// The scalar formulas of the ops, shared by the CPU and the CUDA kernels: the pruning predicate, P(w), and the keys
// that selection sorts. Each takes and returns values; the compute type T is float, or double for float64 weights.
//
// Error bounds are in docs/design/numerics.md. backends/reference.py and backends/triton/math.py implement the same
// functions in other ways. CPU code is compiled with -ffp-contract=off: only multiply_add may be fused, so that every
// compiler gives the same bits.
#pragma once

#include <math.h>

#include "feather/dtype.h"

namespace feather {

constexpr int kInfinitePower = 0;        // template argument P for p = inf, hard thresholding
constexpr int kPowers = 4;               // P is kInfinitePower, 1, 2 or 3
constexpr double kFarDouble = 524288.0;  // 2^19: for doubles beyond this multiple of T, P(w) with p = 3 rounds to w

// Layout of a compute type. A key is the magnitude of a float as an integer: its bits without the sign. Keys sort as
// magnitudes do; every NaN is clamped to kNanKey, the key after that of infinity.
template <class T>
struct FloatFormat;

template <>
struct FloatFormat<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr Bits kExponents = 255;
  static constexpr int kKeyBits = 31;
  static constexpr Bits kMagnitude = 0x7FFFFFFFu;
  static constexpr Bits kNanKey = 0x7F800001u;
};

template <>
struct FloatFormat<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr Bits kExponents = 2047;
  static constexpr int kKeyBits = 63;
  static constexpr Bits kMagnitude = 0x7FFFFFFFFFFFFFFFull;
  static constexpr Bits kNanKey = 0x7FF0000000000001ull;
};

template <class T>
using Key = typename FloatFormat<T>::Bits;

// abs(w).
template <class T>
FEATHER_HOST_DEVICE T magnitude(T w) {
  return float_of(static_cast<Key<T>>(bits_of(w) & FloatFormat<T>::kMagnitude));
}

// A value >= 0, given the sign of w.
template <class T>
FEATHER_HOST_DEVICE T with_sign(T value, T w) {
  return float_of(static_cast<Key<T>>(bits_of(value) | (bits_of(w) & ~FloatFormat<T>::kMagnitude)));
}

// Whether w is pruned under the threshold T: T > 0 and abs(w) <= T. False for a NaN on either side. This is the only
// definition of "pruned" in csrc.
template <class T>
FEATHER_HOST_DEVICE bool is_pruned(T w, T t) {
  return magnitude(w) <= (t > 0 ? t : T(-1));
}

// A threshold T with a power of two that brings it into [1, 2), so that the powers of T in P(w) stay in range.
// Computed once a launch or array.
template <class T>
struct ScaledThreshold {
  T value;    // T
  T scale;    // S, a power of two
  T unscale;  // 1/S
  T scaled;   // S T
};

// Whether P(w) with P = 2 or 3 needs the scaling. For a float T from 2^-20 to 2^20 its cubes stay in range without it,
// or overflow only where P(w) rounds to w.
FEATHER_HOST_DEVICE bool needs_scaling(float t) { return !(t >= 9.5367431640625e-7f && t <= 1048576.0f); }

template <class T>
FEATHER_HOST_DEVICE ScaledThreshold<T> scale_threshold(T t) {
  using Format = FloatFormat<T>;
  const int last = static_cast<int>(Format::kExponents) - 1;  // the largest biased exponent of a finite number
  int exponent = last - static_cast<int>((bits_of(t) >> Format::kMantissa) & Format::kExponents);
  exponent = exponent < 1 ? 1 : exponent > last - 1 ? last - 1 : exponent;  // both powers stay normal
  const T scale = float_of(static_cast<Key<T>>(static_cast<Key<T>>(exponent) << Format::kMantissa));
  const T unscale = float_of(static_cast<Key<T>>(static_cast<Key<T>>(last - exponent) << Format::kMantissa));
  return ScaledThreshold<T>{t, scale, unscale, t * scale};
}

// The correctly rounded root of z >= 0.
FEATHER_HOST_DEVICE float square_root(float z) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(z);
#else
  return __builtin_sqrtf(z);
#endif
}

FEATHER_HOST_DEVICE double square_root(double z) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(z);
#else
  return __builtin_sqrt(z);
#endif
}

// Whether float a * b + c is one instruction, rounded once: everywhere except on x86-64 without FMA. gcc defines the
// second macro, clang the third. Doubles meet their bound of 2 ulp without fusing.
#if defined(__CUDA_ARCH__) || defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(FEATHER_FUSED)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

// a * b + c, fused for floats where the machine has the instruction.
FEATHER_HOST_DEVICE float multiply_add(float a, float b, float c) { return kFused ? fmaf(a, b, c) : a * b + c; }
FEATHER_HOST_DEVICE double multiply_add(double a, double b, double c) { return a * b + c; }

// A first approximation t of z^(-1/3) for normal z > 0, good enough that 1 - z t^3 is in [-0.077, 0.12]. The bits of z,
// read as an integer, approximate its logarithm; a third of them is subtracted from a constant.
FEATHER_HOST_DEVICE float inverse_cube_root_seed(float z) {
#if defined(__CUDA_ARCH__)
  const uint32_t third = __umulhi(bits_of(z), 0x55555556u);  // conversions are slower here
  return float_of(0x54A08000u - third);
#else
  const float bits = static_cast<float>(static_cast<int32_t>(bits_of(z)));
  const auto seed = static_cast<uint32_t>(static_cast<int32_t>(multiply_add(bits, -0.33333334f, 0x54A08000)));
  return float_of(kFused ? seed : seed & 0xFFFFF000u);  // 12 significant bits make t^2 exact
#endif
}

// 1 - y t, rounded once, for y t near 1. Without fusing, t must have 12 significant bits: y is split into its upper 12
// and the rest, and both products are exact.
FEATHER_HOST_DEVICE float one_minus_product(float y, float t) {
  if (kFused) return multiply_add(-y, t, 1.0f);
  const float upper = float_of(bits_of(y) & 0xFFFFF000u);
  return (1.0f - upper * t) - (y - upper) * t;
}

// z^(1/3) for normal z > 0, without a division.
//
// With the seed t, z^(1/3) = y c^(-2/3) where y = z t^2 and c = z t^3. With d = 1 - c, c^(-2/3) is 1 + d q(d) for a
// minimax polynomial q of degree 4 (relative error 1.4e-8). Two thirds of the rounding error of y cancel, because c
// carries the same error.
FEATHER_HOST_DEVICE float cube_root(float z) {
  const float t = inverse_cube_root_seed(z);
  const float y = z * (t * t);
  const float d = one_minus_product(y, t);
  float q = multiply_add(d, 0.48529533f, 0.45537439f);
  q = multiply_add(d, q, 0.4933503f);
  q = multiply_add(d, q, 0.55555135f);
  q = multiply_add(d, q, 0.6666674f);
  return multiply_add(y * d, q, y);
}

// z^(1/3) for z from 2^-180 (a denormal T) to 2^57.
//
// The seed is that of the float z 2^60, which is in range. Two third-order steps t += t d (1/3 + 2/9 d) with
// d = 1 - z t^3 follow, then one Newton step from z t^2, whose residual is nearly exact.
FEATHER_HOST_DEVICE double cube_root(double z) {
  double t = 1048576.0 * inverse_cube_root_seed(static_cast<float>(z * 1152921504606846976.0));
  for (int step = 0; step < 2; ++step) {
    const double d = 1.0 - z * t * t * t;
    t += t * d * (1.0 / 3.0 + 2.0 / 9.0 * d);
  }
  const double u = t * t;
  const double y = z * u;
  return y + (z - y * y * y) * (1.0 / 3.0 * u);
}

// P(w) = sign(w) (abs(w)^p - T^p)^(1/p) for T > 0, or +0.0 where w is pruned. P is p: 1, 2, 3 or kInfinitePower.
//
// The difference of powers is factored so that nothing cancels: z = (x - T)(x + T) or (x - T)(x^2 + x T + T^2), with
// x = abs(w) and T scaled by a power of two, which is exact. Rounding must not make a weight larger, so the root y is
// limited to abs(w). The limit compares bits: a y that is infinite, NaN or negative because z or y^3 overflowed counts
// as larger, and there P(w) rounds to w. Where w is pruned, z may be 0 or negative and y is not used; fused products
// make no denormals of it, which would be slow.
//
// kScaled = false, allowed where needs_scaling(T) is false, saves two products and may change the last bit for P = 3.
template <int P, bool kScaled = true, class T>
FEATHER_HOST_DEVICE T apply_positive_threshold(T w, const ScaledThreshold<T>& threshold) {
  static_assert(kScaled || sizeof(T) == sizeof(float), "thresholds of doubles are always scaled");
  const T a = magnitude(w);
  if (P == kInfinitePower) return a <= threshold.value ? T(0) : w;
  if (P == 1) return a <= threshold.value ? T(0) : with_sign(a - threshold.value, w);
  const T x = kScaled ? a * threshold.scale : a;
  const T bound = kScaled ? threshold.scaled : threshold.value;
  const T other = P == 2 ? x + bound : multiply_add(x, x, multiply_add(x, bound, bound * bound));
  const T z = (x - bound) * other;
  T y = P == 2 ? square_root(z) : cube_root(z);
  if (kScaled) y *= threshold.unscale;
  if (P == 3 && sizeof(T) == sizeof(double)) y = x > kFarDouble ? a : y;  // z may exceed the range of the seed
  y = bits_of(y) < bits_of(a) ? y : a;
  return a <= threshold.value ? T(0) : with_sign(y, w);
}

// P(w) for every T: w itself for T <= 0, NaN for a NaN T.
template <int P, bool kScaled = true, class T>
FEATHER_HOST_DEVICE T apply_threshold(T w, const ScaledThreshold<T>& threshold) {
  if (threshold.value > 0) return apply_positive_threshold<P, kScaled>(w, threshold);
  return threshold.value <= 0 ? w : threshold.value;
}

// The key of a score's magnitude. NaNs give keys from kNanKey on: see clamp_nan.
template <class T>
FEATHER_HOST_DEVICE Key<T> magnitude_key(T score) {
  return static_cast<Key<T>>(bits_of(score) & FloatFormat<T>::kMagnitude);
}

// The key, with all NaNs as kNanKey.
template <class T>
FEATHER_HOST_DEVICE Key<T> clamp_nan(Key<T> key) {
  return key < FloatFormat<T>::kNanKey ? key : FloatFormat<T>::kNanKey;
}

// The magnitude that has this key.
template <class T>
FEATHER_HOST_DEVICE T value_of_key(Key<T> key) {
  return key < FloatFormat<T>::kNanKey ? float_of(key) : static_cast<T>(NAN);
}

}  // namespace feather
