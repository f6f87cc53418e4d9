// The loops that are compiled once for each instruction set (kernels_*.cpp), behind a table of function pointers.
//
// They run on one thread over dense arrays; threads, lists and dtypes are the business of their callers. Thresholds,
// scales and keys cross this boundary in double and uint64_t, which hold those of float exactly.
#pragma once

#include <stdint.h>

#include "feather/math.h"

namespace feather {

// What one scan of a bracket [low, high] of keys found.
struct BracketCount {
  int64_t below;   // keys < low
  int64_t inside;  // keys in the bracket; they stand in the buffer unless it was too small
  bool overflow;   // the buffer was too small, and the scan ended early
};

// Calls f(value, code) with a value of each storage type.
template <class F>
FEATHER_HOST_DEVICE void for_each_type(const F& f) {
  f(Half(), 0);
  f(BFloat16(), 1);
  f(float(), 2);
  f(double(), 3);
}

struct Kernels {
  bool fused;  // multiply_add of math.h rounds once; a set that does not may differ in the last bit for p = 3

  // out[i] = P(w[i]), any T; out may be w where the dtypes agree.
  void (*threshold[kDTypes][kDTypes][kPowers])(const void* w, void* out, int64_t n, double t);

  // out[i] = g[i], times grad_scale where w[i] is pruned; the product in the wider of g's and w's compute types;
  // out may be g where the dtypes agree. Indices: g, w, out.
  void (*scale_pruned_grad[kDTypes][kDTypes][kDTypes])(const void* g, const void* w, void* out, int64_t n, double t,
                                                       double grad_scale);

  int64_t (*count_pruned[kDTypes])(const void* w, int64_t n, double t);

  // Scores are abs(w) or, in the second column, scale * abs(w), rounded in the compute type. The buffer holds keys of
  // the compute type (uint32_t or uint64_t) and has room for one more than capacity.
  BracketCount (*scan_bracket[kDTypes][2])(const void* w, int64_t n, double scale, uint64_t low, uint64_t high,
                                           void* buffer, int64_t capacity);

  // keys[i] = key of the score of w[i], NaN clamped to its one key.
  void (*keys[kDTypes][2])(const void* w, int64_t n, double scale, void* keys);
};

#define FEATHER_FILLED_BY(isa)             \
  namespace isa {                          \
  void fill_elementwise(Kernels& kernels); \
  void fill_selection(Kernels& kernels);   \
  }
FEATHER_FILLED_BY(baseline)
FEATHER_FILLED_BY(avx2)
FEATHER_FILLED_BY(avx512)
FEATHER_FILLED_BY(avx512bf16)  // elementwise alone
#undef FEATHER_FILLED_BY

}  // namespace feather
