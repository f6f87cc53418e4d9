// The ops threshold, scale_pruned_grad and count_pruned: argument checks, choice of the kernel, threads.
#include <atomic>

#include "cpu/arrays.h"
#include "cpu/instruction_set.h"

namespace feather {

double read_scalar(const void* scalar, DType weight) {
  return is_wide(weight) ? *static_cast<const double*>(scalar)
                         : static_cast<double>(*static_cast<const float*>(scalar));
}

void threshold(const Array& w, double t, double p, void* out, DType out_dtype, int threads) {
  const auto kernel = kernels().threshold[index_of(w.dtype)][index_of(out_dtype)][power_index(p)];
  const int parts = usable_threads(threads, w.n, kParallel);
  run_on_threads(parts, [&](int part) {
    const Range range = part_of(w.n, part, parts);
    kernel(at(w.data, range.begin, w.dtype), at(out, range.begin, out_dtype), range.end - range.begin, t);
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
      found[l].fetch_add(table.count_pruned[index_of(weights[l].dtype)](w, n, thresholds[l]),
                         std::memory_order_relaxed);
    });
  });
  for (size_t l = 0; l < weights.size(); ++l) counts[l] = found[l].load(std::memory_order_relaxed);
}

}  // namespace feather
