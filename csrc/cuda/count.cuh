// Counts of pruned elements.
#pragma once

#include "cuda/chunk_table.cuh"

namespace feather::cuda {

// counts[l] += pruned elements of a chunk of array l; Bound: dtype of thresholds, which hold values of the compute
// type.
template <class W, class Bound>
__global__ void __launch_bounds__(kThreads, kBlocksOnProcessor)
    count_kernel(const int64_t* chunks, const Bound* thresholds, int64_t* counts) {
  using T = Compute<W>;
  const Chunk<W> chunk = chunk_of_block<W>(chunks);
  const T t = static_cast<T>(thresholds[chunk.array]);
  unsigned pruned = 0;
  for_each_weight(chunk, [&](T w) { pruned += is_pruned(w, t); });
  add_warp(counts + chunk.array, pruned);
}

}  // namespace feather::cuda
