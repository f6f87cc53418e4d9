// Thresholding, gradient scaling and counts: arguments, threads, and powers that have no kernel of their own.
#include <atomic>

#include "cpu/arrays.h"
#include "cpu/isa.h"
#include "feather/math.h"

namespace feather {
namespace {

template <class W, class Out>
void general_power_loop(const void* w_data, void* out_data, int64_t n, double t_wide, double p) {
  using T = Compute<W>;
  const W* w = static_cast<const W*>(w_data);
  Out* out = static_cast<Out*>(out_data);
  const Power power = make_power(p);
  for (int64_t i = 0; i < n; ++i) {
    const T weight = load<T>(w[i]);
    const T y = static_cast<T>(general_power(static_cast<double>(weight), t_wide, power));
    const T a = magnitude(weight);
    store(out[i], magnitude(y) > a ? weight : y);  // rounding must not make a weight larger
  }
}

using GeneralLoop = void (*)(const void*, void*, int64_t, double, double);

template <class W>
GeneralLoop general_loop(DType out) {
  constexpr GeneralLoop kLoops[kDTypes] = {general_power_loop<W, Half>, general_power_loop<W, BFloat16>,
                                           general_power_loop<W, float>, general_power_loop<W, double>};
  return kLoops[index_of(out)];
}

GeneralLoop general_loop(DType w, DType out) {
  switch (w) {
    case DType::kFloat16:
      return general_loop<Half>(out);
    case DType::kBFloat16:
      return general_loop<BFloat16>(out);
    case DType::kFloat32:
      return general_loop<float>(out);
    default:
      return general_loop<double>(out);
  }
}

}  // namespace

bool is_wide(DType dtype) { return dtype == DType::kFloat64; }

double read_scalar(const void* scalar, DType weight) {
  return is_wide(weight) ? *static_cast<const double*>(scalar)
                         : static_cast<double>(*static_cast<const float*>(scalar));
}

void threshold(const Array& w, double t, double p, void* out, DType out_dtype, int threads) {
  FEATHER_CHECK(p >= 1, "power must be at least 1, got ", p);
  const bool special = p == 1 || p == 2 || p == 3 || isinf(p);
  const auto& row = kernels().threshold[index_of(w.dtype)][index_of(out_dtype)];
  const auto kernel = row[isinf(p) ? kPowerInfinity : special ? static_cast<int>(p) : kPowerInfinity];
  const GeneralLoop general = general_loop(w.dtype, out_dtype);
  const bool by_kernel = special || !(t > 0);  // where T <= 0 or NaN the power does not matter
  const int parts = usable_threads(threads, w.n, kParallel);
  run_on_threads(parts, [&](int part) {
    const Range range = part_of(w.n, part, parts);
    const void* source = at(w.data, range.begin, w.dtype);
    void* target = at(out, range.begin, out_dtype);
    if (by_kernel) {
      kernel(source, target, range.end - range.begin, t);
    } else {
      general(source, target, range.end - range.begin, t, p);
    }
  });
}

void scale_pruned_grad(const Array& g, const Array& w, double t, double grad_scale, void* out, DType out_dtype,
                       int threads) {
  FEATHER_CHECK(g.n == w.n, "g must have as many elements as w (", w.n, "), got ", g.n);
  const auto kernel = kernels().scale_pruned_grad[index_of(g.dtype)][index_of(w.dtype)][index_of(out_dtype)];
  const int parts = usable_threads(threads, w.n, kParallel);
  run_on_threads(parts, [&](int part) {
    const Range range = part_of(w.n, part, parts);
    kernel(at(g.data, range.begin, g.dtype), at(w.data, range.begin, w.dtype), at(out, range.begin, out_dtype),
           range.end - range.begin, t, grad_scale);
  });
}

void count_pruned(const std::vector<Array>& weights, const std::vector<double>& thresholds, int64_t* counts,
                  int threads) {
  FEATHER_CHECK(weights.size() == thresholds.size(), "thresholds must be one per weight (", weights.size(), "), got ",
                thresholds.size());
  const int64_t total = total_elements(weights);
  const int parts = usable_threads(threads, total, kParallel);
  std::vector<std::atomic<int64_t>> found(weights.size());
  const Kernels& table = kernels();
  run_on_threads(parts, [&](int part) {
    for_each_piece(weights, part_of(total, part, parts), [&](size_t l, const void* w, int64_t n) {
      found[l].fetch_add(table.count_pruned[index_of(weights[l].dtype)](w, n, thresholds[l]), std::memory_order_relaxed);
    });
  });
  for (size_t l = 0; l < weights.size(); ++l) counts[l] = found[l].load(std::memory_order_relaxed);
}

}  // namespace feather
