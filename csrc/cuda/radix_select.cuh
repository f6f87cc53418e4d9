// Radix selection on the device, most significant digit first: a histogram pass over all weights, then a small scan.
//
// A row whose prefix is negative is done: blocks that work for it exit at once. Integer atomics: results do not depend
// on the order of threads. Counts, keys and prefixes are int64.
#pragma once

#include "cuda/chunk_table.cuh"

namespace feather::cuda {

constexpr int kDigitBits = 11;  // at most, of one pass: 2,048 bins in shared memory

// Calls f(bin) for the bins of this thread of a block; their number is a constant, so the compiler needs no rest.
template <class F>
__device__ __forceinline__ void for_each_bin(const F& f) {
  static_assert((1 << kDigitBits) % kThreads == 0, "every bin has a thread");
#pragma unroll
  for (int i = 0; i < (1 << kDigitBits) / kThreads; ++i) f(static_cast<int>(threadIdx.x) + i * kThreads);
}

// counts (rows, 2^bits) += the digits of one chunk whose key starts with prefixes[row]. Digits of more than kDigitBits
// are counted in parts, each of which reads the chunk again.
template <class W>
__global__ void __launch_bounds__(kThreads, kBlocksOnProcessor)
    histogram_kernel(const int64_t* chunks, const Compute<W>* scales, const int64_t* prefixes, int shift, int bits,
                     int64_t* counts) {
  using K = Key<Compute<W>>;
  FEATHER_SHARED(unsigned, found, 1 << kDigitBits);
  const Chunk<W> chunk = chunk_of_block<W>(chunks);
  const int64_t prefix = prefixes[chunk.row];
  if (prefix < 0) return;
  const int part_bits = bits < kDigitBits ? bits : kDigitBits;
  const int bins = 1 << part_bits;
  const int parts = 1 << (bits - part_bits);
  for (int part = 0; part < parts; ++part) {
    for_each_bin([&](int bin) { found[bin] = 0; });
    __syncthreads();
    const K upper = (static_cast<K>(prefix) << (bits - part_bits)) + static_cast<K>(part);
    for_each_key(chunk, scales, [&](K key) {
      const K digits = clamp_nan<Compute<W>>(key) >> shift;
      if (digits >> part_bits == upper) atomicAdd(&found[digits & static_cast<K>(bins - 1)], 1u);
    });
    __syncthreads();
    int64_t* row = counts + (chunk.row << bits) + static_cast<int64_t>(part) * bins;
    for_each_bin([&](int bin) {  // the same thread's as above: no barrier behind
      if (found[bin] > 0) add_to(row + bin, found[bin]);
    });
  }
}

// What a scan reads and writes; see Selection.
struct Scan {
  const int64_t* rank;
  const int64_t* row_starts;
  const int64_t* array_of_row;
  const int64_t* caps;  // or null
  int64_t* counts;      // (rows, 2^kDigitBits): of the pass before; set to zero
  int64_t* prefixes;    // (rows): extended by the digit
  int64_t* below;       // (rows): keys before the prefix, likewise
  int64_t* sizes;       // (groups): set by the first pass
  int64_t* keys;        // (groups, 2): set by the last
};

__device__ __forceinline__ int64_t cap_of(const Scan& scan, int64_t row) { return scan.caps[scan.array_of_row[row]]; }

// total[i] += how many keys of a row, at most its cap, lie below the end of this thread's i-th bin.
template <int EACH>
__device__ __forceinline__ void add_row(const Scan& scan, int64_t row, int64_t (&total)[EACH], int64_t* warp_sums) {
  const int64_t* counts = scan.counts + row * (EACH * kThreads) + threadIdx.x * EACH;
  int64_t found[EACH], sum = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) sum += found[i] = counts[i];
  int64_t through = scan.below[row] + block_sum_before(sum, warp_sums);
  const int64_t cap = scan.caps == nullptr ? INT64_MAX : cap_of(scan, row);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    through += found[i];
    total[i] += through < cap ? through : cap;
  }
}

// How many of the bins' totals are at most a bound: the number of the first bin beyond it, as they ascend.
template <int EACH>
__device__ __forceinline__ int64_t first_beyond(const int64_t (&total)[EACH], int64_t bound, int64_t* warp_sums) {
  int64_t before = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) before += total[i] <= bound;
  return block_total(before, warp_sums);
}

