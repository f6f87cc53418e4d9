// Launches of the ops over lists of arrays: selection, histograms, counts.
#include <algorithm>
#include <iterator>

#include "cuda/bracket_select.cuh"
#include "cuda/count.cuh"
#include "cuda/radix_select.cuh"
#include "feather/check.h"

namespace feather::cuda {
namespace {

// Bits of the passes, most significant first: 31 and 63 together.
constexpr int kNarrowPasses[] = {11, 10, 10};
constexpr int kWidePasses[] = {11, 11, 11, 10, 10, 10};
static_assert(*(std::end(kNarrowPasses) - 1) == kDigitBits - 1 && *(std::end(kWidePasses) - 1) == kDigitBits - 1,
              "the last pass has a kernel of its own");
constexpr int kScanBins = 1 << kDigitBits;

// Calls f with a value of the storage type of the chunks, or throws.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(Half());
    case DType::kBFloat16:
      return f(BFloat16());
    case DType::kFloat32:
      return f(float());
    case DType::kFloat64:
      return f(double());
  }
  fail("dtype code of chunks must be in [0, ", kDTypes, "), got ", static_cast<int>(dtype));
}

void count_digits(const char* op, const std::vector<Chunks>& all, const void* scales, const int64_t* prefixes,
                  int shift, int bits, int64_t* counts, void* stream) {
  for (const Chunks& chunks : all) {
    with_type(chunks.dtype, [&](auto weight) {
      using W = decltype(weight);
      launch(op, chunks.count, stream, histogram_kernel<W>, chunks.entries, static_cast<const Compute<W>*>(scales),
             prefixes, shift, bits, counts);
    });
  }
}

// The scratch memory of a selection, in int64.
struct Scratch {
  int64_t *keys, *sizes, *prefixes, *below, *counts;
  int64_t *bracket_below, *bracket_counts, *bracket_sums;
  int64_t bins;  // keys of a bracket; 0: none
  int64_t size;

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

void try_bracket(const Selection& s, const Scratch& scratch, void* stream) {
  const auto hint = static_cast<const float*>(s.hint);
  const int bins = static_cast<int>(scratch.bins);
  for (const Chunks& chunks : s.chunks) {
    with_type(chunks.dtype, [&](auto weight) {
      using W = decltype(weight);
      if constexpr (sizeof(W) < sizeof(double)) {
        launch(kSelect, chunks.count, stream, bracket_kernel<W>, chunks.entries, static_cast<const float*>(s.scales),
               hint, scratch.bracket_below, scratch.bracket_counts, bins);
      }
    });
  }
  launch(kSelect, s.groups * bins / kBracketRow, stream, bracket_sum_kernel, scratch.bracket_counts,
         scratch.bracket_sums);
  const BracketEnd end{
      s.rank, s.elements,       hint,        scratch.bracket_below, scratch.bracket_counts, scratch.bracket_sums,
      bins,   scratch.prefixes, scratch.keys};
  launch(kSelect, s.groups, stream, bracket_end_kernel, end);
}

template <class T>
void select(const Selection& s, const Scratch& scratch, void* stream) {
  const Scan scan{s.rank,           s.row_starts,  s.array_of_row, s.caps,      scratch.counts,
                  scratch.prefixes, scratch.below, scratch.sizes,  scratch.keys};
  const auto nan_key = static_cast<int64_t>(FloatFormat<T>::kNanKey);
  const int* begin = sizeof(T) == sizeof(double) ? std::begin(kWidePasses) : std::begin(kNarrowPasses);
  const int* end = sizeof(T) == sizeof(double) ? std::end(kWidePasses) : std::end(kNarrowPasses);
  int shift = sizeof(T) == sizeof(double) ? 63 : 31;
  for (const int* bits = begin; bits != end; ++bits) {
    shift -= *bits;
    count_digits(kSelect, s.chunks, s.scales, scratch.prefixes, shift, *bits, scratch.counts, stream);
    const auto inner = *bits == kDigitBits ? scan_kernel<kDigitBits, false> : scan_kernel<kDigitBits - 1, false>;
    launch(kSelect, s.groups, stream, shift == 0 ? scan_kernel<kDigitBits - 1, true> : inner, scan, bits == begin,
           nan_key);
  }
  for (const Chunks& chunks : s.chunks) {
    with_type(chunks.dtype, [&](auto weight) {
      using W = decltype(weight);
      launch(kSelect, chunks.count, stream, smallest_above_kernel<W>, chunks.entries,
             static_cast<const Compute<W>*>(s.scales), scratch.prefixes, s.group_of_row, scratch.keys);
    });
  }
  const int64_t values = 2 * s.groups;
  launch(kSelect, (values + kThreads - 1) / kThreads, stream, value_kernel<T>, scratch.keys, static_cast<T*>(s.out),
         values);
}

}  // namespace

void count_pruned(const std::vector<Chunks>& all, const void* thresholds, bool wide, int64_t* counts, void* stream) {
  for (const Chunks& chunks : all) {
    with_type(chunks.dtype, [&](auto weight) {
      using W = decltype(weight);
      if (wide) {
        launch("count_pruned", chunks.count, stream, count_kernel<W, double>, chunks.entries,
               static_cast<const double*>(thresholds), counts);
      } else {
        launch("count_pruned", chunks.count, stream, count_kernel<W, float>, chunks.entries,
               static_cast<const float*>(thresholds), counts);
      }
    });
  }
}

void magnitude_histogram(const std::vector<Chunks>& chunks, const void* scales, const int64_t* prefixes, int shift,
                         int bits, int64_t* counts, void* stream) {
  FEATHER_CHECK(bits >= 1 && bits <= 16 && shift >= 0 && shift + bits <= 63,
                "bits must be in [1, 16] and shift in [0, 63 - bits], got bits=", bits, " shift=", shift);
  count_digits("magnitude_histogram", chunks, scales, prefixes, shift, bits, counts, stream);
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
