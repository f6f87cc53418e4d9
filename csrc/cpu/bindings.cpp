// The Python module feather_kernels._cpu: the ops of cpu/ops.h over addresses, sizes and dtype codes.
//
// The caller, feather_kernels/backends/cpp.py, makes sure that the addresses are valid. std::invalid_argument becomes
// ValueError, std::bad_alloc MemoryError.
#include "feather/binding.h"

#include "cpu/arrays.h"
#include "cpu/instruction_set.h"
#include "cpu/ops.h"

namespace {

using feather::Address;
using feather::Array;
using feather::ArrayTuples;
using feather::DType;

Array array_of(Address data, int64_t n, DType dtype) {
  FEATHER_CHECK(n >= 0, "number of elements must not be negative, got ", n);
  feather::index_of(dtype);
  return Array{data, n, dtype};
}

std::vector<Array> arrays_of(const ArrayTuples& weights) {
  std::vector<Array> arrays;
  arrays.reserve(weights.size());
  for (const auto& [data, n, dtype] : weights) arrays.push_back(array_of(data, n, dtype));
  return arrays;
}

// Runs f, and releases the GIL for it if there is enough work to pay for that.
template <class F>
void without_gil(int64_t elements, const F& f) {
  if (elements < feather::kParallel) {
    f();
  } else {
    const pybind11::gil_scoped_release release;
    f();
  }
}

void threshold(Address w, DType w_dtype, Address out, DType out_dtype, int64_t n, Address t, double p, int threads) {
  const Array weight = array_of(w, n, w_dtype);
  const double value = feather::read_scalar(t, w_dtype);
  without_gil(n, [&] { feather::threshold(weight, value, p, out, out_dtype, threads); });
}

void scale_pruned_grad(Address g, DType g_dtype, Address w, DType w_dtype, Address out, DType out_dtype, int64_t n,
                       Address t, Address grad_scale, int threads) {
  const Array gradient = array_of(g, n, g_dtype);
  const Array weight = array_of(w, n, w_dtype);
  const double value = feather::read_scalar(t, w_dtype);
  const double scale = feather::read_scalar(grad_scale, w_dtype);
  without_gil(n, [&] { feather::scale_pruned_grad(gradient, weight, value, scale, out, out_dtype, threads); });
}

void count_pruned(const ArrayTuples& weights, const std::vector<Address>& thresholds, Address counts, int threads) {
  const std::vector<Array> arrays = arrays_of(weights);
  FEATHER_CHECK(thresholds.size() == arrays.size(), "thresholds must be one per weight (", arrays.size(), "), got ",
                thresholds.size());
  std::vector<double> values;
  for (size_t l = 0; l < arrays.size(); ++l) values.push_back(feather::read_scalar(thresholds[l], arrays[l].dtype));
  without_gil(feather::total_elements(arrays), [&] { feather::count_pruned(arrays, values, counts, threads); });
}

void magnitude_select(const ArrayTuples& weights, const std::vector<int64_t>& groups, int64_t group_count, Address rank,
                      Address scales, Address caps, Address hint, Address out, int threads) {
  const feather::Scores scores{arrays_of(weights), groups, group_count, scales, caps};
  without_gil(feather::total_elements(scores.weights),
              [&] { feather::magnitude_select(scores, rank, hint, out, threads); });
}

void magnitude_histogram(const ArrayTuples& weights, const std::vector<int64_t>& groups, int64_t group_count,
                         Address prefix, int shift, int bits, Address scales, Address out, int threads) {
  const feather::Scores scores{arrays_of(weights), groups, group_count, scales, nullptr};
  without_gil(feather::total_elements(scores.weights),
              [&] { feather::magnitude_histogram(scores, prefix, shift, bits, out, threads); });
}

void collect_keys(const ArrayTuples& weights, const std::vector<int64_t>& groups, int64_t group_count, Address low,
                  Address high, Address scales, Address below, Address inside, Address keys, int64_t capacity,
                  int threads) {
  const feather::Scores scores{arrays_of(weights), groups, group_count, scales, nullptr};
  const feather::KeysInside out{below, inside, keys, capacity};
  without_gil(feather::total_elements(scores.weights), [&] { feather::collect_keys(scores, low, high, out, threads); });
}

#if defined(_OPENMP)
constexpr const char* kThreads = "OpenMP";
#else
constexpr const char* kThreads = "std::thread";
#endif

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "The ops of feather_kernels over addresses; see csrc/cpu/ops.h.";
  module.def("threshold", &threshold);
  module.def("scale_pruned_grad", &scale_pruned_grad);
  module.def("count_pruned", &count_pruned);
  module.def("magnitude_select", &magnitude_select);
  module.def("magnitude_histogram", &magnitude_histogram);
  module.def("collect_keys", &collect_keys);
  module.def("build_info", [] { return feather::build_info("threads", kThreads); });
  module.def("available_instruction_sets", &feather::available_instruction_sets);
  module.def("instruction_set", &feather::instruction_set);
  module.def("use_instruction_set", &feather::use_instruction_set);
}
