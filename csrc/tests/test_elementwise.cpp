// The elementwise ops and counts: every instruction set, dtype and number of threads must give the bits of the scalar
// formulas. Built twice, with and without fused multiply_add; each program tests the instruction sets that do as it
// does.
#include "cpu/instruction_set.h"
#include "cpu/ops.h"
#include "feather/math.h"
#include "harness.h"
#include "samples.h"

namespace feather_tests {
namespace {

using namespace feather;

constexpr DType kAll[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64};
constexpr size_t kBytes[] = {2, 2, 4, 8};
constexpr float kT = 0.3f;

// An array of any dtype, at an address that is not aligned to vectors.
struct Buffer {
  DType dtype;
  int64_t n;
  std::vector<char> bytes;

  Buffer(DType type, int64_t size)
      : dtype(type), n(size), bytes(static_cast<size_t>(size + 1) * kBytes[static_cast<int>(type)], '\x5A') {}
  void* data() { return bytes.data() + kBytes[static_cast<int>(dtype)]; }
  Array array() { return Array{data(), n, dtype}; }

  void set(int64_t i, double value) {
    char* place = static_cast<char*>(data()) + static_cast<size_t>(i) * kBytes[static_cast<int>(dtype)];
    const auto put = [&](auto stored) { std::memcpy(place, &stored, sizeof(stored)); };
    const float narrow = static_cast<float>(value);
    if (dtype == DType::kFloat16) put(to_half(narrow));
    if (dtype == DType::kBFloat16) put(to_bfloat16(narrow));
    if (dtype == DType::kFloat32) put(narrow);
    if (dtype == DType::kFloat64) put(value);
  }

