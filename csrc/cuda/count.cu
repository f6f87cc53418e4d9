// The op count_pruned: kernel and launch.
#include "cuda/chunk_table.cuh"
#include "cuda/ops.h"
#include "feather/math.h"

namespace feather::cuda {

// counts[l] += number of pruned elements in one chunk of array l. Bound, the dtype of the thresholds, may be wider than
// the compute type of W; they hold values of that type.
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

void count_pruned(const std::vector<ChunkTable>& tables, const void* thresholds, bool wide, int64_t* counts,
                  void* stream) {
  for (const ChunkTable& table : tables) {
    with_storage_type(table.dtype, [&](auto weight) {
      using W = decltype(weight);
      if (wide) {
        launch("count_pruned", table.count, stream, count_kernel<W, double>, table.entries,
               static_cast<const double*>(thresholds), counts);
      } else {
        launch("count_pruned", table.count, stream, count_kernel<W, float>, table.entries,
               static_cast<const float*>(thresholds), counts);
      }
    });
  }
}

}  // namespace feather::cuda
