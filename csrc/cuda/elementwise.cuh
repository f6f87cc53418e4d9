// Kernels of thresholding and gradient scaling: one pass, each byte read and written once.
//
// Elements before `head` and behind the last whole pack are handled one at a time; from `head` on, where all arrays are
// aligned, in accesses of 16 bytes. Arrays that are never aligned at the same element have head = n.
#pragma once

#include "cuda/launch.cuh"

namespace feather::cuda {

template <class... W>
constexpr int narrowest() {
  int bytes = 8;
  for (const int size : {static_cast<int>(sizeof(W))...}) bytes = size < bytes ? size : bytes;
  return bytes;
}

// Elements that a thread handles at once: 16 bytes of the narrowest type.
template <class... W>
constexpr int kPackOf = kAccess / narrowest<W...>();

// Calls f(i) for i = first, first + step, ... below end. Not unrolled: more threads hide latency at less cost.
template <class F>
__device__ __forceinline__ void for_each(int64_t first, int64_t end, int64_t step, const F& f) {
#pragma unroll 1
  for (int64_t i = first; i < end; i += step) f(i);
}

__device__ __forceinline__ int64_t thread_of_grid() {
  return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}
__device__ __forceinline__ int64_t threads_of_grid() { return static_cast<int64_t>(gridDim.x) * kThreads; }

// Calls one(i) for single elements and pack(i) for N elements from i on.
template <int N, class One, class Many>
__device__ __forceinline__ void for_each_element(int64_t n, int64_t head, const One& one, const Many& pack) {
  const int64_t thread = thread_of_grid(), threads = threads_of_grid();
  const int64_t tail = n - static_cast<int64_t>(static_cast<uint64_t>(n - head) % N);
  for_each(head + thread * N, tail, threads * N, pack);
  for_each(thread, head + n - tail, threads, [&](int64_t i) { one(i < head ? i : i - head + tail); });
}

// out[i] = f(in[i]...), by element or by pack.
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

template <class W, class Out, int P>
__global__ void __launch_bounds__(kThreads, kBlocksOnProcessor)
    threshold_kernel(const W* w, const Compute<W>* t, Out* out, int64_t n, int64_t head) {
  using T = Compute<W>;
  const Threshold<T> threshold = make_threshold(*t);
  const auto value = [&](W weight) { return threshold_value<P>(load<T>(weight), threshold); };
  transform<kPackOf<W, Out>>(out, n, head, value, w);
}

// out[i] = g[i], times grad_scale where w[i] is pruned; the product in the wider of the two compute types.
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
