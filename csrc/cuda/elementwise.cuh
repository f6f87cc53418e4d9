// Kernels of threshold and scale_pruned_grad: one pass that reads and writes each byte once.
//
// `head` is the first element at which all arrays are aligned to 16 bytes. From there on elements are handled in packs,
// with accesses of 16 bytes; those before it and after the last whole pack one at a time. Arrays that are never aligned
// at the same element have head = n.
#pragma once

#include <stdint.h>

#include "cuda/vectorized_access.cuh"
#include "feather/math.h"

namespace feather::cuda {

// Size of the narrowest of some types.
template <class... W>
constexpr int narrowest() {
  int bytes = 8;
  for (const int size : {static_cast<int>(sizeof(W))...}) bytes = size < bytes ? size : bytes;
  return bytes;
}

// Elements of a pack: 16 bytes of the narrowest type.
template <class... W>
constexpr int kPackOf = kAccess / narrowest<W...>();

// Calls f(i) for i = first, first + step, ... below end. Not unrolled: latency is hidden by more threads, which costs
// fewer registers.
template <class F>
__device__ __forceinline__ void for_each(int64_t first, int64_t end, int64_t step, const F& f) {
#pragma unroll 1
  for (int64_t i = first; i < end; i += step) f(i);
}

// The number of this thread in the grid, and the number of threads.
__device__ __forceinline__ int64_t thread_of_grid() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}
__device__ __forceinline__ int64_t threads_of_grid() { return static_cast<int64_t>(gridDim.x) * kThreads; }

// Calls pack(i) for each whole pack of N elements from i on, and one(i) for each other element of [0, n).
template <int N, class One, class Many>
__device__ __forceinline__ void for_each_element(int64_t n, int64_t head, const One& one, const Many& pack) {
  const int64_t thread = thread_of_grid(), threads = threads_of_grid();
  const int64_t tail = n - static_cast<int64_t>(static_cast<uint64_t>(n - head) % N);
  for_each(head + thread * N, tail, threads * N, pack);
  for_each(thread, head + n - tail, threads, [&](int64_t i) { one(i < head ? i : i - head + tail); });
}

// out[i] = f(in[i]...) for i in [0, n).
template <int N, class Out, class F, class... In>
__device__ __forceinline__ void transform(Out* out, int64_t n, int64_t head, const F& f, const In*... in) {
  const auto one = [&](int64_t i) { store(out[i], f(in[i]...)); };
  const auto many = [&](int64_t i, const Pack<In, N>&... values) {
    Pack<Out, N> results;
#pragma unroll
    for (int j = 0; j < N; ++j) store(results.values[j], f(values.values[j]...));
    store_pack<N>(out + i, results);
  };
  for_each_element<N>(n, head, one, [&](int64_t i) { many(i, load_pack<N>(in + i)...); });
}

// out[i] = P(w[i]); t points to one number.
template <class W, class Out, int P>
__global__ void __launch_bounds__(kThreads, kBlocksOnProcessor)
    threshold_kernel(const W* w, const Compute<W>* t, Out* out, int64_t n, int64_t head) {
  using T = Compute<W>;
  const ScaledThreshold<T> threshold = scale_threshold(*t);
  const auto value = [&](W weight) { return apply_threshold<P>(load<T>(weight), threshold); };
  transform<kPackOf<W, Out>>(out, n, head, value, w);
}

// out[i] = g[i], or g[i] grad_scale where w[i] is pruned, in the wider of the compute types of g and w; t and
// grad_scale point to one number each.
template <class G, class W, class Out>
__global__ void __launch_bounds__(kThreads, kBlocksOnProcessor)
    scale_kernel(const G* g, const W* w, const Compute<W>* t, const Compute<W>* grad_scale, Out* out, int64_t n,
                 int64_t head) {
  using T = Compute<W>;
  using Product = decltype(Compute<G>() * T());
  const T bound = *t;
  const Product scale = *grad_scale;
  const auto scaled = [&](G gradient, W weight) {
    const Product value = load<Product>(gradient);
    return is_pruned(load<T>(weight), bound) ? value * scale : value;
  };
  transform<kPackOf<G, W, Out>>(out, n, head, scaled, g, w);
}

}  // namespace feather::cuda
