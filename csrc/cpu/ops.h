// The ops of the contract (feather_kernels/ops/schema.py) over dense arrays on a CPU. Dtypes, threads: see Array.
//
// Every function throws std::invalid_argument for arguments that make no sense; the arrays are the caller's to keep.
#pragma once

#include <stdint.h>

#include <vector>

#include "feather/dtype.h"

namespace feather {

// n elements of one dtype, one after the other.
struct Array {
  const void* data;
  int64_t n;
  DType dtype;
};

bool is_wide(DType dtype);  // computed in float64

// The number that a 0-dim tensor of the compute dtype of `weight` holds.
double read_scalar(const void* scalar, DType weight);

// out[i] = P(w[i]); p: 1, 2, 3 or infinite. out may be w's data where the dtypes agree; otherwise they must not
// overlap.
void threshold(const Array& w, double t, double p, void* out, DType out_dtype, int threads);

// out[i] = g[i], times grad_scale where w[i] is pruned.
void scale_pruned_grad(const Array& g, const Array& w, double t, double grad_scale, void* out, DType out_dtype,
                       int threads);

// counts[l] = pruned elements of weights[l] under thresholds[l].
void count_pruned(const std::vector<Array>& weights, const std::vector<double>& thresholds, int64_t* counts,
                  int threads);

// The arrays of a selection and their groups. scales (one per array, of the compute dtype) and caps may be null.
struct Scores {
  std::vector<Array> weights;
  std::vector<int64_t> groups;
  int64_t group_count;
  const void* scales;
  const int64_t* caps;
};

// out (group_count, 2) of the compute dtype: the rank-th smallest score of each group and the next; hint: null, or
// the result of an earlier call.
void magnitude_select(const Scores& scores, const int64_t* rank, const void* hint, void* out, int threads);

// out (group_count, 2^bits): counts of the digits above shift of the keys whose higher bits are prefix[group].
void magnitude_histogram(const Scores& scores, const int64_t* prefix, int shift, int bits, int64_t* out, int threads);

}  // namespace feather
