// The table of function pointers to the loops in kernels_*.cpp, which are compiled once for each instruction set.
//
// A kernel runs on one thread over contiguous arrays, at any alignment; its caller divides the work among threads and
// looks up the dtypes. Tables are indexed by dtype codes (dtype.h). Thresholds, scales and keys are passed as double
// and uint64_t, which hold those of float exactly.
#pragma once

#include <stdint.h>

#include "feather/math.h"

namespace feather {

// What the scan of an array for a bracket [low, high] of keys found.
struct BracketCount {
  int64_t below;   // number of keys < low
  int64_t inside;  // number of keys in the bracket, which were written to the buffer
  bool overflow;   // the buffer was too small and the scan ended early: the counts mean nothing
};

// Calls f(value, index) with a value of each storage type and the index of the type in kernel tables.
template <class F>
FEATHER_HOST_DEVICE void for_each_type(const F& f) {
  f(Half(), static_cast<int>(kDTypeOf<Half>));
  f(BFloat16(), static_cast<int>(kDTypeOf<BFloat16>));
  f(float(), static_cast<int>(kDTypeOf<float>));
  f(double(), static_cast<int>(kDTypeOf<double>));
}

struct Kernels {
  // Whether multiply_add (math.h) rounds once; where it does not, P(w) with p = 3 may differ in the last bit.
  bool fused;

  // out[i] = P(w[i]), for any t; out may be w if the dtypes agree. Indices: w, out, P.
  void (*threshold[kDTypes][kDTypes][kPowers])(const void* w, void* out, int64_t n, double t);

  // out[i] = g[i], or g[i] grad_scale where w[i] is pruned, in the wider of the compute types of g and w; out may be g
  // if the dtypes agree. Indices: g, w, out.
  void (*scale_pruned_grad[kDTypes][kDTypes][kDTypes])(const void* g, const void* w, void* out, int64_t n, double t,
                                                       double grad_scale);

  // Number of elements of w that t prunes.
  int64_t (*count_pruned[kDTypes])(const void* w, int64_t n, double t);

  // Counts the keys below [low, high] and writes those inside to the buffer, which has room for capacity + 1 keys of
  // the compute type (uint32_t or uint64_t). The second index says whether scores are scale abs(w), rounded to the
  // compute type, or abs(w).
  BracketCount (*scan_bracket[kDTypes][2])(const void* w, int64_t n, double scale, uint64_t low, uint64_t high,
                                           void* buffer, int64_t capacity);

  // keys[i] = key of the score of w[i], with all NaNs as kNanKey. Indices as for scan_bracket.
  void (*keys[kDTypes][2])(const void* w, int64_t n, double scale, void* keys);
};

// Each set's namespace fills in the members that its kernels_elementwise.cpp and kernels_selection.cpp define.
#define FEATHER_FILLED_BY(isa)             \
  namespace isa {                          \
  void fill_elementwise(Kernels& kernels); \
  void fill_selection(Kernels& kernels);   \
  }
FEATHER_FILLED_BY(baseline)
FEATHER_FILLED_BY(avx2)
FEATHER_FILLED_BY(avx512)
FEATHER_FILLED_BY(avx512bf16)  // elementwise only
#undef FEATHER_FILLED_BY

}  // namespace feather
