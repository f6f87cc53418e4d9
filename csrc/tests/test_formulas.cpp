// The formulas of math.h against long double, and the conversions of dtype.h for every 16-bit value.
#include "feather/math.h"
#include "harness.h"
#include "samples.h"

namespace feather_tests {
namespace {

using namespace feather;

// The value of a half, from the definition of the format.
double half_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 1023;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return mantissa != 0 ? std::nan("") : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25));
}

double bfloat16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

void every_16_bit_value_converts_and_back() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t stored = static_cast<uint16_t>(bits);
    const double half = half_value(stored);
    const float from_half = to_float(Half{stored});
    CHECK(std::isnan(half) ? std::isnan(from_half) : from_half == half, "half ", bits);
    CHECK(std::signbit(half) == std::signbit(from_half) || std::isnan(half), "sign of half ", bits);
    CHECK(std::isnan(half) || to_half(from_half).bits == stored, "half and back ", bits);
    const double brain = bfloat16_value(stored);
    const float from_brain = to_float(BFloat16{stored});
    CHECK(std::isnan(brain) ? std::isnan(from_brain) : from_brain == brain, "bfloat16 ", bits);
    CHECK(std::isnan(brain) || to_bfloat16(from_brain).bits == stored, "bfloat16 and back ", bits);
  }
}

// For each pair of neighbours a < b in a 16-bit format: floats nearer to a must round to a, those nearer to b to b, and
// the middle to the even one.
template <class Convert, class Value>
void check_rounding(uint16_t last_finite, Convert convert, Value value) {
  for (uint16_t low = 0; low < last_finite; ++low) {
    const double a = value(low);
    const double b = value(static_cast<uint16_t>(low + 1));
    const float middle = static_cast<float>((a + b) / 2);
    if (static_cast<double>(middle) != (a + b) / 2) continue;  // below float's denormals
    const uint16_t even = static_cast<uint16_t>(low + (low & 1));
    for (const float sign : {1.0f, -1.0f}) {
      const uint16_t bit = sign < 0 ? 0x8000 : 0;
      CHECK(convert(sign * middle) == (even | bit), "middle above ", low);
      CHECK(convert(sign * std::nextafter(middle, 0.0f)) == (low | bit) || middle == 0, "below the middle above ", low);
      CHECK(convert(sign * std::nextafter(middle, kInfinity)) == ((low + 1) | bit), "beyond the middle above ", low);
    }
  }
}

void sixteen_bit_results_are_rounded_to_nearest_even() {
  check_rounding(0x7BFF, [](float x) { return to_half(x).bits; }, half_value);
  check_rounding(0x7F7F, [](float x) { return to_bfloat16(x).bits; }, bfloat16_value);
  CHECK(to_half(65519.99f).bits == 0x7BFF && to_half(65520.0f).bits == 0x7C00, "largest half");
  CHECK(to_half(70000.0f).bits == 0x7C00 && to_half(-1e30f).bits == 0xFC00, "beyond the halves");
  CHECK(to_half(kInfinity).bits == 0x7C00 && to_half(-kInfinity).bits == 0xFC00, "infinite halves");
  CHECK(to_bfloat16(std::numeric_limits<float>::max()).bits == 0x7F80, "largest float to bfloat16");
  for (const uint32_t nan : {0x7F800001u, 0x7FFFFFFFu, 0xFFFFFFFFu, 0xFF800001u}) {
    CHECK(std::isnan(to_float(to_half(float_of(nan)))), "NaN ", nan);
    CHECK(std::isnan(to_float(to_bfloat16(float_of(nan)))), "NaN ", nan);
  }
}

constexpr float kThresholds[] = {
    0.0123f,        0.3f, 1.0f, 1.9999f, 7.7f, 1e-6f, 1e-30f, 1e30f, 3e38f, 1e-38f, 1e-42f, 1e6f, 9.5367431640625e-7f,
    1.17549435e-38f};

template <int P>
double power_of() {
  return P == kInfinitePower ? INFINITY : P;
}