// Sets what follows from a digit for one row, and its counts to zero. open: more of the key is to be found.
template <int EACH, bool LAST>
__device__ __forceinline__ void extend_row(const Scan& scan, int64_t row, int64_t digit, int64_t extended, bool open,
                                           int64_t* warp_sums) {
  int64_t* counts = scan.counts + row * (EACH * kThreads) + threadIdx.x * EACH;
  int64_t smaller = 0, equal = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int64_t bin = static_cast<int64_t>(threadIdx.x) * EACH + i;
    smaller += bin < digit ? counts[i] : 0;
    if (LAST) equal += bin == digit ? counts[i] : 0;
    counts[i] = 0;
  }
  smaller = block_total(smaller, warp_sums);
  if (LAST) equal = block_total(equal, warp_sums);
  if (threadIdx.x > 0) return;
  const int64_t before = scan.below[row] + smaller;
  if (LAST && scan.caps != nullptr) open = open && before + equal < cap_of(scan, row);
  scan.below[row] = before;
  scan.prefixes[row] = open ? extended : -1;
}

// One block a group: the next BITS bits of the key of its rank, from the counts of its rows.
//
// After the last pass (LAST) keys hold what was found; where the neighbour lies under another prefix its place holds
// nan_key and prefixes keep the whole key.
template <int BITS, bool LAST>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads) scan_kernel(Scan scan, bool first, int64_t nan_key) {
  constexpr int kBins = 1 << BITS, kEach = kBins / kThreads;
  FEATHER_SHARED(int64_t, warp_sums, kWarps);
  FEATHER_SHARED(int64_t, at_digit, 1);
  const int64_t group = blockIdx.x;
  const int64_t wanted = scan.rank[group], start = scan.row_starts[group], stop = scan.row_starts[group + 1];
  const int64_t prefix = start < stop ? scan.prefixes[start] : 0;
  if (prefix < 0) return;
  int64_t total[kEach] = {};
  for (int64_t row = start; row < stop; ++row) add_row(scan, row, total, warp_sums);
  const int64_t digit = first_beyond(total, wanted, warp_sums);
  bool known = wanted >= 0 && digit < kBins;
  const int64_t extended = (prefix << BITS) | digit;
  if (!LAST && first) {
    if (threadIdx.x == kThreads - 1) scan.sizes[group] = total[kEach - 1];
    if (threadIdx.x == 0) scan.keys[2 * group] = scan.keys[2 * group + 1] = nan_key;
  }
  if (LAST && known) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (static_cast<int64_t>(threadIdx.x) * kEach + i == digit) *at_digit = total[i];
    }
    __syncthreads();
    const int64_t at_most = *at_digit;
    const int64_t following = first_beyond(total, at_most, warp_sums);
    const bool same = wanted + 1 < at_most || wanted + 1 >= scan.sizes[group];
    if (threadIdx.x == 0) {
      scan.keys[2 * group] = extended;
      if (same) scan.keys[2 * group + 1] = extended;
      if (!same && following < kBins) scan.keys[2 * group + 1] = (prefix << BITS) | following;
    }
    known = !same && following == kBins;
  }
  for (int64_t row = start; row < stop; ++row) {
    extend_row<kEach, LAST>(scan, row, digit, extended, known, warp_sums);
  }
}

// keys[group, 1] = the smallest key of a chunk above prefixes[row], if that is smaller.
template <class W>
__global__ void __launch_bounds__(kThreads, kBlocksOnProcessor)
    smallest_above_kernel(const int64_t* chunks, const Compute<W>* scales, const int64_t* prefixes,
                          const int64_t* group_of_row, int64_t* keys) {
  using K = Key<Compute<W>>;
  const Chunk<W> chunk = chunk_of_block<W>(chunks);
  const int64_t prefix = prefixes[chunk.row];
  if (prefix < 0) return;
  const K bound = static_cast<K>(prefix);
  K least = FloatFormat<Compute<W>>::kNanKey;  // no NaN's is smaller
  const auto minimum = [](K a, K b) { return b < a ? b : a; };
  for_each_key(chunk, scales, [&](K key) { least = key > bound ? minimum(least, key) : least; });
  least = reduce_warp(least, minimum);
  if (!is_first_of_warp()) return;
  atomicMin(reinterpret_cast<unsigned long long*>(keys + 2 * group_of_row[chunk.row] + 1), least);
}

template <class T>
__global__ void __launch_bounds__(kThreads) value_kernel(const int64_t* keys, T* out, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) out[i] = value_of_key<T>(static_cast<Key<T>>(keys[i]));
}

}  // namespace feather::cuda
