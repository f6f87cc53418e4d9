// Kernels of selection with a hint, the result of an earlier call: a single read of the weights in the steady state of
// training.
//
// One pass counts the keys in a bracket of consecutive keys around the hint, each key by itself, and the keys below it.
// If the wanted ranks fall inside, the counts give the order statistics exactly, and the radix passes that follow exit
// at once. A bracket that misses costs time and never changes the result. Not for float64, whose keys are too fine.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "cuda/block_reduce.cuh"
#include "cuda/chunk_table.cuh"
#include "feather/math.h"

namespace feather::cuda {

constexpr int kBracketRow = 2 * kThreads;               // keys whose counts are summed up, for a search in two steps
constexpr int kWidestBracket = kBracketRow * kThreads;  // 2^17 keys: 0.4 % to 0.8 % of the hint on either side
constexpr int64_t kNarrowestBracket = 1 << 10;
constexpr int64_t kElementsPerKey = 16;  // at least, for each key of a bracket wider than the narrowest
constexpr int64_t kBracketBudget = 4 * int64_t{kWidestBracket};  // keys of all groups: 4 MB of counts

// Host: the number of keys in each group's bracket, a power of two, given the elements of all groups together. 0 if
// there are too many groups for brackets to pay off.
inline int64_t bracket_keys(int64_t groups, int64_t elements) {
  if (groups <= 0 || groups * kNarrowestBracket > kBracketBudget) return 0;
  const int64_t affordable = std::max(elements / kElementsPerKey / groups, kNarrowestBracket);
  int64_t keys = kWidestBracket;
  while (keys > affordable || keys * groups > kBracketBudget) keys /= 2;
  return keys;
}

// The first key of the bracket around a hint, or -1 for a NaN. No bracket holds the key of NaN.
__device__ __forceinline__ int bracket_start(float hint, int bins) {
  constexpr int kNan = static_cast<int>(FloatFormat<float>::kNanKey);
  const int key = static_cast<int>(clamp_nan<float>(magnitude_key(hint)));
  if (key == kNan) return -1;
  const int start = key - (bins >> 1);
  return start < 0 ? 0 : start < kNan - bins ? start : kNan - bins;
}

// Adds the keys of one chunk to below (groups), if they lie below the bracket, or to counts (groups, bins). hint is
// (groups, 2). Keys equal to the hint are summed by warps first, because ties may be many and atomics on one address
// are slow.
template <class W>
__global__ void __launch_bounds__(kThreads, kBlocksOnProcessor)
    bracket_kernel(const int64_t* chunks, const float* scales, const float* hint, int64_t* below, int64_t* counts,
                   int bins) {
  const Chunk<W> chunk = chunk_of_block<W>(chunks);
  const float value = hint[2 * chunk.row];
  const int start = bracket_start(value, bins);
  if (start < 0) return;
  int64_t* row = counts + chunk.row * bins;
  const int center = static_cast<int>(magnitude_key(value)) - start;
  unsigned smaller = 0, ties = 0;
  for_each_key(chunk, scales, [&](uint32_t key) {
    const int place = static_cast<int>(key) - start;  // beyond the bracket for a NaN
    smaller += place < 0;
    ties += place == center;
    if (static_cast<unsigned>(place) < static_cast<unsigned>(bins) && place != center) add_to(row + place, 1);
  });
  add_warp(below + chunk.row, smaller);
  add_warp(row + center, ties);
}

// sums[block] = sum of that block's kBracketRow counts.
__global__ void __launch_bounds__(kThreads) bracket_sum_kernel(const int64_t* counts, int64_t* sums) {
  FEATHER_SHARED(int64_t, warp_sums, kWarps);
  const int64_t* row = counts + static_cast<int64_t>(blockIdx.x) * kBracketRow;
  const int64_t sum = block_total(row[threadIdx.x] + row[threadIdx.x + kThreads], warp_sums);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// The arguments of bracket_end_kernel. The first three are members of Selection.
struct BracketEndArguments {
  const int64_t* rank;
  const int64_t* elements;
  const float* hint;
  const int64_t* below;   // (groups): as bracket_kernel left them
  const int64_t* counts;  // (groups, bins)
  const int64_t* sums;    // (groups, bins / kBracketRow)
  int bins;
  int64_t* prefixes;  // (groups): set to -1 where the result was found
  int64_t* keys;      // (groups, 2): the result
};

// kBracketRow cumulative counts, two on each thread of a block: how many keys of the group are at most that key.
struct BracketRow {
  int64_t first, second;

  // before: how many keys of the group lie below the row.

  __device__ __forceinline__ BracketRow(const int64_t* counts, int64_t before, int64_t* warp_sums) {
    const int64_t* mine = counts + 2 * threadIdx.x;
    first = before + mine[0] + block_sum_before(mine[0] + mine[1], warp_sums);
    second = first + mine[1];
  }

  // The first key of the row whose cumulative count exceeds a bound, or kBracketRow.
  __device__ __forceinline__ int64_t first_beyond(int64_t bound, int64_t* warp_sums) const {
    return block_total((first <= bound) + (second <= bound), warp_sums);
  }
};

// Searches a group's counts: if v[rank] and the next are in the bracket, writes their keys and marks the group as
// finished. One block for each group.
__global__ void __launch_bounds__(kThreads) bracket_end_kernel(BracketEndArguments end) {
  FEATHER_SHARED(int64_t, warp_sums, kWarps);
  FEATHER_SHARED(int64_t, shared, 2);
  const int64_t group = blockIdx.x, wanted = end.rank[group], below = end.below[group];
  const int start = bracket_start(end.hint[2 * group], end.bins);
  if (start < 0 || wanted < below) return;
  const int rows = static_cast<int>(static_cast<unsigned>(end.bins) / kBracketRow);
  const int64_t* counts = end.counts + group * end.bins;
  const bool has_sum = static_cast<int>(threadIdx.x) < rows;
  const int64_t sum = has_sum ? end.sums[group * rows + threadIdx.x] : 0;
  const int64_t row_begin = below + block_sum_before(sum, warp_sums), row_end = row_begin + sum;
  const int64_t row = block_total(has_sum && row_end <= wanted, warp_sums);
  if (row == rows) return;
  if (threadIdx.x == row) shared[0] = row_begin;
  __syncthreads();
  const BracketRow places(counts + row * kBracketRow, shared[0], warp_sums);
  const int64_t place = places.first_beyond(wanted, warp_sums);
  if (static_cast<int64_t>(threadIdx.x) == place / 2) shared[1] = place % 2 == 0 ? places.first : places.second;
  __syncthreads();
  const int64_t at_most = shared[1];
  int64_t next = places.first_beyond(at_most, warp_sums);
  int64_t next_row = row;
  if (next == kBracketRow) {  // then it is in the first later row that holds a key
    next_row = block_total(has_sum && row_end <= at_most, warp_sums);
    next = next_row < rows ? BracketRow(counts + next_row * kBracketRow, 0, warp_sums).first_beyond(0, warp_sums) : 0;
  }
  const bool same = wanted + 1 < at_most || wanted + 1 >= end.elements[group];
  if (threadIdx.x > 0 || (!same && next_row == rows)) return;
  const int64_t key = start + row * kBracketRow + place;
  end.keys[2 * group] = key;
  end.keys[2 * group + 1] = same ? key : start + next_row * kBracketRow + next;
  end.prefixes[group] = -1;
}

}  // namespace feather::cuda
