// Kernels of thresholding and gradient scaling: one pass, each byte read and written once.
//
// Elements before `head` and behind the last whole pack are handled one at a time; from `head` on, where all arrays are
// aligned, in accesses of 16 bytes. Arrays that are never aligned at the same element have head = n.
#pragma once

#include "cuda/device.cuh"

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

// Calls one(i) for every i < n.
template <class One>
__device__ __forceinline__ void for_each_element(int64_t n, const One& one) {
  for_each(thread_of_grid(), n, threads_of_grid(), one);
}

// Calls one(i) for single elements and pack(i) for N elements from i on.
template <int N, class One, class Many>
__device__ __forceinline__ void for_each_element(int64_t n, int64_t head, const One& one, const Many& pack) {
  const int64_t thread = thread_of_grid(), threads = threads_of_grid();
  const int64_t tail = n - static_cast<int64_t>(static_cast<uint64_t>(n - head) % N);
  for_each(head + thread * N, tail, threads * N, pack);
  for_each(thread, head + n - tail, threads, [&](int64_t i) { one(i < head ? i : i - head + tail); });
}

// out[i] = f(in[i]) and out[i] = f(in[i], other[i]), by element or by pack.
template <int N, class In, class Out, class F>
__device__ __forceinline__ void transform(const In* in, Out* out, int64_t n, int64_t head, const F& f) {
  for_each_element<N>(
      n, head, [&](int64_t i) { store(out[i], f(in[i])); },
      [&](int64_t i) {
        const Pack<In, N> values = load_pack<N>(in + i);
        Pack<Out, N> results;
#pragma unroll
        for (int j = 0; j < N; ++j) store(results.values[j], f(values.values[j]));
        store_pack<N>(out + i, results);
      });
}

template <int N, class In, class Other, class Out, class F>
__device__ __forceinline__ void transform(const In* in, const Other* other, Out* out, int64_t n, int64_t head,
                                          const F& f) {
  for_each_element<N>(
      n, head, [&](int64_t i) { store(out[i], f(in[i], other[i])); },
      [&](int64_t i) {
        const Pack<In, N> values = load_pack<N>(in + i);
        const Pack<Other, N> others = load_pack<N>(other + i);
        Pack<Out, N> results;
#pragma unroll
        for (int j = 0; j < N; ++j) store(results.values[j], f(values.values[j], others.values[j]));
        store_pack<N>(out + i, results);
      });
}

template <class W, class Out, int P>
__global__ void __launch_bounds__(kThreads, kBlocksOnProcessor)
    threshold_kernel(const W* w, const Compute<W>* t, Out* out, int64_t n, int64_t head) {
  using T = Compute<W>;
  const Threshold<T> threshold = make_threshold(*t);
  transform<kPackOf<W, Out>>(w, out, n, head, [&](W weight) { return threshold_value<P>(load<T>(weight), threshold); });
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
  transform<kPackOf<G, W, Out>>(g, w, out, n, head, [&](G gradient, W weight) {
    const Product value = load<Product>(gradient);
    return is_pruned(load<T>(weight), bound) ? value * scale : value;
  });
}

// Pairs of dtypes that no training step meets often take the dtypes as numbers.
template <class T>
__device__ __forceinline__ T load_any(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::kFloat16) return load<T>(static_cast<const Half*>(data)[i]);
  if (dtype == DType::kBFloat16) return load<T>(static_cast<const BFloat16*>(data)[i]);
  if constexpr (sizeof(T) == sizeof(double)) {  // a float holds no double
    if (dtype == DType::kFloat64) return static_cast<const double*>(data)[i];
  }
  return static_cast<const float*>(data)[i];
}

// A weight in its compute type, which is double for float64 storage alone.
template <class T>
__device__ __forceinline__ T load_weight(const void* data, int64_t i, DType dtype) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return static_cast<const double*>(data)[i];
  } else {
    return load_any<T>(data, i, dtype);
  }
}

template <class T>
__device__ __forceinline__ void store_any(void* data, int64_t i, DType dtype, T value) {
  switch (dtype) {
    case DType::kFloat16:
      return store(static_cast<Half*>(data)[i], value);
    case DType::kBFloat16:
      return store(static_cast<BFloat16*>(data)[i], value);
    case DType::kFloat32:
      return store(static_cast<float*>(data)[i], value);
    default:
      static_cast<double*>(data)[i] = value;
  }
}

// T: compute type of w. P: of threshold_value, as a number.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksOnProcessor)
    any_threshold_kernel(const void* w, DType w_dtype, const T* t, int power, void* out, DType out_dtype, int64_t n) {
  const Threshold<T> threshold = make_threshold(*t);
  const auto one = [&](int64_t i) {
    const T weight = load_weight<T>(w, i, w_dtype);
    T y;
    if (power == 3) {
      y = threshold_value<3>(weight, threshold);
    } else if (power == 2) {
      y = threshold_value<2>(weight, threshold);
    } else if (power == 1) {
      y = threshold_value<1>(weight, threshold);
    } else {
      y = threshold_value<kInfinitePower>(weight, threshold);
    }
    store_any(out, i, out_dtype, y);
  };
  for_each_element(n, one);
}

// T: compute type of w. Product: the wider of it and g's; wider than T only where g is double.
template <class Product, class T>
__global__ void __launch_bounds__(kThreads, kBlocksOnProcessor)
    any_scale_kernel(const void* g, DType g_dtype, const void* w, DType w_dtype, const T* t, const T* grad_scale,
                     void* out, DType out_dtype, int64_t n) {
  const T bound = *t;
  const Product scale = *grad_scale;
  const auto one = [&](int64_t i) {
    Product value;
    if constexpr (sizeof(Product) > sizeof(T)) {
      value = static_cast<const double*>(g)[i];
    } else {
      value = load_any<Product>(g, i, g_dtype);
    }
    store_any(out, i, out_dtype, is_pruned(load_weight<T>(w, i, w_dtype), bound) ? value * scale : value);
  };
  for_each_element(n, one);
}

}  // namespace feather::cuda
