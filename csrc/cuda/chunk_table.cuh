// How a block reads its chunk of a list of arrays: in accesses of 16 bytes where the address allows.
#pragma once

#include "cuda/block_reduce.cuh"
#include "cuda/ops.h"

namespace feather::cuda {

// One row of a table of chunks: address, elements, whether 16 divides the address (of no use here), row, array.
template <class W>
struct Chunk {
  const W* data;
  int elements;
  int64_t row;    // of the counts
  int64_t array;  // its number in the list
};

template <class W>
__device__ __forceinline__ Chunk<W> chunk_of_block(const int64_t* chunks) {
  const int64_t* entry = chunks + static_cast<int64_t>(blockIdx.x) * kChunkColumns;
  return Chunk<W>{reinterpret_cast<const W*>(entry[0]), static_cast<int>(entry[1]), entry[3], entry[4]};
}

// Calls f(w) for every element of the chunk, in the compute type, on one thread of the block.
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

// Calls f(key) for the key of every score of the chunk: scale * abs(w), where scales is null abs(w). A NaN's is its
// bits, kNanKey or more.
template <class W, class F>
__device__ __forceinline__ void for_each_key(const Chunk<W>& chunk, const Compute<W>* scales, const F& f) {
  using T = Compute<W>;
  const T scale = scales == nullptr ? T(1) : scales[chunk.array];  // times 1 is exact
  for_each_weight(chunk, [&](T w) { f(magnitude_key(scale * w)); });
}

}  // namespace feather::cuda
