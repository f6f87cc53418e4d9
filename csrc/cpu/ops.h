// The ops of feather_kernels/ops/schema.py over contiguous arrays in a CPU's memory.
//
// Every combination of dtypes is allowed unless a comment says otherwise; no address needs to be aligned beyond its
// dtype. `threads` is the most threads to use: 1 below kParallel elements. Results do not depend on it. Calls from
// several threads are independent as long as no output overlaps another call's arrays. Arguments that cannot be right
// throw std::invalid_argument.
#pragma once

#include <stdint.h>

#include <vector>

#include "feather/dtype.h"

namespace feather {

// n contiguous elements of one dtype, owned by the caller.
struct Array {
  const void* data;
  int64_t n;
  DType dtype;
};

// Reads a 0-dim tensor of the compute dtype of `weight`.
double read_scalar(const void* scalar, DType weight);

// out[i] = P(w[i]) = sign(w[i]) (abs(w[i])^p - t^p)^(1/p), +0.0 where w[i] is pruned; p is 1, 2, 3 or infinite. out may
// be w.data if the dtypes agree, and otherwise must not overlap w.
void threshold(const Array& w, double t, double p, void* out, DType out_dtype, int threads);

// out[i] = g[i], or g[i] grad_scale where w[i] is pruned, computed in the wider of the compute types of g and w. out
// may be g.data if the dtypes agree.
void scale_pruned_grad(const Array& g, const Array& w, double t, double grad_scale, void* out, DType out_dtype,
                       int threads);

// counts[l] = number of elements of weights[l] that thresholds[l] prunes.
void count_pruned(const std::vector<Array>& weights, const std::vector<double>& thresholds, int64_t* counts,
                  int threads);

// The scores abs(w) or scale abs(w) of arrays, in groups. Arrays are all float64 or none is.
struct Scores {
  std::vector<Array> weights;
  std::vector<int64_t> groups;  // the group of each array, in [0, group_count)
  int64_t group_count;
  const void* scales;   // one of the compute dtype for each array, or null
  const int64_t* caps;  // only the caps[l] smallest scores of array l take part; null: all
};

// out[g] = (v[rank[g]], v[rank[g] + 1]) for the ascending scores v of group g; out is (group_count, 2) of the compute
// dtype. Past the last score the second repeats the first; a rank outside of the group gives NaN twice. hint is null or
// the result of an earlier call, (group_count, 2): it makes the search faster and never changes its result.
void magnitude_select(const Scores& scores, const int64_t* rank, const void* hint, void* out, int threads);

// What collect_keys finds: the number of keys below the bracket of each group, and the number inside. Those inside are
// in `keys`, group after group; a group whose keys do not fit has none there, and -1 as its number.
struct KeysInside {
  int64_t* below;
  int64_t* inside;
  int64_t* keys;
  int64_t capacity;  // of keys
};

// Scans each group once for the keys from low[g] to high[g], both included; not at all if low[g] > high[g]. Caps are
// ignored.
void collect_keys(const Scores& scores, const int64_t* low, const int64_t* high, const KeysInside& out, int threads);

// out[g][d] = number of keys in group g whose bits above shift + bits equal prefix[g] and whose next `bits` bits are d;
// out is (group_count, 2^bits). bits is in [1, 16]; caps are ignored.
void magnitude_histogram(const Scores& scores, const int64_t* prefix, int shift, int bits, int64_t* out, int threads);

}  // namespace feather
