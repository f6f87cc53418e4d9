// feather_kernels._cpu: the ops over addresses. The caller (feather_kernels/backends/cpp.py) answers for what they point
// to; C++ exceptions become Python's (std::invalid_argument: ValueError, std::bad_alloc: MemoryError).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/arrays.h"
#include "cpu/isa.h"
#include "cpu/ops.h"

namespace py = pybind11;

namespace {

using feather::Array;
using feather::DType;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Array array_of(uintptr_t address, int64_t n, int dtype) {
  FEATHER_CHECK(n >= 0, "number of elements must not be negative, got ", n);
  const Array array{pointer<const void>(address), n, static_cast<DType>(dtype)};
  feather::index_of(array.dtype);
  return array;
}

std::vector<Array> arrays_of(const std::vector<uintptr_t>& addresses, const std::vector<int64_t>& sizes,
                             const std::vector<int>& dtypes) {
  FEATHER_CHECK(sizes.size() == addresses.size() && dtypes.size() == addresses.size(),
                "addresses, sizes and dtypes must be as many, got ", addresses.size(), ", ", sizes.size(), ", ",
                dtypes.size());
  std::vector<Array> arrays;
  arrays.reserve(addresses.size());
  for (size_t i = 0; i < addresses.size(); ++i) arrays.push_back(array_of(addresses[i], sizes[i], dtypes[i]));
  return arrays;
}

// Python's other threads run meanwhile where the work outweighs letting them.
template <class F>
void without_gil(int64_t elements, const F& f) {
  if (elements < feather::kParallel) {
    f();
  } else {
    const py::gil_scoped_release release;
    f();
  }
}

void threshold(uintptr_t w, int w_dtype, uintptr_t out, int out_dtype, int64_t n, uintptr_t t, double p, int threads) {
  const Array weight = array_of(w, n, w_dtype);
  const double value = feather::read_scalar(pointer<const void>(t), weight.dtype);
  without_gil(n, [&] {
    feather::threshold(weight, value, p, pointer<void>(out), static_cast<DType>(out_dtype), threads);
  });
}

void scale_pruned_grad(uintptr_t g, int g_dtype, uintptr_t w, int w_dtype, uintptr_t out, int out_dtype, int64_t n,
                       uintptr_t t, uintptr_t grad_scale, int threads) {
  const Array gradient = array_of(g, n, g_dtype);
  const Array weight = array_of(w, n, w_dtype);
  const double value = feather::read_scalar(pointer<const void>(t), weight.dtype);
  const double scale = feather::read_scalar(pointer<const void>(grad_scale), weight.dtype);
  without_gil(n, [&] {
    feather::scale_pruned_grad(gradient, weight, value, scale, pointer<void>(out), static_cast<DType>(out_dtype),
                               threads);
  });
}

void count_pruned(const std::vector<uintptr_t>& weights, const std::vector<int64_t>& sizes,
                  const std::vector<int>& dtypes, const std::vector<uintptr_t>& thresholds, uintptr_t counts,
                  int threads) {
  const std::vector<Array> arrays = arrays_of(weights, sizes, dtypes);
  FEATHER_CHECK(thresholds.size() == arrays.size(), "thresholds must be one per weight (", arrays.size(), "), got ",
                thresholds.size());
  std::vector<double> values;
  for (size_t l = 0; l < arrays.size(); ++l) {
    values.push_back(feather::read_scalar(pointer<const void>(thresholds[l]), arrays[l].dtype));
  }
  without_gil(feather::total_elements(arrays),
              [&] { feather::count_pruned(arrays, values, pointer<int64_t>(counts), threads); });
}

feather::Scores scores_of(const std::vector<uintptr_t>& weights, const std::vector<int64_t>& sizes,
                          const std::vector<int>& dtypes, const std::vector<int64_t>& groups, int64_t group_count,
                          uintptr_t scales, uintptr_t caps) {
  return feather::Scores{arrays_of(weights, sizes, dtypes), groups, group_count, pointer<const void>(scales),
                         pointer<const int64_t>(caps)};
}

void magnitude_select(const std::vector<uintptr_t>& weights, const std::vector<int64_t>& sizes,
                      const std::vector<int>& dtypes, const std::vector<int64_t>& groups, int64_t group_count,
                      uintptr_t rank, uintptr_t scales, uintptr_t caps, uintptr_t hint, uintptr_t out, int threads) {
  const feather::Scores scores = scores_of(weights, sizes, dtypes, groups, group_count, scales, caps);
  without_gil(feather::total_elements(scores.weights), [&] {
    feather::magnitude_select(scores, pointer<const int64_t>(rank), pointer<const void>(hint), pointer<void>(out),
                              threads);
  });
}

void magnitude_histogram(const std::vector<uintptr_t>& weights, const std::vector<int64_t>& sizes,
                         const std::vector<int>& dtypes, const std::vector<int64_t>& groups, int64_t group_count,
                         uintptr_t prefix, int shift, int bits, uintptr_t scales, uintptr_t out, int threads) {
  const feather::Scores scores = scores_of(weights, sizes, dtypes, groups, group_count, scales, 0);
  without_gil(feather::total_elements(scores.weights), [&] {
    feather::magnitude_histogram(scores, pointer<const int64_t>(prefix), shift, bits, pointer<int64_t>(out), threads);
  });
}

py::dict build_info() {
  py::dict info;
  info["version"] = FEATHER_VERSION;
  info["source_hash"] = FEATHER_SOURCE_HASH;
  info["compiler"] = FEATHER_COMPILER;
#if defined(_OPENMP)
  info["threads"] = "OpenMP";
#else
  info["threads"] = "std::thread";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "The ops of feather_kernels over addresses; see csrc/cpu/ops.h.";
  module.def("threshold", &threshold);
  module.def("scale_pruned_grad", &scale_pruned_grad);
  module.def("count_pruned", &count_pruned);
  module.def("magnitude_select", &magnitude_select);
  module.def("magnitude_histogram", &magnitude_histogram);
  module.def("build_info", &build_info);
  module.def("available_instruction_sets", &feather::available_instruction_sets);
  module.def("instruction_set", &feather::instruction_set);
  module.def("use_instruction_set", &feather::use_instruction_set);
}