  double get(int64_t i) {
    const char* place = static_cast<const char*>(data()) + static_cast<size_t>(i) * kBytes[static_cast<int>(dtype)];
    const auto take = [&](auto stored) {
      std::memcpy(&stored, place, sizeof(stored));
      return load<double>(stored);
    };
    if (dtype == DType::kFloat16) return take(Half());
    if (dtype == DType::kBFloat16) return take(BFloat16());
    return dtype == DType::kFloat32 ? take(0.0f) : take(0.0);
  }
};

Buffer weights_of(DType dtype, float t = kT) {
  const std::vector<float> values = weights_around(t, 40001, 11);  // enough for two threads, and an odd number
  Buffer buffer(dtype, static_cast<int64_t>(values.size()));
  for (int64_t i = 0; i < buffer.n; ++i) buffer.set(i, values[static_cast<size_t>(i)]);
  return buffer;
}

double scalar_threshold(double w, DType dtype, float bound, double p) {
  const auto run = [&](auto weight) -> double {
    using T = decltype(weight);
    const ScaledThreshold<T> t = scale_threshold(static_cast<T>(bound));
    if (p == 1) return apply_threshold<1>(weight, t);
    if (p == 2) return apply_threshold<2>(weight, t);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (p == 3 && !needs_scaling(bound)) return apply_threshold<3, false>(weight, t);
    }
    if (p == 3) return apply_threshold<3>(weight, t);
    return apply_threshold<kInfinitePower>(weight, t);
  };
  return is_wide(dtype) ? run(w) : run(static_cast<float>(w));
}

bool equal(double a, double b) { return (std::isnan(a) && std::isnan(b)) || bits_of(a) == bits_of(b); }

void threshold_has_the_bits_of_the_formula(float t) {
  for (const DType dtype : kAll) {
    Buffer w = weights_of(dtype, t);
    for (const DType out_dtype : kAll) {
      for (const double p : {1.0, 2.0, 3.0, static_cast<double>(INFINITY)}) {
        Buffer expected(out_dtype, w.n);
        for (int64_t i = 0; i < w.n; ++i) expected.set(i, scalar_threshold(w.get(i), dtype, t, p));
        for (const std::string& name : available_instruction_sets()) {
          use_instruction_set(name);
          if (kernels().fused != kFused) continue;
          for (const int threads : {1, 3}) {
            Buffer out(out_dtype, w.n);
            threshold(w.array(), static_cast<double>(t), p, out.data(), out_dtype, threads);
            for (int64_t i = 0; i < w.n; ++i) {
              CHECK(equal(out.get(i), expected.get(i)), name, " threads=", threads, " T=", t, " p=", p, " w=", w.get(i),
                    " gives ", out.get(i), " instead of ", expected.get(i));
            }
          }
        }
      }
    }
  }
}

void threshold_in_place_and_identity() {
  for (const DType dtype : kAll) {
    for (const std::string& name : available_instruction_sets()) {
      use_instruction_set(name);
      Buffer w = weights_of(dtype);
      Buffer before = w;
      for (const double t : {-1.0, 0.0}) {
        threshold(w.array(), t, 3.0, w.data(), dtype, 2);
        for (int64_t i = 0; i < w.n; ++i) CHECK(equal(w.get(i), before.get(i)), name, " T=", t, " element ", i);
      }
      Buffer out(dtype, w.n);
      threshold(w.array(), static_cast<double>(kT), 3.0, out.data(), dtype, 2);
      threshold(w.array(), static_cast<double>(kT), 3.0, w.data(), dtype, 2);
      for (int64_t i = 0; i < w.n; ++i) CHECK(equal(out.get(i), w.get(i)), name, " element ", i);
      threshold(w.array(), static_cast<double>(kNan), 3.0, w.data(), dtype, 2);
      CHECK(std::isnan(w.get(0)) && std::isnan(w.get(w.n - 1)), "NaN T");
    }
  }
}

void gradients_have_the_bits_of_the_formula() {
  for (const DType g_dtype : kAll) {
    Buffer g = weights_of(g_dtype);
    for (const DType dtype : kAll) {
      Buffer w = weights_of(dtype);
      const bool wide = is_wide(g_dtype) || is_wide(dtype);
      for (const DType out_dtype : kAll) {
        Buffer expected(out_dtype, w.n);
        for (int64_t i = 0; i < w.n; ++i) {
          const bool pruned = std::fabs(w.get(i)) <= static_cast<double>(kT);
          const double exact = g.get(i) * (pruned ? static_cast<double>(0.3f) : 1.0);
          expected.set(i, wide ? exact : static_cast<double>(static_cast<float>(exact)));
        }
        for (const std::string& name : available_instruction_sets()) {
          use_instruction_set(name);
          Buffer out(out_dtype, w.n);
          scale_pruned_grad(g.array(), w.array(), static_cast<double>(kT), static_cast<double>(0.3f), out.data(),
                            out_dtype, 2);
          for (int64_t i = 0; i < w.n; ++i) {
            CHECK(equal(out.get(i), expected.get(i)), name, " g=", g.get(i), " w=", w.get(i), " gives ", out.get(i),
                  " instead of ", expected.get(i));
          }
        }
      }
    }
  }
}

void counts() {
  std::vector<Buffer> buffers;
  for (const DType dtype : kAll) buffers.push_back(weights_of(dtype));
  buffers.emplace_back(DType::kFloat32, 0);
  buffers.emplace_back(DType::kFloat16, (1 << 20) + 1001);  // more than one block of count_kernel
  for (int64_t i = 0; i < buffers.back().n; ++i) buffers.back().set(i, i % 3 == 0 ? 0.1 : 0.5);
  std::vector<Array> arrays;
  std::vector<int64_t> expected;
  for (Buffer& buffer : buffers) {
    arrays.push_back(buffer.array());
    int64_t count = 0;
    for (int64_t i = 0; i < buffer.n; ++i) count += std::fabs(buffer.get(i)) <= static_cast<double>(kT) ? 1 : 0;
    expected.push_back(count);
  }
  for (const std::string& name : available_instruction_sets()) {
    use_instruction_set(name);
    for (const int threads : {1, 2, 5}) {
      std::vector<int64_t> found(arrays.size(), -1);
      count_pruned(arrays, std::vector<double>(arrays.size(), static_cast<double>(kT)), found.data(), threads);
      CHECK(found == expected, name, " threads=", threads);
    }
  }
}

void bad_arguments_are_refused() {
  float value = 1;
  const Array one{&value, 1, DType::kFloat32};
  for (const double p : {0.5, 2.5, 0.0, 4.0, -static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
    CHECK_REFUSED(threshold(one, 1.0, p, &value, DType::kFloat32, 1), "power must be 1, 2, 3 or inf, got ");
  }
  CHECK_REFUSED(threshold(one, 1.0, 3.0, &value, static_cast<DType>(9), 1), "dtype code must be in [0, 4), got 9");
  CHECK_REFUSED(scale_pruned_grad(Array{&value, 2, DType::kFloat32}, one, 1, 1, &value, DType::kFloat32, 1),
                "g must have");
  CHECK_REFUSED(count_pruned({one}, {}, nullptr, 1), "thresholds must be one per weight (1), got 0");
  CHECK_REFUSED(use_instruction_set("mmx"), "instruction set must be one of");
}

}  // namespace
}  // namespace feather_tests

int main() {
  using namespace feather_tests;
  return run_all({{"threshold has the bits of the formula", [] { threshold_has_the_bits_of_the_formula(kT); }},
                  {"threshold at the least T without scaling", [] { threshold_has_the_bits_of_the_formula(0x1p-20f); }},
                  {"threshold with denormal results", [] { threshold_has_the_bits_of_the_formula(1e-40f); }},
                  {"threshold in place, identity, NaN", threshold_in_place_and_identity},
                  {"gradients have the bits of the formula", gradients_have_the_bits_of_the_formula},
                  {"counts", counts},
                  {"bad arguments are refused", bad_arguments_are_refused}});
}
