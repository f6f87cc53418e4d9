// The ops magnitude_select and magnitude_histogram: argument checks, scratch memory, launches.
//
// A selection tries the bracket around its hint, if it has one, and then makes radix passes, which exit at once for the
// groups that the bracket has settled. The host does not wait in between.
#include <iterator>

#include "cuda/bracket_select.cuh"
#include "cuda/chunk_table.cuh"
#include "cuda/ops.h"
#include "cuda/radix_select.cuh"
#include "feather/check.h"

namespace feather::cuda {
namespace {

// Bits of the digit of each pass, the most significant first; together the bits of a key.
constexpr int kNarrowPasses[] = {11, 10, 10};
constexpr int kWidePasses[] = {11, 11, 11, 10, 10, 10};
static_assert(*(std::end(kNarrowPasses) - 1) == kDigitBits - 1 && *(std::end(kWidePasses) - 1) == kDigitBits - 1,
              "the kernel of the last pass takes kDigitBits - 1 bits");
constexpr int kScanBins = 1 << kDigitBits;

// Adds the digits of all arrays to counts.
void count_digits(const char* op, const std::vector<ChunkTable>& tables, const void* scales, const int64_t* prefixes,
                  int shift, int bits, int64_t* counts, void* stream) {
  for (const ChunkTable& table : tables) {
    with_storage_type(table.dtype, [&](auto weight) {
      using W = decltype(weight);
      launch(op, table.count, stream, histogram_kernel<W>, table.entries, static_cast<const Compute<W>*>(scales),
             prefixes, shift, bits, counts);
    });
  }
}

// The parts of a selection's scratch memory.
struct Scratch {
  int64_t *keys, *sizes, *prefixes, *below, *counts;       // see ScanArguments
  int64_t *bracket_below, *bracket_counts, *bracket_sums;  // see BracketEndArguments
  int64_t bins;                                            // keys of a group's bracket; 0 if none is tried
  int64_t size;                                            // int64 numbers of all parts

  explicit Scratch(const Selection& s) {
    const bool bracket = s.hint != nullptr && s.caps == nullptr && !s.wide;
    bins = bracket ? bracket_keys(s.groups, s.all_elements) : 0;
    size = 0;
    const auto take = [&](int64_t count) {
      const uintptr_t begin = reinterpret_cast<uintptr_t>(s.scratch) + static_cast<uintptr_t>(size) * sizeof(int64_t);
      size += count;
      return reinterpret_cast<int64_t*>(begin);
    };
    keys = take(2 * s.groups);
    sizes = take(s.groups);
    prefixes = take(s.rows);
    below = take(s.rows);
    counts = take(s.rows * kScanBins);
    bracket_below = take(s.groups);
    bracket_counts = take(s.groups * bins);
    bracket_sums = take(s.groups * bins / kBracketRow);
  }
};

constexpr const char* kSelect = "magnitude_select";

// Settles the groups whose result lies in the bracket around their hint.
void try_bracket(const Selection& s, const Scratch& scratch, void* stream) {
  const auto hint = static_cast<const float*>(s.hint);
  const int bins = static_cast<int>(scratch.bins);
  for (const ChunkTable& table : s.tables) {
    with_storage_type(table.dtype, [&](auto weight) {
      using W = decltype(weight);
      if constexpr (sizeof(W) < sizeof(double)) {
        launch(kSelect, table.count, stream, bracket_kernel<W>, table.entries, static_cast<const float*>(s.scales),
               hint, scratch.bracket_below, scratch.bracket_counts, bins);
      }
    });
  }
  launch(kSelect, s.groups * bins / kBracketRow, stream, bracket_sum_kernel, scratch.bracket_counts,
         scratch.bracket_sums);
  const BracketEndArguments end{
      s.rank, s.elements,       hint,        scratch.bracket_below, scratch.bracket_counts, scratch.bracket_sums,
      bins,   scratch.prefixes, scratch.keys};
  launch(kSelect, s.groups, stream, bracket_end_kernel, end);
}

// Selects for the groups that are not settled, and writes the results of all.
template <class T>
void select(const Selection& s, const Scratch& scratch, void* stream) {
  const ScanArguments scan{s.rank,           s.row_starts,  s.array_of_row, s.caps,      scratch.counts,
                           scratch.prefixes, scratch.below, scratch.sizes,  scratch.keys};
  const auto nan_key = static_cast<int64_t>(FloatFormat<T>::kNanKey);
  const int* begin = sizeof(T) == sizeof(double) ? std::begin(kWidePasses) : std::begin(kNarrowPasses);
  const int* end = sizeof(T) == sizeof(double) ? std::end(kWidePasses) : std::end(kNarrowPasses);
  int shift = FloatFormat<T>::kKeyBits;
  for (const int* bits = begin; bits != end; ++bits) {
    shift -= *bits;
    count_digits(kSelect, s.tables, s.scales, scratch.prefixes, shift, *bits, scratch.counts, stream);
    const auto inner = *bits == kDigitBits ? scan_kernel<kDigitBits, false> : scan_kernel<kDigitBits - 1, false>;
    launch(kSelect, s.groups, stream, shift == 0 ? scan_kernel<kDigitBits - 1, true> : inner, scan, bits == begin,
           nan_key);
  }
  for (const ChunkTable& table : s.tables) {
    with_storage_type(table.dtype, [&](auto weight) {
      using W = decltype(weight);
      launch(kSelect, table.count, stream, smallest_above_kernel<W>, table.entries,
             static_cast<const Compute<W>*>(s.scales), scratch.prefixes, s.group_of_row, scratch.keys);
    });
  }
  const int64_t values = 2 * s.groups;
  launch(kSelect, (values + kThreads - 1) / kThreads, stream, value_kernel<T>, scratch.keys, static_cast<T*>(s.out),
         values);
}

}  // namespace

void magnitude_histogram(const std::vector<ChunkTable>& tables, const void* scales, const int64_t* prefixes, int shift,
                         int bits, int64_t* counts, void* stream) {
  FEATHER_CHECK(bits >= 1 && bits <= 16 && shift >= 0 && shift + bits <= FloatFormat<double>::kKeyBits,
                "bits must be in [1, 16] and shift in [0, 63 - bits], got bits=", bits, " shift=", shift);
  count_digits("magnitude_histogram", tables, scales, prefixes, shift, bits, counts, stream);
}

int64_t scratch_size(const Selection& selection) { return Scratch(selection).size; }

void magnitude_select(const Selection& selection, void* stream) {
  if (selection.groups <= 0) return;
  const Scratch scratch(selection);
  if (scratch.bins > 0) try_bracket(selection, scratch, stream);
  if (selection.wide) {
    select<double>(selection, scratch, stream);
  } else {
    select<float>(selection, scratch, stream);
  }
}

}  // namespace feather::cuda
