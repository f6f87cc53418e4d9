// Kernels of radix selection, most significant digit first. Each pass counts the digits of the keys that start with the
// prefix found so far, and then a scan of the counts extends the prefix by a digit.
//
// A row with a negative prefix is finished: blocks that work on it exit at once. Counts are integers, so that results
// do not depend on the order of threads. Counts, keys and prefixes are int64.
#pragma once

#include <stdint.h>

#include "cuda/block_reduce.cuh"
#include "cuda/chunk_table.cuh"
#include "feather/math.h"

namespace feather::cuda {

constexpr int kDigitBits = 11;  // the most of a pass: 2,048 bins fit into shared memory

// Calls f(bin) for the bins of this thread, out of 2^kDigitBits that are divided among the threads of a block.
template <class F>
__device__ __forceinline__ void for_each_bin(const F& f) {
  static_assert((1 << kDigitBits) % kThreads == 0, "every bin has a thread");
#pragma unroll
  for (int i = 0; i < (1 << kDigitBits) / kThreads; ++i) f(static_cast<int>(threadIdx.x) + i * kThreads);
}

// counts[row][d] += number of keys in one chunk whose bits above shift + bits equal prefixes[row] and whose next `bits`
// bits are d; counts is (rows, 2^bits). Digits of more than kDigitBits are counted in parts, and each part reads the
// chunk again.
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
    for_each_bin([&](int bin) {  // the bins that this thread zeroes next: no barrier is needed
      if (found[bin] > 0) add_to(row + bin, found[bin]);
    });
  }
}

// The arguments of scan_kernel. The first four are members of Selection.
struct ScanArguments {
  const int64_t* rank;
  const int64_t* row_starts;
  const int64_t* array_of_row;
  const int64_t* caps;  // or null
  int64_t* counts;      // (rows, 2^bits): read, then zeroed for the next pass
  int64_t* prefixes;    // (rows): extended by the digit, or -1 where the row is finished
  int64_t* below;       // (rows): number of keys below the prefix; updated with it
  int64_t* sizes;       // (groups): number of keys that take part; set by the first pass
  int64_t* keys;        // (groups, 2): the result; set by the last pass
};

__device__ __forceinline__ int64_t cap_of(const ScanArguments& scan, int64_t row) {
  return scan.caps[scan.array_of_row[row]];
}

// total[i] += min(cap, number of the row's keys up to and including this thread's i-th bin).
template <int kBinsOfThread>
__device__ __forceinline__ void add_row(const ScanArguments& scan, int64_t row, int64_t (&total)[kBinsOfThread],
                                        int64_t* warp_sums) {
  const int64_t* counts = scan.counts + row * (kBinsOfThread * kThreads) + threadIdx.x * kBinsOfThread;
  int64_t found[kBinsOfThread], sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsOfThread; ++i) sum += found[i] = counts[i];
  int64_t through = scan.below[row] + block_sum_before(sum, warp_sums);
  const int64_t cap = scan.caps == nullptr ? INT64_MAX : cap_of(scan, row);
#pragma unroll
  for (int i = 0; i < kBinsOfThread; ++i) {
    through += found[i];
    total[i] += through < cap ? through : cap;
  }
}

// The first bin whose total exceeds a bound, which is how many do not, since the totals ascend.
template <int kBinsOfThread>
__device__ __forceinline__ int64_t first_beyond(const int64_t (&total)[kBinsOfThread], int64_t bound,
                                                int64_t* warp_sums) {
  int64_t before = 0;
#pragma unroll
  for (int i = 0; i < kBinsOfThread; ++i) before += total[i] <= bound;
  return block_total(before, warp_sums);
}

// Updates prefix and number of smaller keys of a row for a new digit, and zeroes the row's counts. `open` says whether
// later kernels have to look at the row again.
template <int kBinsOfThread, bool kLast>
__device__ __forceinline__ void extend_row(const ScanArguments& scan, int64_t row, int64_t digit, int64_t extended,
                                           bool open, int64_t* warp_sums) {
  int64_t* counts = scan.counts + row * (kBinsOfThread * kThreads) + threadIdx.x * kBinsOfThread;
  int64_t smaller = 0, equal = 0;
#pragma unroll
  for (int i = 0; i < kBinsOfThread; ++i) {
    const int64_t bin = static_cast<int64_t>(threadIdx.x) * kBinsOfThread + i;
    smaller += bin < digit ? counts[i] : 0;
    if (kLast) equal += bin == digit ? counts[i] : 0;
    counts[i] = 0;
  }
  smaller = block_total(smaller, warp_sums);
  if (kLast) equal = block_total(equal, warp_sums);
  if (threadIdx.x > 0) return;
  const int64_t before = scan.below[row] + smaller;
  if (kLast && scan.caps != nullptr) open = open && before + equal < cap_of(scan, row);
  scan.below[row] = before;
  scan.prefixes[row] = open ? extended : -1;
}

