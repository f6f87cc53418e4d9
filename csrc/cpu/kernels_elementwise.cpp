// Kernels of threshold, scale_pruned_grad and count_pruned: loops that the compiler vectorises.
//
// Compiled once for each instruction set, in a namespace that FEATHER_ISA names. No header of the C++ library may be
// included here: the linker keeps one copy of each inline function, and could keep the one with wide instructions.
#include "cpu/kernels.h"
#include "feather/math.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace feather {
namespace FEATHER_ISA {
namespace {

// Tells the compiler that iterations are independent, as they are even where out is the input itself.
#define FEATHER_SIMD _Pragma("omp simd")

constexpr int64_t kStride = 512;  // elements between prefetches

// Prefetches the kStride elements from `next` on, to be read or written. Loops with much arithmetic keep too few
// elements in flight to hide memory latency where the machine's own prefetcher is weak: 2.6 ns an element instead
// of 1.1 on a virtual machine.
template <int kWrite, class W>
FEATHER_HOST_DEVICE void prefetch(const W* data, int64_t next, int64_t n) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(W));
  if (n - next < kStride) return;
  for (int64_t i = 0; i < kStride; i += kLine) __builtin_prefetch(data + next + i, kWrite);
}

template <class W, class Out>
void convert(const W* w, Out* out, int64_t n) {
  FEATHER_SIMD
  for (int64_t i = 0; i < n; ++i) store(out[i], load<Compute<W>>(w[i]));
}

// Converts floats none of which is denormal.
template <class Out>
void convert_normal(const float* values, Out* out, int64_t n) {
  convert(values, out, n);
}

#if defined(__AVX512BF16__)
template <>
void convert_normal(const float* values, BFloat16* out, int64_t n) {
  constexpr int64_t kLanes = 16;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {  // the instruction reads denormals as zero
    const auto both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + i + kLanes), _mm512_loadu_ps(values + i));
    memcpy(out + i, &both, sizeof(both));
  }
  convert(values + i, out + i, n - i);
}
#endif

// P(w) of up to kStride weights. 16-bit results are first computed as floats. Converting them in the same loop takes a
// quarter longer, because the vectoriser must then handle twice as many weights as fit in a register.
template <int P, bool kScaled, class W, class Out>
void threshold_block(const W* w, Out* out, int64_t n, const ScaledThreshold<Compute<W>>& threshold) {
  using T = Compute<W>;
  if constexpr (sizeof(T) == sizeof(float) && sizeof(Out) == sizeof(uint16_t)) {
    alignas(64) float values[kStride];
    FEATHER_SIMD
    for (int64_t i = 0; i < n; ++i) values[i] = apply_positive_threshold<P, kScaled>(load<T>(w[i]), threshold);
    constexpr bool kNormal = !kScaled;  // then T >= 2^-20 and P is 2 or 3: no P(w) is denormal
    if (kNormal) return convert_normal(values, out, n);
    convert(values, out, n);
  } else {
    FEATHER_SIMD
    for (int64_t i = 0; i < n; ++i) store(out[i], apply_positive_threshold<P, kScaled>(load<T>(w[i]), threshold));
  }
}

template <int P, bool kScaled, class W, class Out>
void threshold_loop(const W* w, Out* out, int64_t n, const ScaledThreshold<Compute<W>>& threshold) {
  for (int64_t start = 0; start < n; start += kStride) {
    const int64_t end = n - start < kStride ? n : start + kStride;
    prefetch<0>(w, end, n);
    prefetch<1>(out, end, n);
    threshold_block<P, kScaled>(w + start, out + start, end - start, threshold);
  }
}

template <class W, class Out, int P>
void threshold_kernel(const void* w_data, void* out_data, int64_t n, double t_wide) {
  using T = Compute<W>;
  const W* w = static_cast<const W*>(w_data);
  Out* out = static_cast<Out*>(out_data);
  const T t = static_cast<T>(t_wide);
  if (t <= 0) return convert(w, out, n);
  if (t != t) {
    for (int64_t i = 0; i < n; ++i) store(out[i], t);
    return;
  }
  const ScaledThreshold<T> scaled = scale_threshold(t);
  if constexpr (sizeof(T) == sizeof(float) && (P == 2 || P == 3)) {
    if (!needs_scaling(t)) return threshold_loop<P, false>(w, out, n, scaled);
  }
  threshold_loop<P, true>(w, out, n, scaled);
}

template <class G, class W, class Out>
void scale_kernel(const void* g_data, const void* w_data, void* out_data, int64_t n, double t_wide, double scale) {
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
int64_t count_kernel(const void* w_data, int64_t n, double t_wide) {
  constexpr int64_t kBlock = 1 << 20;  // the count of a block fits in 32 bits, of which a register holds many
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
    kernels.count_pruned[w] = count_kernel<W>;
    for_each_type([&](auto result, int out) {
      using Out = decltype(result);
      kernels.threshold[w][out][kInfinitePower] = threshold_kernel<W, Out, kInfinitePower>;
      kernels.threshold[w][out][1] = threshold_kernel<W, Out, 1>;
      kernels.threshold[w][out][2] = threshold_kernel<W, Out, 2>;
      kernels.threshold[w][out][3] = threshold_kernel<W, Out, 3>;
      for_each_type([&](auto gradient, int g) {
        kernels.scale_pruned_grad[g][w][out] = scale_kernel<decltype(gradient), W, Out>;
      });
    });
  });
}

}  // namespace FEATHER_ISA
}  // namespace feather
