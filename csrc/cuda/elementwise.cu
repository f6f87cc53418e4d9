// The ops threshold and scale_pruned_grad: which dtypes have kernels, argument checks, launches.
#include "cuda/elementwise.cuh"

#include <algorithm>
#include <string>

#include "cuda/ops.h"
#include "feather/check.h"

namespace feather::cuda {
namespace {

constexpr int64_t kMostBlocks = 1 << 13;  // fills any device several times over; the kernels loop over the rest

int64_t blocks_for(int64_t work) { return std::min(kMostBlocks, (work + kThreads - 1) / kThreads); }

// The first element at which all arrays are aligned to 16 bytes, or n if there is none.
template <int N, class... W>
int64_t aligned_head(int64_t n, const W*... arrays) {
  for (int64_t head = 0; head < std::min<int64_t>(N, n); ++head) {
    if (((reinterpret_cast<uintptr_t>(arrays + head) % kAccess == 0) && ...)) return head;
  }
  return n;
}

// Threads that have work: one for each pack, or for each element if there are no packs.
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

struct ThresholdKernels {
  std::array<DType, 2> dtypes;      // w, out
  LaunchThreshold launch[kPowers];  // by P
};

template <class W, class Out>
constexpr ThresholdKernels threshold_entry() {
  return {{kDTypeOf<W>, kDTypeOf<Out>},
          {launch_threshold<W, Out, kInfinitePower>, launch_threshold<W, Out, 1>, launch_threshold<W, Out, 2>,
           launch_threshold<W, Out, 3>}};
}

struct ScaleKernel {
  std::array<DType, 3> dtypes;  // g, w, out
  LaunchScale launch;
};

template <class G, class W, class Out>
constexpr ScaleKernel scale_entry() {
  return {{kDTypeOf<G>, kDTypeOf<W>, kDTypeOf<Out>}, launch_scale<G, W, Out>};
}

// The combinations that training meets: one dtype throughout, or float32 weights with a 16-bit result or gradient. For
// others the caller casts its operands to one of these.
constexpr ThresholdKernels kThreshold[] = {
    threshold_entry<float, float>(),       threshold_entry<float, BFloat16>(), threshold_entry<float, Half>(),
    threshold_entry<BFloat16, BFloat16>(), threshold_entry<Half, Half>(),      threshold_entry<double, double>(),
};
constexpr ScaleKernel kScale[] = {
    scale_entry<float, float, float>(), scale_entry<BFloat16, float, float>(),
    scale_entry<Half, float, float>(),  scale_entry<BFloat16, float, BFloat16>(),
    scale_entry<Half, float, Half>(),   scale_entry<BFloat16, BFloat16, BFloat16>(),
    scale_entry<Half, Half, Half>(),    scale_entry<double, double, double>(),
};

// The entry of a table for some dtypes; fails if there is none.
template <class Kernel, size_t Count>
const Kernel& kernel_for(const decltype(Kernel::dtypes)& dtypes, const Kernel (&kernels)[Count], const char* op) {
  for (const Kernel& kernel : kernels) {
    if (kernel.dtypes == dtypes) return kernel;
  }
  std::string codes;
  for (const DType dtype : dtypes) codes += ' ' + std::to_string(static_cast<int>(dtype));
  fail(op, " has no kernel for the dtype codes", codes);
}

template <class Kernel, size_t Count>
std::vector<decltype(Kernel::dtypes)> dtypes_of(const Kernel (&kernels)[Count]) {
  std::vector<decltype(Kernel::dtypes)> all;
  for (const Kernel& kernel : kernels) all.push_back(kernel.dtypes);
  return all;
}

}  // namespace

std::vector<std::array<DType, 2>> threshold_dtypes() { return dtypes_of(kThreshold); }
std::vector<std::array<DType, 3>> scale_dtypes() { return dtypes_of(kScale); }

void threshold(const void* w, DType w_dtype, const void* t, double p, void* out, DType out_dtype, int64_t n,
               void* stream) {
  const auto& kernels = kernel_for({w_dtype, out_dtype}, kThreshold, "threshold");
  const auto launch = kernels.launch[power_index(p)];
  if (n > 0) launch(w, t, out, n, stream);
}

void scale_pruned_grad(const void* g, DType g_dtype, const void* w, DType w_dtype, const void* t,
                       const void* grad_scale, void* out, DType out_dtype, int64_t n, void* stream) {
  const auto launch = kernel_for({g_dtype, w_dtype, out_dtype}, kScale, "scale_pruned_grad").launch;
  if (n > 0) launch(g, w, t, grad_scale, out, n, stream);
}

}  // namespace feather::cuda
