// The scalar formulas, for the C++ and the CUDA kernels: values in, values out.
//
// Weights come in the compute type (float, or double for float64 storage). Bounds: docs/design/numerics.md. The same
// functions, by formulas of their own, stand in feather_kernels/backends/reference.py and .../triton/math.py. On a CPU
// all of it is compiled with -ffp-contract=off: what is fused says so (multiply_add), the same from every compiler.
#pragma once

#include <math.h>

#include "feather/dtype.h"

namespace feather {

constexpr int kInfinitePower = 0;        // the template argument P of hard thresholding
constexpr int kPowers = 4;               // P = kInfinitePower, 1, 2, 3
constexpr double kFarDouble = 524288.0;  // 2^19: beyond this multiple of T a double P(w), p = 3, rounds to w

template <class T>
struct FloatFormat;

template <>
struct FloatFormat<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23;
  static constexpr Bits kExponents = 255;
  static constexpr Bits kMagnitude = 0x7FFFFFFFu;
  static constexpr Bits kNanKey = 0x7F800001u;  // every NaN sorts as the one key behind inf
};

template <>
struct FloatFormat<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52;
  static constexpr Bits kExponents = 2047;
  static constexpr Bits kMagnitude = 0x7FFFFFFFFFFFFFFFull;
  static constexpr Bits kNanKey = 0x7FF0000000000001ull;
};

template <class T>
using Key = typename FloatFormat<T>::Bits;

template <class T>
FEATHER_HOST_DEVICE T magnitude(T w) {
  return float_of(static_cast<Key<T>>(bits_of(w) & FloatFormat<T>::kMagnitude));
}

// value >= 0 with the sign of w.
template <class T>
FEATHER_HOST_DEVICE T with_sign(T value, T w) {
  return float_of(static_cast<Key<T>>(bits_of(value) | (bits_of(w) & ~FloatFormat<T>::kMagnitude)));
}

// The one predicate of the package: T > 0 and abs(w) <= T. A NaN T compares false, as every bound below 0 does.
template <class T>
FEATHER_HOST_DEVICE bool is_pruned(T w, T t) {
  return magnitude(w) <= (t > 0 ? t : T(-1));
}

// A threshold T and what depends on it alone: powers of two S and 1/S that bring T into [1, 2) and back.
template <class T>
struct Threshold {
  T t;
  T scale;
  T unscale;
  T scaled;
};

// Whether P(w), P = 2 or 3, needs these powers. For a float T from 2^-20 to 2^20 its cubes stay in range without them,
// or overflow where P(w) rounds to w.
FEATHER_HOST_DEVICE bool needs_scaling(float t) { return !(t >= 9.5367431640625e-7f && t <= 1048576.0f); }

template <class T>
FEATHER_HOST_DEVICE Threshold<T> make_threshold(T t) {
  using Format = FloatFormat<T>;
  const int last = static_cast<int>(Format::kExponents) - 1;  // of a finite number
  int exponent = last - static_cast<int>((bits_of(t) >> Format::kMantissa) & Format::kExponents);
  exponent = exponent < 1 ? 1 : exponent > last - 1 ? last - 1 : exponent;  // both powers stay normal
  const T scale = float_of(static_cast<Key<T>>(static_cast<Key<T>>(exponent) << Format::kMantissa));
  const T unscale = float_of(static_cast<Key<T>>(static_cast<Key<T>>(last - exponent) << Format::kMantissa));
  return Threshold<T>{t, scale, unscale, t * scale};
}

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

// Whether a b + c of floats is one instruction, rounded once: everywhere but on x86-64 without FMA. (gcc defines the
// second macro, clang the third.) Doubles do not need it for 2 ulp.
#if defined(__CUDA_ARCH__) || defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(FEATHER_FUSED)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

FEATHER_HOST_DEVICE float multiply_add(float a, float b, float c) { return kFused ? fmaf(a, b, c) : a * b + c; }
FEATHER_HOST_DEVICE double multiply_add(double a, double b, double c) { return a * b + c; }

