// The ops of the contract (feather_kernels/ops/schema.py) on a CUDA device: launches on `stream`, which is a
// cudaStream_t of the current device. Every other pointer is to memory of that device; nothing is read on the host.
//
// They throw std::invalid_argument for arguments that make no sense and std::runtime_error, with the name of the op,
// for a launch that failed.
#pragma once

#include <stdint.h>

#include <array>
#include <vector>

#include "feather/dtype.h"

namespace feather::cuda {

// The dtypes that have kernels: of w and out, and of g, w and out. The ops below throw for others.
std::vector<std::array<DType, 2>> threshold_dtypes();
std::vector<std::array<DType, 3>> scale_dtypes();

// out[i] = P(w[i]); t: of the compute type; p: 1, 2, 3 or infinite. out may be w where the dtypes agree.
void threshold(const void* w, DType w_dtype, const void* t, double p, void* out, DType out_dtype, int64_t n,
               void* stream);

// out[i] = g[i], times grad_scale where w[i] is pruned; t, grad_scale: of w's compute type. out may be g.
void scale_pruned_grad(const void* g, DType g_dtype, const void* w, DType w_dtype, const void* t,
                       const void* grad_scale, void* out, DType out_dtype, int64_t n, void* stream);

// The elements of arrays of one dtype in chunks of at most kChunk, one block each: `count` entries of kChunkColumns
// numbers (see Chunk in chunk_table.cuh), made by feather_kernels/backends/gpu/chunk_tables.py.
constexpr int64_t kChunk = 1 << 14;
constexpr int kChunkColumns = 5;

struct Chunks {
  const int64_t* entries;
  int64_t count;
  DType dtype;
};

// counts[l] += pruned elements of array l under thresholds[l], which are double (wide) or float.
void count_pruned(const std::vector<Chunks>& chunks, const void* thresholds, bool wide, int64_t* counts, void* stream);

// counts (rows, 2^bits) += the digits above shift of the keys whose higher bits are prefixes[row].
void magnitude_histogram(const std::vector<Chunks>& chunks, const void* scales, const int64_t* prefixes, int shift,
                         int bits, int64_t* counts, void* stream);

// A selection: rows are counted apart, one a group or, where there are caps, one an array; a group's rows follow each
// other. scales (one per array, of the compute type), caps (one per array) and hint (groups, 2) may be null.
struct Selection {
  std::vector<Chunks> chunks;
  bool wide;  // keys and values are float64
  int64_t groups;
  int64_t rows;
  int64_t all_elements;         // of all arrays together, read where there is a hint
  const int64_t* rank;          // (groups)
  const int64_t* row_starts;    // (groups + 1): first row of each group
  const int64_t* group_of_row;  // (rows)
  const int64_t* array_of_row;  // (rows), read where there are caps
  const int64_t* elements;      // (groups): elements of each, read where there is a hint
  const void* scales;
  const int64_t* caps;
  const void* hint;
  int64_t* scratch;  // scratch_size numbers, all 0
  void* out;         // (groups, 2)
};

// Numbers of scratch memory that a selection needs. Reads the numbers and which pointers are null.
int64_t scratch_size(const Selection& selection);

// out = the rank-th smallest score of each group and the next.
void magnitude_select(const Selection& selection, void* stream);

}  // namespace feather::cuda