// Finds the next kBits bits of the key of a group's rank from the counts of its rows; one block for each group.
//
// The last pass (kLast) writes the result to keys. If the next key has another prefix, nan_key takes its place,
// prefixes hold the whole key of the rank, and smallest_above_kernel finds the next one.
template <int kBits, bool kLast>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    scan_kernel(ScanArguments scan, bool first, int64_t nan_key) {
  constexpr int kBins = 1 << kBits, kBinsOfThread = kBins / kThreads;
  FEATHER_SHARED(int64_t, warp_sums, kWarps);
  FEATHER_SHARED(int64_t, at_digit, 1);
  const int64_t group = blockIdx.x;
  const int64_t wanted = scan.rank[group], start = scan.row_starts[group], stop = scan.row_starts[group + 1];
  const int64_t prefix = start < stop ? scan.prefixes[start] : 0;
  if (prefix < 0) return;
  int64_t total[kBinsOfThread] = {};
  for (int64_t row = start; row < stop; ++row) add_row(scan, row, total, warp_sums);
  const int64_t digit = first_beyond(total, wanted, warp_sums);
  bool known = wanted >= 0 && digit < kBins;
  const int64_t extended = (prefix << kBits) | digit;
  if (!kLast && first) {
    if (threadIdx.x == kThreads - 1) scan.sizes[group] = total[kBinsOfThread - 1];
    if (threadIdx.x == 0) scan.keys[2 * group] = scan.keys[2 * group + 1] = nan_key;
  }
  if (kLast && known) {
#pragma unroll
    for (int i = 0; i < kBinsOfThread; ++i) {
      if (static_cast<int64_t>(threadIdx.x) * kBinsOfThread + i == digit) *at_digit = total[i];
    }
    __syncthreads();
    const int64_t at_most = *at_digit;
    const int64_t following = first_beyond(total, at_most, warp_sums);
    const bool same = wanted + 1 < at_most || wanted + 1 >= scan.sizes[group];
    if (threadIdx.x == 0) {
      scan.keys[2 * group] = extended;
      if (same) scan.keys[2 * group + 1] = extended;
      if (!same && following < kBins) scan.keys[2 * group + 1] = (prefix << kBits) | following;
    }
    known = !same && following == kBins;
  }
  for (int64_t row = start; row < stop; ++row) {
    extend_row<kBinsOfThread, kLast>(scan, row, digit, extended, known, warp_sums);
  }
}

// keys[group][1] = min(keys[group][1], smallest key in one chunk above prefixes[row]).
template <class W>
__global__ void __launch_bounds__(kThreads, kBlocksOnProcessor)
    smallest_above_kernel(const int64_t* chunks, const Compute<W>* scales, const int64_t* prefixes,
                          const int64_t* group_of_row, int64_t* keys) {
  using K = Key<Compute<W>>;
  const Chunk<W> chunk = chunk_of_block<W>(chunks);
  const int64_t prefix = prefixes[chunk.row];
  if (prefix < 0) return;
  const K bound = static_cast<K>(prefix);
  K least = FloatFormat<Compute<W>>::kNanKey;  // keys of NaNs are not smaller
  const auto minimum = [](K a, K b) { return b < a ? b : a; };
  for_each_key(chunk, scales, [&](K key) { least = key > bound ? minimum(least, key) : least; });
  least = reduce_warp(least, minimum);
  if (!is_first_of_warp()) return;
  atomicMin(reinterpret_cast<unsigned long long*>(keys + 2 * group_of_row[chunk.row] + 1), least);
}

// out[i] = the number with the key keys[i].
template <class T>
__global__ void __launch_bounds__(kThreads) value_kernel(const int64_t* keys, T* out, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) out[i] = value_of_key<T>(static_cast<Key<T>>(keys[i]));
}

}  // namespace feather::cuda
