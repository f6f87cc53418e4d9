// Thresholding, gradient scaling and counting, one element at a time: loops for the compiler to vectorise.
//
// Compiled once for each instruction set, with FEATHER_ISA naming its namespace. It includes no C++ library header:
// their inline functions, compiled here with wider instructions, could be the copies that the linker keeps for all.
#include "cpu/kernels.h"
#include "feather/math.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace feather {
namespace FEATHER_ISA {
namespace {

// Iterations are independent even where out is the input itself.
#define FEATHER_SIMD _Pragma("omp simd")

constexpr int64_t kStride = 512;  // elements between prefetches

// Asks for the kStride elements from `next` on, to be read or written. The loops with much arithmetic hold too few
// elements in flight to hide the way to memory where the machine's own prefetcher is weak (seen on a virtual machine:
// 2.6 ns instead of 1.1 for an element).
template <int Write, class W>
FEATHER_HOST_DEVICE void prefetch(const W* data, int64_t next, int64_t n) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(W));
  if (n - next < kStride) return;
  for (int64_t i = 0; i < kStride; i += kLine) __builtin_prefetch(data + next + i, Write);
}

template <class W, class Out>
void convert(const W* w, Out* out, int64_t n) {
  FEATHER_SIMD
  for (int64_t i = 0; i < n; ++i) store(out[i], load<Compute<W>>(w[i]));
}

// Conversion of floats none of which is denormal.
template <class Out>
void convert_normal(const float* values, Out* out, int64_t n) {
  convert(values, out, n);
}

#if defined(__AVX512BF16__)
template <>
void convert_normal(const float* values, BFloat16* out, int64_t n) {
  constexpr int64_t kLanes = 16;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {  // the instruction takes denormals for zero
    const auto both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + i + kLanes), _mm512_loadu_ps(values + i));
    memcpy(out + i, &both, sizeof(both));
  }
  convert(values + i, out + i, n - i);
}
#endif

// P(w) of up to kStride weights. Results of 16 bits are computed as floats first: converted in the same loop, they cost
// a quarter more, since the vectoriser must then handle twice as many weights at once as a register holds.
template <int P, bool kScaled, class W, class Out>
void threshold_block(const W* w, Out* out, int64_t n, const Threshold<Compute<W>>& threshold) {
  using T = Compute<W>;
  if constexpr (sizeof(T) == sizeof(float) && sizeof(Out) == sizeof(uint16_t)) {
    alignas(64) float values[kStride];
    FEATHER_SIMD
    for (int64_t i = 0; i < n; ++i) values[i] = threshold_positive<P, kScaled>(load<T>(w[i]), threshold);
    constexpr bool kNormal = !kScaled;  // T >= 2^-20 and P = 2 or 3: kept weights are far enough from T
    if (kNormal) return convert_normal(values, out, n);
    convert(values, out, n);
  } else {
    FEATHER_SIMD
    for (int64_t i = 0; i < n; ++i) store(out[i], threshold_positive<P, kScaled>(load<T>(w[i]), threshold));
  }
}

template <int P, bool kScaled, class W, class Out>
void threshold_loop(const W* w, Out* out, int64_t n, const Threshold<Compute<W>>& threshold) {
  for (int64_t start = 0; start < n; start += kStride) {
    const int64_t end = n - start < kStride ? n : start + kStride;
    prefetch<0>(w, end, n);
    prefetch<1>(out, end, n);
    threshold_block<P, kScaled>(w + start, out + start, end - start, threshold);
  }
}

template <class W, class Out, int P>
void threshold(const void* w_data, void* out_data, int64_t n, double t_wide) {
  using T = Compute<W>;
  const W* w = static_cast<const W*>(w_data);
  Out* out = static_cast<Out*>(out_data);
  const T t = static_cast<T>(t_wide);
  if (t <= 0) return convert(w, out, n);
  if (t != t) {
    for (int64_t i = 0; i < n; ++i) store(out[i], t);
    return;
  }
  const Threshold<T> constants = make_threshold(t);
  if constexpr (sizeof(T) == sizeof(float) && (P == 2 || P == 3)) {
    if (!needs_scaling(t)) return threshold_loop<P, false>(w, out, n, constants);
  }
  threshold_loop<P, true>(w, out, n, constants);
}

template <class G, class W, class Out>
void scale_pruned_grad(const void* g_data, const void* w_data, void* out_data, int64_t n, double t_wide, double scale) {
  using T = Compute<W>;
  using Product = decltype(Compute<G>() * T());
  const G* g = static_cast<const G*>(g_data);
  const W* w = static_cast<const W*>(w_data);
  Out* out = static_cast<Out*>(out_data);
  const T t = static_cast<T>(t_wide);
  const Product grad_scale = static_cast<Product>(static_cast<T>(scale));
  FEATHER_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const Product gradient = load<Product>(g[i]);
    const Product scaled = gradient * grad_scale;
    store(out[i], is_pruned(load<T>(w[i]), t) ? scaled : gradient);
  }
}

template <class W>
int64_t count_pruned(const void* w_data, int64_t n, double t_wide) {
  constexpr int64_t kBlock = 1 << 20;  // counts of a block fit in 32 bits, whose lanes are many
  using T = Compute<W>;
  const W* w = static_cast<const W*>(w_data);
  const T t = static_cast<T>(t_wide);
  int64_t total = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = n - start < kBlock ? n : start + kBlock;
    int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (int64_t i = start; i < end; ++i) count += is_pruned(load<T>(w[i]), t) ? 1 : 0;
    total += count;
  }
  return total;
}

}  // namespace

void fill_elementwise(Kernels& kernels) {
  kernels.fused = kFused;
  for_each_type([&](auto weight, int w) {
    using W = decltype(weight);
    kernels.count_pruned[w] = count_pruned<W>;
    for_each_type([&](auto result, int out) {
      using Out = decltype(result);
      kernels.threshold[w][out][kInfinitePower] = threshold<W, Out, kInfinitePower>;
      kernels.threshold[w][out][1] = threshold<W, Out, 1>;
      kernels.threshold[w][out][2] = threshold<W, Out, 2>;
      kernels.threshold[w][out][3] = threshold<W, Out, 3>;
      for_each_type([&](auto gradient, int g) {
        kernels.scale_pruned_grad[g][w][out] = scale_pruned_grad<decltype(gradient), W, Out>;
      });
    });
  });
}

}  // namespace FEATHER_ISA
}  // namespace feather
