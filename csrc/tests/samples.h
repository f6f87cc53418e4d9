// Inputs of the tests, reference results and errors in ulps, none of which uses the code under test.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "feather/dtype.h"

namespace feather_tests {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// `normal` values of a normal distribution, then the neighbours of T and -T, powers of two, and special values.
inline std::vector<float> weights_around(float t, size_t normal, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution(0.0f, 2 * (t > 0 && t < 1e30f ? t : 1.0f));
  std::vector<float> weights(normal);
  for (float& w : weights) w = distribution(generator);
  float up = t;
  float down = t;
  for (int i = 0; i < 50; ++i) {
    weights.insert(weights.end(), {up, -up, down, -down});
    up = std::nextafter(up, kInfinity);
    down = std::nextafter(down, 0.0f);
  }
  for (int exponent = -149; exponent < 128; ++exponent) {
    weights.push_back(std::ldexp(1.0f, exponent));
    weights.push_back(-std::ldexp(1.4142135f, exponent));
  }
  for (const float special : {0.0f, -0.0f, kInfinity, -kInfinity, kNan, -kNan, std::numeric_limits<float>::max()}) {
    weights.push_back(special);
  }
  weights.push_back(feather::float_of(0x7FFFFFFFu));  // a NaN that integer rounding to 16 bits would turn into zero
  return weights;
}

// P(w) in long double, for T > 0.
inline long double exact_threshold(long double w, long double t, double p) {
  const long double a = std::fabs(w);
  if (a <= t) return 0.0L;
  if (std::isinf(w) || std::isnan(w)) return w;
  long double y = a;
  if (p == 1) {
    y = a - t;
  } else if (p == 3) {
    y = std::cbrt(a - t) * std::cbrt(a * a + a * t + t * t);
  } else if (!std::isinf(p)) {
    y = a * std::exp(std::log(-std::expm1(p * std::log1p(-(a - t) / a))) / static_cast<long double>(p));
  }
  return std::copysign(y, w);
}

// The error of `value` in units in the last place of `exact`, in a format with this many mantissa bits and this least
// exponent.
inline double ulps(long double value, long double exact, int mantissa_bits, int least_exponent) {
  if (std::isnan(exact)) return std::isnan(value) ? 0 : 1e9;
  if (value == exact) return 0;
  if (std::isinf(exact) || !std::isfinite(value)) return 1e9;
  const int exponent = exact == 0 ? least_exponent : std::max(std::ilogb(exact), least_exponent);
  return static_cast<double>(std::fabs(value - exact) / std::ldexp(1.0L, exponent - mantissa_bits));
}

inline double float_ulps(float value, long double exact) { return ulps(value, exact, 23, -126); }
inline double double_ulps(double value, long double exact) { return ulps(value, exact, 52, -1022); }

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

}  // namespace feather_tests
