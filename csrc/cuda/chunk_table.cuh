// Kernels over lists of arrays: the chunk that a block works on, loops over its weights or keys, and the choice of the
// kernel for the dtype of a table.
#pragma once

#include <stdint.h>

#include "cuda/block_reduce.cuh"
#include "cuda/ops.h"
#include "cuda/vectorized_access.cuh"
#include "feather/check.h"
#include "feather/math.h"

namespace feather::cuda {

// An entry of a ChunkTable. Its columns are the address, the number of elements, whether the address is a multiple of
// 16 (for the Triton kernels), the row, and the array.
template <class W>
struct Chunk {
  const W* data;
  int elements;
  int64_t row;    // in which the keys of the array are counted
  int64_t array;  // index of the array in the list
};

// The chunk of this block.
template <class W>
__device__ __forceinline__ Chunk<W> chunk_of_block(const int64_t* chunks) {
  const int64_t* entry = chunks + static_cast<int64_t>(blockIdx.x) * kChunkColumns;
  return Chunk<W>{reinterpret_cast<const W*>(entry[0]), static_cast<int>(entry[1]), entry[3], entry[4]};
}

// Calls f(w) for each element of the chunk, in the compute type and on one thread of the block. Reads 16 bytes at a
// time, but for the elements before the first multiple of 16 and after the last whole pack.
template <class W, class F>
__device__ __forceinline__ void for_each_weight(const Chunk<W>& chunk, const F& f) {
  using T = Compute<W>;
  constexpr int kPack = kAccess / static_cast<int>(sizeof(W));
  const int thread = static_cast<int>(threadIdx.x);
  const auto past = static_cast<unsigned>(reinterpret_cast<uintptr_t>(chunk.data) % kAccess);
  const int misaligned = static_cast<int>((kAccess - past) % kAccess / sizeof(W));
  const int head = misaligned < chunk.elements ? misaligned : chunk.elements;
  const int tail = chunk.elements - static_cast<int>(static_cast<unsigned>(chunk.elements - head) % kPack);
  if (thread < head) f(load<T>(chunk.data[thread]));
#pragma unroll 2
  for (int i = head + thread * kPack; i < tail; i += kThreads * kPack) {
    const Pack<W, kPack> pack = load_pack<kPack>(chunk.data + i);
#pragma unroll
    for (int j = 0; j < kPack; ++j) f(load<T>(pack.values[j]));
  }
  if (tail + thread < chunk.elements) f(load<T>(chunk.data[tail + thread]));
}

// Calls f(key) for the key of each score of the chunk: scale abs(w), or abs(w) if scales is null. The key of a NaN is
// not clamped: it is kNanKey or more.
template <class W, class F>
__device__ __forceinline__ void for_each_key(const Chunk<W>& chunk, const Compute<W>* scales, const F& f) {
  using T = Compute<W>;
  const T scale = scales == nullptr ? T(1) : scales[chunk.array];  // times 1 is exact
  for_each_weight(chunk, [&](T w) { f(magnitude_key(scale * w)); });
}

// Host: calls f with a value of the storage type of a dtype; fails for a code that is no dtype's.
template <class F>
void with_storage_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(Half());
    case DType::kBFloat16:
      return f(BFloat16());
    case DType::kFloat32:
      return f(float());
    case DType::kFloat64:
      return f(double());
  }
  fail("dtype code of a chunk table must be in [0, ", kDTypes, "), got ", static_cast<int>(dtype));
}

}  // namespace feather::cuda
