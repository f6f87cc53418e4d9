// Kernels of selection: the keys of scores, and the scan of an array for a bracket of keys.
//
// Compiled once for each instruction set; kernels_elementwise.cpp says what that forbids.
#include "cpu/kernels.h"
#include "feather/math.h"

namespace feather {
namespace FEATHER_ISA {
namespace {

// The key of a score, not clamped: a NaN gives any key from kNanKey on.
template <class W, bool kScaled>
FEATHER_HOST_DEVICE Key<Compute<W>> score_key(W w, Compute<W> scale) {
  using T = Compute<W>;
  const T a = magnitude(load<T>(w));
  return magnitude_key(kScaled ? a * scale : a);
}

constexpr int64_t kBlock = 256;  // elements that are counted before any is collected: most blocks have none inside

// Writes the keys of a block that lie inside the bracket to the buffer and returns how many; may write one key more. A
// vector loop flags them, so that the scalar loop can skip eight elements at a time.
template <class W, bool kScaled>
int64_t collect(const W* w, int64_t n, Compute<W> scale, Key<Compute<W>> low, Key<Compute<W>> high,
                Key<Compute<W>>* buffer) {
  using T = Compute<W>;
  constexpr int64_t kWord = sizeof(uint64_t);
  uint8_t flags[kBlock] = {};
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Key<T> key = score_key<W, kScaled>(w[i], scale);
    flags[i] = static_cast<uint8_t>((key >= low ? 1 : 0) & (key <= high ? 1 : 0));
  }
  int64_t found = 0;
  for (int64_t start = 0; start < n; start += kWord) {
    uint64_t word;
    memcpy(&word, flags + start, sizeof(word));
    if (word == 0) continue;
    for (int64_t i = start; i < start + kWord && i < n; ++i) {
      buffer[found] = clamp_nan<T>(score_key<W, kScaled>(w[i], scale));
      found += flags[i];
    }
  }
  return found;
}

template <class W, bool kScaled>
BracketCount scan_bracket_kernel(const void* w_data, int64_t n, double scale_wide, uint64_t low_wide,
                                 uint64_t high_wide, void* buffer_data, int64_t capacity) {
  using T = Compute<W>;
  const W* w = static_cast<const W*>(w_data);
  const T scale = static_cast<T>(scale_wide);
  Key<T>* buffer = static_cast<Key<T>*>(buffer_data);
  const Key<T> low = static_cast<Key<T>>(low_wide);
  const Key<T> high = static_cast<Key<T>>(high_wide >= FloatFormat<T>::kNanKey ? ~Key<T>(0) : high_wide);
  BracketCount count{0, 0, false};
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = n - start < kBlock ? n : start + kBlock;
    int32_t below = 0;
    int32_t up_to_high = 0;
#pragma omp simd reduction(+ : below, up_to_high)
    for (int64_t i = start; i < end; ++i) {
      const Key<T> key = score_key<W, kScaled>(w[i], scale);
      below += key < low ? 1 : 0;
      up_to_high += key <= high ? 1 : 0;
    }
    count.below += below;
    if (up_to_high == below) continue;
    if (count.inside + up_to_high - below > capacity) {
      count.overflow = true;
      return count;
    }
    count.inside += collect<W, kScaled>(w + start, end - start, scale, low, high, buffer + count.inside);
  }
  return count;
}

template <class W, bool kScaled>
void keys_kernel(const void* w_data, int64_t n, double scale_wide, void* keys_data) {
  using T = Compute<W>;
  const W* w = static_cast<const W*>(w_data);
  Key<T>* keys = static_cast<Key<T>*>(keys_data);
  const T scale = static_cast<T>(scale_wide);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) keys[i] = clamp_nan<T>(score_key<W, kScaled>(w[i], scale));
}

}  // namespace

void fill_selection(Kernels& kernels) {
  for_each_type([&](auto weight, int w) {
    using W = decltype(weight);
    kernels.scan_bracket[w][0] = scan_bracket_kernel<W, false>;
    kernels.scan_bracket[w][1] = scan_bracket_kernel<W, true>;
    kernels.keys[w][0] = keys_kernel<W, false>;
    kernels.keys[w][1] = keys_kernel<W, true>;
  });
}

}  // namespace FEATHER_ISA
}  // namespace feather
