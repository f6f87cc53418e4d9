// Arrays, values and expect() for the tests of csrc/cuda.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmath>
#include <random>
#include <vector>

#include "feather/dtype.h"
#include "feather/math.h"

namespace feather {

inline int failures = 0;

// Counts a failure if the condition does not hold; the first 20 are printed, with the arguments of printf.
template <class... Values>
void expect(bool holds, const char* format, Values... values) {
  if (holds || ++failures > 20) return;
  fprintf(stderr, "failed: ");
  fprintf(stderr, format, values...);
  fprintf(stderr, "\n");
}

// n elements that start `offset` elements after a multiple of 256 bytes. The memory ends with the last element, so that
// AddressSanitizer sees an access beyond it.
template <class W>
class Array {
 public:
  explicit Array(int64_t n, int64_t offset = 0) : n_(n), offset_(offset) {
    const size_t bytes = static_cast<size_t>(n + offset) * sizeof(W);
    if (posix_memalign(&memory_, 256, bytes) != 0) abort();
  }
  Array(const Array&) = delete;
  Array(Array&& other) noexcept : memory_(other.memory_), n_(other.n_), offset_(other.offset_) {
    other.memory_ = nullptr;
  }
  ~Array() { free(memory_); }

  W* data() const { return static_cast<W*>(memory_) + offset_; }
  W& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return n_; }

 private:
  void* memory_;
  int64_t n_, offset_;
};

template <class W>
constexpr DType dtype_of() {
  if (sizeof(W) == 8) return DType::kFloat64;
  if (sizeof(W) == 4) return DType::kFloat32;
  return std::is_same_v<W, Half> ? DType::kFloat16 : DType::kBFloat16;
}

template <class W>
const char* name_of() {
  constexpr const char* kNames[] = {"float16", "bfloat16", "float32", "float64"};
  return kNames[static_cast<int>(dtype_of<W>())];
}

template <class W>
W stored(double value) {
  W result;
  store(result, static_cast<Compute<W>>(value));
  return result;
}

template <class W>
double value_of(W stored) {
  return static_cast<double>(load<Compute<W>>(stored));
}

// Fills w with a mix of normally distributed values, T and its neighbours, zeros, infinities, NaNs and denormals, of
// both signs.
template <class W>
void fill(const Array<W>& w, double t, unsigned seed) {
  std::mt19937 chance(seed);
  std::normal_distribution<double> normal;
  const double eps = sizeof(W) == 8 ? 0x1p-52 : sizeof(W) == 4 ? 0x1p-23 : std::is_same_v<W, Half> ? 0x1p-10 : 0x1p-7;
  const double special[] = {t,
                            t * (1 + eps),
                            t * (1 - eps),
                            t * (1 + 2 * eps),
                            t * 1.5,
                            t * 1000,
                            t * 100000,
                            INFINITY,
                            NAN,
                            0.0,
                            -0.0,
                            1e-40,
                            6e-8,
                            1.0};
  for (int64_t i = 0; i < w.size(); ++i) {
    const unsigned kind = chance() % 4;
    double value = kind == 0 ? special[chance() % 14] : normal(chance) * std::fabs(t) * (kind == 1 ? 1.1 : 3);
    if (kind == 3) value = std::exp2(static_cast<double>(chance() % 30)) * t;
    w[i] = stored<W>(chance() % 2 == 0 ? value : -value);
  }
}

}  // namespace feather
