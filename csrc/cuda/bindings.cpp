// The Python module feather_kernels._cuda: the ops of cuda/ops.h over addresses, sizes, dtype codes and streams.
//
// The caller, feather_kernels/backends/cuda.py, makes sure that the addresses are valid, and sets the current device
// and the stream. std::invalid_argument becomes ValueError, std::runtime_error RuntimeError. Importing the module needs
// no driver.
#include "feather/binding.h"

#include "cuda/ops.h"

namespace py = pybind11;

namespace {

using feather::Address;
using feather::ArrayTuples;
using feather::DType;
using feather::cuda::ChunkTable;
using feather::cuda::Selection;

// The tables that have entries.
std::vector<ChunkTable> tables_of(const ArrayTuples& tables) {
  std::vector<ChunkTable> all;
  all.reserve(tables.size());
  for (const auto& [entries, count, dtype] : tables) {
    if (count > 0) all.push_back(ChunkTable{entries, count, dtype});
  }
  return all;
}

void threshold(Address w, DType w_dtype, Address out, DType out_dtype, int64_t n, Address t, double p, Address stream) {
  feather::cuda::threshold(w, w_dtype, t, p, out, out_dtype, n, stream);
}

void scale_pruned_grad(Address g, DType g_dtype, Address w, DType w_dtype, Address out, DType out_dtype, int64_t n,
                       Address t, Address grad_scale, Address stream) {
  feather::cuda::scale_pruned_grad(g, g_dtype, w, w_dtype, t, grad_scale, out, out_dtype, n, stream);
}

void count_pruned(const ArrayTuples& tables, Address thresholds, bool wide, Address counts, Address stream) {
  feather::cuda::count_pruned(tables_of(tables), thresholds, wide, counts, stream);
}

void magnitude_histogram(const ArrayTuples& tables, Address scales, Address prefixes, int shift, int bits,
                         Address counts, Address stream) {
  feather::cuda::magnitude_histogram(tables_of(tables), scales, prefixes, shift, bits, counts, stream);
}

int64_t scratch_size(bool wide, int64_t groups, int64_t rows, int64_t all_elements, Address caps, Address hint) {
  Selection selection{};
  selection.wide = wide;
  selection.groups = groups;
  selection.rows = rows;
  selection.all_elements = all_elements;
  selection.caps = caps;
  selection.hint = hint;
  return feather::cuda::scratch_size(selection);
}

void magnitude_select(const ArrayTuples& tables, bool wide, int64_t groups, int64_t rows, int64_t all_elements,
                      Address rank, Address row_starts, Address group_of_row, Address array_of_row, Address elements,
                      Address scales, Address caps, Address hint, Address scratch, Address out, Address stream) {
  const Selection selection{tables_of(tables), wide,     groups, rows, all_elements, rank,    row_starts, group_of_row,
                            array_of_row,      elements, scales, caps, hint,         scratch, out};
  feather::cuda::magnitude_select(selection, stream);
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

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  using unlocked = py::call_guard<py::gil_scoped_release>;  // a launch may wait for room in the stream
  module.doc() = "The ops of feather_kernels over addresses of CUDA memory; see csrc/cuda/ops.h.";
  module.attr("CHUNK") = feather::cuda::kChunk;
  module.attr("THRESHOLD_DTYPES") = codes_of(feather::cuda::threshold_dtypes());
  module.attr("SCALE_DTYPES") = codes_of(feather::cuda::scale_dtypes());
  module.def("build_info", [] { return feather::build_info("architectures", FEATHER_ARCHITECTURES); });
  module.def("threshold", &threshold, unlocked());
  module.def("scale_pruned_grad", &scale_pruned_grad, unlocked());
  module.def("count_pruned", &count_pruned, unlocked());
  module.def("magnitude_histogram", &magnitude_histogram, unlocked());
  module.def("scratch_size", &scratch_size);
  module.def("magnitude_select", &magnitude_select, unlocked());
}
