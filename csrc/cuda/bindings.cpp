// feather_kernels._cuda: the ops over addresses of a device's memory. The caller (feather_kernels/backends/cuda.py)
// answers for what they point to, for the current device and for the stream; C++ exceptions become Python's
// (std::invalid_argument: ValueError, std::runtime_error: RuntimeError). Importing it touches no driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "cuda/ops.h"

namespace py = pybind11;

namespace {

using feather::DType;
using feather::cuda::Chunks;
using feather::cuda::Selection;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (address of the entries, their number, dtype code) of each table.
using Tables = std::vector<std::tuple<uintptr_t, int64_t, int>>;

std::vector<Chunks> chunks_of(const Tables& tables) {
  std::vector<Chunks> all;
  all.reserve(tables.size());
  for (const auto& [entries, count, dtype] : tables) {
    if (count > 0) all.push_back(Chunks{pointer<const int64_t>(entries), count, static_cast<DType>(dtype)});
  }
  return all;
}

void threshold(uintptr_t w, int w_dtype, uintptr_t out, int out_dtype, int64_t n, uintptr_t t, double p,
               uintptr_t stream) {
  feather::cuda::threshold(pointer<const void>(w), static_cast<DType>(w_dtype), pointer<const void>(t), p,
                           pointer<void>(out), static_cast<DType>(out_dtype), n, pointer<void>(stream));
}

void scale_pruned_grad(uintptr_t g, int g_dtype, uintptr_t w, int w_dtype, uintptr_t out, int out_dtype, int64_t n,
                       uintptr_t t, uintptr_t grad_scale, uintptr_t stream) {
  feather::cuda::scale_pruned_grad(pointer<const void>(g), static_cast<DType>(g_dtype), pointer<const void>(w),
                                   static_cast<DType>(w_dtype), pointer<const void>(t),
                                   pointer<const void>(grad_scale), pointer<void>(out), static_cast<DType>(out_dtype),
                                   n, pointer<void>(stream));
}

void count_pruned(const Tables& tables, uintptr_t thresholds, bool wide, uintptr_t counts, uintptr_t stream) {
  feather::cuda::count_pruned(chunks_of(tables), pointer<const void>(thresholds), wide, pointer<int64_t>(counts),
                              pointer<void>(stream));
}

void magnitude_histogram(const Tables& tables, uintptr_t scales, uintptr_t prefixes, int shift, int bits,
                         uintptr_t counts, uintptr_t stream) {
  feather::cuda::magnitude_histogram(chunks_of(tables), pointer<const void>(scales), pointer<const int64_t>(prefixes),
                                     shift, bits, pointer<int64_t>(counts), pointer<void>(stream));
}

Selection selection_of(const Tables& tables, bool wide, int64_t groups, int64_t rows, int64_t all_elements,
                       uintptr_t scales, uintptr_t caps, uintptr_t hint) {
  Selection selection{};
  selection.chunks = chunks_of(tables);
  selection.wide = wide;
  selection.groups = groups;
  selection.rows = rows;
  selection.all_elements = all_elements;
  selection.scales = pointer<const void>(scales);
  selection.caps = pointer<const int64_t>(caps);
  selection.hint = pointer<const void>(hint);
  return selection;
}

int64_t scratch_size(bool wide, int64_t groups, int64_t rows, int64_t all_elements, uintptr_t caps, uintptr_t hint) {
  return feather::cuda::scratch_size(selection_of({}, wide, groups, rows, all_elements, 0, caps, hint));
}

void magnitude_select(const Tables& tables, bool wide, int64_t groups, int64_t rows, int64_t all_elements,
                      uintptr_t rank, uintptr_t row_starts, uintptr_t group_of_row, uintptr_t array_of_row,
                      uintptr_t elements, uintptr_t scales, uintptr_t caps, uintptr_t hint, uintptr_t scratch,
                      uintptr_t out, uintptr_t stream) {
  Selection selection = selection_of(tables, wide, groups, rows, all_elements, scales, caps, hint);
  selection.rank = pointer<const int64_t>(rank);
  selection.row_starts = pointer<const int64_t>(row_starts);
  selection.group_of_row = pointer<const int64_t>(group_of_row);
  selection.array_of_row = pointer<const int64_t>(array_of_row);
  selection.elements = pointer<const int64_t>(elements);
  selection.scratch = pointer<int64_t>(scratch);
  selection.out = pointer<void>(out);
  feather::cuda::magnitude_select(selection, pointer<void>(stream));
}

// A set of tuples of dtype codes.
template <size_t N>
py::frozenset codes_of(const std::vector<std::array<DType, N>>& dtypes) {
  py::set all;
  for (const auto& row : dtypes) {
    py::tuple codes(N);
    for (size_t i = 0; i < N; ++i) codes[i] = static_cast<int>(row[i]);
    all.add(codes);
  }
  return py::frozenset(all);
}

py::dict build_info() {
  py::dict info;
  info["version"] = FEATHER_VERSION;
  info["source_hash"] = FEATHER_SOURCE_HASH;
  info["compiler"] = FEATHER_COMPILER;
  info["architectures"] = FEATHER_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  using unlocked = py::call_guard<py::gil_scoped_release>;  // a launch may wait for room in the stream
  module.doc() = "The ops of feather_kernels over addresses of CUDA memory; see csrc/cuda/ops.h.";
  module.attr("CHUNK") = feather::cuda::kChunk;
  module.attr("THRESHOLD_DTYPES") = codes_of(feather::cuda::threshold_dtypes());
  module.attr("SCALE_DTYPES") = codes_of(feather::cuda::scale_dtypes());
  module.def("build_info", &build_info);
  module.def("threshold", &threshold, unlocked());
  module.def("scale_pruned_grad", &scale_pruned_grad, unlocked());
  module.def("count_pruned", &count_pruned, unlocked());
  module.def("magnitude_histogram", &magnitude_histogram, unlocked());
  module.def("scratch_size", &scratch_size);
  module.def("magnitude_select", &magnitude_select, unlocked());
}
