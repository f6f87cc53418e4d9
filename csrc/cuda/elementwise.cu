// Launches of thresholding and gradient scaling: the kernel for the dtypes, and where accesses of 16 bytes begin.
#include "cuda/elementwise.cuh"

#include <algorithm>

#include "cuda/ops.h"
#include "feather/check.h"

namespace feather::cuda {
namespace {

constexpr int64_t kMostBlocks = 1 << 13;  // enough to fill any device several times; the loop over the grid does more

int64_t blocks_for(int64_t work) { return std::min(kMostBlocks, (work + kThreads - 1) / kThreads); }

// The first element at which every array is at a multiple of 16 bytes, or n where there is none.
template <int N, class... W>
int64_t aligned_head(int64_t n, const W*... arrays) {
  for (int64_t head = 0; head < std::min<int64_t>(N, n); ++head) {
    if (((reinterpret_cast<uintptr_t>(arrays + head) % kAccess == 0) && ...)) return head;
  }
  return n;
}

// Threads of work: one for each pack, or for each element where there are none.
template <int N>
int64_t threads_for(int64_t n, int64_t head) {
  return std::max<int64_t>({head, (n - head) / N, 1});
}

template <class W, class Out, int P>
void launch_threshold(const void* w, const void* t, void* out, int64_t n, void* stream) {
  using T = Compute<W>;
  constexpr int kPack = kPackOf<W, Out>;
  const W* source = static_cast<const W*>(w);
  Out* target = static_cast<Out*>(out);
  const int64_t head = aligned_head<kPack>(n, source, target);
  launch("threshold", blocks_for(threads_for<kPack>(n, head)), stream, threshold_kernel<W, Out, P>, source,
         static_cast<const T*>(t), target, n, head);
}

template <class G, class W, class Out>
void launch_scale(const void* g, const void* w, const void* t, const void* grad_scale, void* out, int64_t n,
                  void* stream) {
  using T = Compute<W>;
  constexpr int kPack = kPackOf<G, W, Out>;
  const G* gradient = static_cast<const G*>(g);
  const W* weight = static_cast<const W*>(w);
  Out* target = static_cast<Out*>(out);
  const int64_t head = aligned_head<kPack>(n, gradient, weight, target);
  launch("scale_pruned_grad", blocks_for(threads_for<kPack>(n, head)), stream, scale_kernel<G, W, Out>, gradient,
         weight, static_cast<const T*>(t), static_cast<const T*>(grad_scale), target, n, head);
}

using LaunchThreshold = void (*)(const void*, const void*, void*, int64_t, void*);
using LaunchScale = void (*)(const void*, const void*, const void*, const void*, void*, int64_t, void*);

constexpr int kPowers = 4;  // P = kInfinitePower, 1, 2, 3

// What training meets: one dtype throughout, or float32 weights with a narrower result or gradient.
struct ThresholdPair {
  DType w, out;
  LaunchThreshold launch[kPowers];
};

template <class W, class Out>
constexpr ThresholdPair pair_of(DType w, DType out) {
  return {w,
          out,
          {launch_threshold<W, Out, kInfinitePower>, launch_threshold<W, Out, 1>, launch_threshold<W, Out, 2>,
           launch_threshold<W, Out, 3>}};
}

constexpr DType kF16 = DType::kFloat16, kBF16 = DType::kBFloat16, kF32 = DType::kFloat32, kF64 = DType::kFloat64;

constexpr ThresholdPair kThresholdPairs[] = {
    pair_of<float, float>(kF32, kF32),       pair_of<float, BFloat16>(kF32, kBF16),
    pair_of<float, Half>(kF32, kF16),        pair_of<BFloat16, BFloat16>(kBF16, kBF16),
    pair_of<Half, Half>(kF16, kF16),         pair_of<double, double>(kF64, kF64),
};

struct ScaleTriple {
  DType g, w, out;
  LaunchScale launch;
};

constexpr ScaleTriple kScaleTriples[] = {
    {kF32, kF32, kF32, launch_scale<float, float, float>},
    {kBF16, kF32, kF32, launch_scale<BFloat16, float, float>},
    {kF16, kF32, kF32, launch_scale<Half, float, float>},
    {kBF16, kF32, kBF16, launch_scale<BFloat16, float, BFloat16>},
    {kF16, kF32, kF16, launch_scale<Half, float, Half>},
    {kBF16, kBF16, kBF16, launch_scale<BFloat16, BFloat16, BFloat16>},
    {kF16, kF16, kF16, launch_scale<Half, Half, Half>},
    {kF64, kF64, kF64, launch_scale<double, double, double>},
};

void check_dtype(const char* name, DType dtype) {
  const int code = static_cast<int>(dtype);
  FEATHER_CHECK(code >= 0 && code < kDTypes, "dtype code of ", name, " must be in [0, ", kDTypes, "), got ", code);
}

template <class T>
void threshold_any(const void* w, DType w_dtype, const void* t, int power, void* out, DType out_dtype, int64_t n,
                   void* stream) {
  launch("threshold", blocks_for(n), stream, any_threshold_kernel<T>, w, w_dtype, static_cast<const T*>(t), power, out,
         out_dtype, n);
}

template <class Product, class T>
void scale_any(const void* g, DType g_dtype, const void* w, DType w_dtype, const void* t, const void* grad_scale,
               void* out, DType out_dtype, int64_t n, void* stream) {
  launch("scale_pruned_grad", blocks_for(n), stream, any_scale_kernel<Product, T>, g, g_dtype, w, w_dtype,
         static_cast<const T*>(t), static_cast<const T*>(grad_scale), out, out_dtype, n);
}

}  // namespace

void threshold(const void* w, DType w_dtype, const void* t, double p, void* out, DType out_dtype, int64_t n,
               void* stream) {
  check_dtype("w", w_dtype);
  check_dtype("out", out_dtype);
  const int power = power_index(p);
  if (n <= 0) return;
  for (const ThresholdPair& pair : kThresholdPairs) {
    if (pair.w != w_dtype || pair.out != out_dtype) continue;
    pair.launch[power](w, t, out, n, stream);
    return;
  }
  (w_dtype == kF64 ? threshold_any<double> : threshold_any<float>)(w, w_dtype, t, power, out, out_dtype, n, stream);
}

void scale_pruned_grad(const void* g, DType g_dtype, const void* w, DType w_dtype, const void* t,
                       const void* grad_scale, void* out, DType out_dtype, int64_t n, void* stream) {
  check_dtype("g", g_dtype);
  check_dtype("w", w_dtype);
  check_dtype("out", out_dtype);
  if (n <= 0) return;
  for (const ScaleTriple& triple : kScaleTriples) {
    if (triple.g != g_dtype || triple.w != w_dtype || triple.out != out_dtype) continue;
    triple.launch(g, w, t, grad_scale, out, n, stream);
    return;
  }
  const auto any = w_dtype == kF64   ? scale_any<double, double>
                   : g_dtype == kF64 ? scale_any<double, float>
                                     : scale_any<float, float>;
  any(g, g_dtype, w, w_dtype, t, grad_scale, out, out_dtype, n, stream);
}

}  // namespace feather::cuda