// t ~ z^(-1/3) for normal z > 0, so that 1 - z t^3 is in [-0.077, 0.12]: a third of the bits, subtracted from those of
// a constant.
FEATHER_HOST_DEVICE float inverse_cube_root_seed(float z) {
#if defined(__CUDA_ARCH__)
  const uint32_t third = __umulhi(bits_of(z), 0x55555556u);  // where conversions are slow
  return float_of(0x54A08000u - third);
#else
  const float bits = static_cast<float>(static_cast<int32_t>(bits_of(z)));
  const auto seed = static_cast<uint32_t>(static_cast<int32_t>(multiply_add(bits, -0.33333334f, 0x54A08000)));
  return float_of(kFused ? seed : seed & 0xFFFFF000u);  // 12 bits: t^2 is exact
#endif
}

// 1 - y t, rounded once, for y t near 1; without fusing for a t of 12 bits, by the upper 12 of y and the rest.
FEATHER_HOST_DEVICE float one_minus_product(float y, float t) {
  if (kFused) return multiply_add(-y, t, 1.0f);
  const float upper = float_of(bits_of(y) & 0xFFFFF000u);
  return (1.0f - upper * t) - (y - upper) * t;
}

// z^(1/3) = y c^(-2/3) with y = z t^2 and c = z t^3, for normal z > 0. With d = 1 - c the power is 1 + d q(d), q
// minimax of degree 4 (relative error 1.4e-8). Of the roundings in y a third is left, since c has them too. No
// division.
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

// For z from 2^-180 (a denormal T) to 2^57: two third-order steps t += t d (1/3 + 2/9 d), d = 1 - z t^3, and one Newton
// step of z t^2, whose residual is nearly exact. Times 2^60 z is in float's range.
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

// P(w) for T > 0 and P = 1, 2, 3 or kInfinitePower: sign(w) (abs(w)^P - T^P)^(1/P), +0.0 where pruned.
//
// Factored, so that nothing cancels: (x - T)(x + T) and (x - T)(x^2 + x T + T^2) with x and T scaled by S, which is
// exact. Rounding must not make a weight larger: y is limited to abs(w), as bits, by which a y that is infinite, NaN or
// negative because z or y^3 overflowed counts as larger too; P(w) rounds to w there. Where w is pruned z may be 0 or
// negative, which where products are fused makes no denormals (they would be slow), and no use of y.
//
// kScaled = false (see needs_scaling) saves two products and may change the last bit of P = 3.
template <int P, bool kScaled = true, class T>
FEATHER_HOST_DEVICE T threshold_positive(T w, const Threshold<T>& threshold) {
  static_assert(kScaled || sizeof(T) == sizeof(float), "doubles are scaled");
  const T a = magnitude(w);
  if (P == kInfinitePower) return a <= threshold.t ? T(0) : w;
  if (P == 1) return a <= threshold.t ? T(0) : with_sign(a - threshold.t, w);
  const T x = kScaled ? a * threshold.scale : a;
  const T bound = kScaled ? threshold.scaled : threshold.t;
  const T other = P == 2 ? x + bound : multiply_add(x, x, multiply_add(x, bound, bound * bound));
  const T z = (x - bound) * other;
  T y = P == 2 ? square_root(z) : cube_root(z);
  if (kScaled) y *= threshold.unscale;
  if (P == 3 && sizeof(T) == sizeof(double)) y = x > kFarDouble ? a : y;  // the start of the root is a float's
  y = bits_of(y) < bits_of(a) ? y : a;
  return a <= threshold.t ? T(0) : with_sign(y, w);
}

// P(w) for every T: T <= 0 is the identity, a NaN T gives NaN.
template <int P, bool kScaled = true, class T>
FEATHER_HOST_DEVICE T threshold_value(T w, const Threshold<T>& threshold) {
  if (threshold.t > 0) return threshold_positive<P, kScaled>(w, threshold);
  return threshold.t <= 0 ? w : threshold.t;
}

// The key of a score: its bits, which sort as the scores do; NaN last.
template <class T>
FEATHER_HOST_DEVICE Key<T> magnitude_key(T score) {
  return static_cast<Key<T>>(bits_of(score) & FloatFormat<T>::kMagnitude);
}

template <class T>
FEATHER_HOST_DEVICE Key<T> clamp_nan(Key<T> key) {
  return key < FloatFormat<T>::kNanKey ? key : FloatFormat<T>::kNanKey;
}

template <class T>
FEATHER_HOST_DEVICE T value_of_key(Key<T> key) {
  return key < FloatFormat<T>::kNanKey ? float_of(key) : static_cast<T>(NAN);
}

}  // namespace feather