template <int P>
void check_threshold() {
  double worst = 0;
  double worst_double = 0;
  for (const float t : kThresholds) {
    const ScaledThreshold<float> narrow = scale_threshold(t);
    const ScaledThreshold<double> wide = scale_threshold(static_cast<double>(t));
    for (const float w : weights_around(t, 20000, 7)) {
      for (const bool scaled : {true, false}) {
        if (!scaled && needs_scaling(t)) continue;
        const float y = scaled ? apply_threshold<P>(w, narrow) : apply_threshold<P, false>(w, narrow);
        const double error = float_ulps(y, exact_threshold(w, t, power_of<P>()));
        CHECK(error <= 2, "P=", P, " T=", t, " w=", w, " scaled=", scaled, " gives ", y, ", ", error, " ulp");
        CHECK(!(std::fabs(y) > std::fabs(w)), "P=", P, " T=", t, " w=", w, " scaled=", scaled, " grew to ", y);
        CHECK(y != 0 || !std::signbit(y) || !(std::fabs(w) <= t), "-0 for w=", w);
        worst = std::max(worst, error);
      }
      const double y_double = apply_threshold<P>(static_cast<double>(w), wide);
      const double error_double = double_ulps(y_double, exact_threshold(w, t, power_of<P>()));
      CHECK(error_double <= 2, "double P=", P, " T=", t, " w=", w, " gives ", y_double, ", ", error_double, " ulp");
      worst_double = std::max(worst_double, error_double);
    }
  }
  std::printf("  P=%d: %.3f ulp, double %.3f ulp\n", P, worst, worst_double);
}

void threshold_is_within_two_ulps() {
  check_threshold<1>();
  check_threshold<2>();
  check_threshold<3>();
  check_threshold<kInfinitePower>();
}

void doubles_beyond_floats_range() {
  for (const double t : {1e-300, 1e-60, 1e60, 1e300, 5e-324}) {
    for (const double factor :
         {1.0, 1 + 1e-15, 1.5, 1e3, 5e5, 6e5, 1e12, 8e12, 1e13, 1.4e13, 2e13, 1e15, 1e40, 1e200}) {
      const double w = -t * factor;
      if (std::isinf(w)) continue;
      const double y = apply_threshold<3>(w, scale_threshold(t));
      CHECK(double_ulps(y, exact_threshold(w, t, 3)) <= 2, "T=", t, " w=", w, " gives ", y);
    }
  }
}

void denormal_thresholds() {
  for (int exponent = 0; exponent <= 60; ++exponent) {
    const double t = std::ldexp(5e-324, exponent);
    for (const double more : {1.0, 2.0, 3.0, 5.0, 9.0, 1000.0}) {
      const double w = t + more * 5e-324;
      const double y = apply_threshold<3>(w, scale_threshold(t));
      CHECK(double_ulps(y, exact_threshold(w, t, 3)) <= 2, "T=", t, " w=", w, " gives ", y);
    }
  }
}

void non_positive_and_nan_thresholds() {
  for (const float t : {0.0f, -0.0f, -1.0f, -kInfinity}) {
    for (const float w : weights_around(1.0f, 10, 1)) {
      CHECK(bits_of(apply_threshold<3>(w, scale_threshold(t))) == bits_of(w), "T=", t, " w=", w);
      CHECK(!is_pruned(w, t), "T=", t, " w=", w);
    }
  }
  CHECK(std::isnan(apply_threshold<3>(1.0f, scale_threshold(kNan))), "NaN T");
  CHECK(!is_pruned(0.0f, kNan), "NaN T");
  CHECK(!is_pruned(kNan, 1.0f) && !is_pruned(kNan, kInfinity), "NaN w");
  CHECK(is_pruned(kInfinity, kInfinity) && apply_threshold<3>(-kInfinity, scale_threshold(kInfinity)) == 0, "inf T");
}

void keys_sort_as_magnitudes() {
  CHECK(magnitude_key(-2.0f) == magnitude_key(2.0f) && magnitude_key(-0.0f) == 0, "sign");
  CHECK(magnitude_key(1.0f) < magnitude_key(kInfinity), "order");
  CHECK(clamp_nan<float>(magnitude_key(-kNan)) == magnitude_key(kInfinity) + 1, "NaN is behind inf");
  CHECK(std::isnan(value_of_key<float>(FloatFormat<float>::kNanKey)), "NaN key");
  CHECK(value_of_key<double>(magnitude_key(-1.5)) == 1.5, "double key");
}

}  // namespace
}  // namespace feather_tests

int main() {
  using namespace feather_tests;
  return run_all({{"every 16-bit value converts and back", every_16_bit_value_converts_and_back},
                  {"16-bit results are rounded to nearest even", sixteen_bit_results_are_rounded_to_nearest_even},
                  {"threshold is within 2 ulp", threshold_is_within_two_ulps},
                  {"doubles beyond float's range", doubles_beyond_floats_range},
                  {"denormal thresholds of doubles", denormal_thresholds},
                  {"non-positive and NaN thresholds", non_positive_and_nan_thresholds},
                  {"keys sort as magnitudes", keys_sort_as_magnitudes}});
}
