// The ops of feather_kernels/ops/schema.py over arrays in the memory of a CUDA device.
//
// Each op launches its kernels on `stream`, a cudaStream_t of the current device, and returns without waiting. All
// other pointers are addresses in that device's memory, aligned to their dtype; nothing is read on the host and nothing
// is allocated. An op without elements launches nothing. Arguments that cannot be right throw std::invalid_argument; a
// failed launch throws std::runtime_error with the name of the op. The ops may be called from any thread.
#pragma once

#include <stdint.h>

#include <array>
#include <vector>

#include "feather/dtype.h"

namespace feather::cuda {

// The combinations of dtypes that have kernels: of (w, out) for threshold, of (g, w, out) for scale_pruned_grad. Both
// ops throw for any other.
std::vector<std::array<DType, 2>> threshold_dtypes();
std::vector<std::array<DType, 3>> scale_dtypes();

// out[i] = P(w[i]) = sign(w[i]) (abs(w[i])^p - t^p)^(1/p), +0.0 where w[i] is pruned; p is 1, 2, 3 or infinite. t
// points to one number of the compute type of w. out may be w if the dtypes agree.
void threshold(const void* w, DType w_dtype, const void* t, double p, void* out, DType out_dtype, int64_t n,
               void* stream);

// out[i] = g[i], or g[i] grad_scale where w[i] is pruned, computed in the wider of the compute types of g and w. t and
// grad_scale point to one number each of the compute type of w. out may be g if the dtypes agree.
void scale_pruned_grad(const void* g, DType g_dtype, const void* w, DType w_dtype, const void* t,
                       const void* grad_scale, void* out, DType out_dtype, int64_t n, void* stream);

// A table that cuts the arrays of one dtype into chunks, so that one launch, with a block for each chunk, covers them
// all. Ops over lists of arrays take one table for each dtype. feather_kernels/backends/gpu/chunk_tables.py makes them.
constexpr int64_t kChunk = 1 << 14;  // the most elements of a chunk
constexpr int kChunkColumns = 5;     // int64 numbers of an entry; Chunk in chunk_table.cuh says which

struct ChunkTable {
  const int64_t* entries;  // (count, kChunkColumns)
  int64_t count;           // > 0
  DType dtype;
};

// counts[l] += number of elements of array l that thresholds[l] prunes. The thresholds are double if `wide`, else
// float.
void count_pruned(const std::vector<ChunkTable>& tables, const void* thresholds, bool wide, int64_t* counts,
                  void* stream);

// counts[row][d] += number of keys whose bits above shift + bits equal prefixes[row] and whose next `bits` bits are d;
// counts is (rows, 2^bits), bits is in [1, 16]. The table assigns arrays to rows. scales has one number of the compute
// type for each array, or is null.
void magnitude_histogram(const std::vector<ChunkTable>& tables, const void* scales, const int64_t* prefixes, int shift,
                         int bits, int64_t* counts, void* stream);

// The arguments of magnitude_select. Keys are counted in rows: without caps each group is a row, with caps each array
// is one. The rows of a group are consecutive.
struct Selection {
  std::vector<ChunkTable> tables;
  bool wide;  // the arrays are float64, and so are scales, hint and out; else these are float
  int64_t groups;
  int64_t rows;
  int64_t all_elements;         // of all arrays; used only with a hint
  const int64_t* rank;          // (groups)
  const int64_t* row_starts;    // (groups + 1): the first row of each group
  const int64_t* group_of_row;  // (rows)
  const int64_t* array_of_row;  // (rows); used only with caps
  const int64_t* elements;      // (groups): the elements of each group; used only with a hint
  const void* scales;           // one for each array, or null: scores are scale abs(w), or abs(w)
  const int64_t* caps;          // one for each array, or null: only its `cap` smallest scores take part
  const void* hint;             // (groups, 2): the result of an earlier call, or null; never changes the result
  int64_t* scratch;             // scratch_size(selection) numbers, all 0
  void* out;                    // (groups, 2)
};

// How many int64 numbers of scratch memory a selection needs. Uses only its numbers and whether pointers are null.
int64_t scratch_size(const Selection& selection);

// out[g] = (v[rank[g]], v[rank[g] + 1]) for the ascending scores v of group g. Past the last score the second repeats
// the first; a rank outside of the group gives NaN twice.
void magnitude_select(const Selection& selection, void* stream);

}  // namespace feather::cuda
