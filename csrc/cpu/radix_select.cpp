// Histograms of the digits of keys: the op magnitude_histogram, and the selection that is made of them.
#include "cpu/radix_select.h"

#include <algorithm>
#include <atomic>

namespace feather {
namespace {

constexpr int64_t kCountBytes = 2 << 20;  // for the histograms of all threads, which limits their number

// Bits of the digit of each pass, the most significant first; together the bits of a key.
template <class T>
struct Digits;
template <>
struct Digits<float> {
  static constexpr int kBits[] = {11, 10, 10};
};
template <>
struct Digits<double> {
  static constexpr int kBits[] = {11, 10, 10, 11, 11, 10};
};

// Where a key stands in a row.
template <class T>
struct Place {
  int64_t at_most;  // number of keys <= the key
  Key<T> next;      // the smallest key above it
};

template <class T>
Place<T> place_of(const Row& row, Key<T> key, int threads) {
  const int parts = usable_threads(threads, row.n, kParallel);
  std::vector<Place<T>> found(static_cast<size_t>(parts), Place<T>{0, FloatFormat<T>::kNanKey});
  run_on_threads(parts, [&](int part) {
    Place<T> mine{0, FloatFormat<T>::kNanKey};
    for_each_key_block<T>(row, part_of(row.n, part, parts), [&](const Key<T>* keys, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        mine.at_most += keys[i] <= key ? 1 : 0;
        mine.next = keys[i] > key && keys[i] < mine.next ? keys[i] : mine.next;
      }
    });
    found[static_cast<size_t>(part)] = mine;
  });
  Place<T> result{0, FloatFormat<T>::kNanKey};
  for (const Place<T>& part : found) {
    result.at_most += part.at_most;
    result.next = std::min(result.next, part.next);
  }
  return result;
}

// Of the keys of a row whose bits above shift + bits equal prefix, adds the number of those with digit d to counts[d],
// where the digit is the next `bits` bits. Returns how many keys have a smaller prefix.
template <class T>
int64_t add_digits(const Row& row, Key<T> prefix, int shift, int bits, int64_t* counts, int threads) {
  const int64_t bins = int64_t{1} << bits;
  const int64_t room = std::max<int64_t>(1, kCountBytes / (bins * static_cast<int64_t>(sizeof(int64_t))));
  const int parts = static_cast<int>(std::min<int64_t>(room, usable_threads(threads, row.n, kParallel)));
  std::vector<int64_t> found(static_cast<size_t>(parts * bins));
  std::atomic<int64_t> below{0};
  run_on_threads(parts, [&](int part) {
    int64_t* mine = found.data() + part * bins;
    int64_t smaller = 0;
    for_each_key_block<T>(row, part_of(row.n, part, parts), [&](const Key<T>* keys, int64_t n) {
      for (int64_t i = 0; i < n; ++i) {
        const Key<T> top = keys[i] >> shift >> bits;
        smaller += top < prefix ? 1 : 0;
        if (top == prefix) ++mine[(keys[i] >> shift) & static_cast<Key<T>>(bins - 1)];
      }
    });
    below.fetch_add(smaller, std::memory_order_relaxed);
  });
  for (int part = 0; part < parts; ++part) {
    for (int64_t bin = 0; bin < bins; ++bin) counts[bin] += found[static_cast<size_t>(part * bins + bin)];
  }
  return below.load(std::memory_order_relaxed);
}

}  // namespace

// The cumulative count of a group is the sum over its rows of min(cumulative count, cap): the cumulative count of the
// union of the `cap` smallest scores of each row.
template <class T>
void select_by_radix(const Group& group, int64_t rank, int threads, Key<T> found[2]) {
  Key<T> prefix = 0;
  int shift = FloatFormat<T>::kKeyBits;
  for (const int bits : Digits<T>::kBits) {
    shift -= bits;
    const size_t bins = size_t{1} << bits;
    std::vector<int64_t> up_to(bins);
    for (const Row& row : group.rows) {
      std::vector<int64_t> counts(bins);
      int64_t sum = add_digits<T>(row, prefix, shift, bits, counts.data(), threads);
      for (size_t bin = 0; bin < bins; ++bin) {
        sum += counts[bin];
        up_to[bin] += std::min(sum, row.cap);
      }
    }
    const auto digit = std::upper_bound(up_to.begin(), up_to.end(), rank) - up_to.begin();
    prefix = (prefix << bits) | static_cast<Key<T>>(std::min<int64_t>(digit, static_cast<int64_t>(bins) - 1));
  }
  int64_t at_most = 0;
  Key<T> next = FloatFormat<T>::kNanKey;
  for (const Row& row : group.rows) {
    const Place<T> mine = place_of<T>(row, prefix, threads);
    at_most += std::min(mine.at_most, row.cap);
    if (mine.at_most < row.cap) next = std::min(next, mine.next);
  }
  found[0] = prefix;
  found[1] = rank + 1 < at_most || rank + 1 >= group.size() ? prefix : next;
}

template void select_by_radix<float>(const Group&, int64_t, int, Key<float>[2]);
template void select_by_radix<double>(const Group&, int64_t, int, Key<double>[2]);

void magnitude_histogram(const Scores& scores, const int64_t* prefix, int shift, int bits, int64_t* out, int threads) {
  const std::vector<Group> groups = make_groups(scores);
  const bool wide = !scores.weights.empty() && is_wide(scores.weights[0].dtype);
  const int width = wide ? FloatFormat<double>::kKeyBits : FloatFormat<float>::kKeyBits;
  FEATHER_CHECK(bits >= 1 && bits <= 16 && shift >= 0 && shift <= width - bits,
                "bits must be in [1, 16] and shift in [0, ", width, " - bits], got bits=", bits, " shift=", shift);
  const int64_t bins = int64_t{1} << bits;
  std::fill(out, out + scores.group_count * bins, int64_t{0});
  for (size_t g = 0; g < groups.size(); ++g) {
    for (const Row& row : groups[g].rows) {
      int64_t* counts = out + static_cast<int64_t>(g) * bins;
      if (prefix[g] < 0 || static_cast<uint64_t>(prefix[g]) >> (width - shift - bits) != 0) continue;
      if (wide) {
        add_digits<double>(row, static_cast<Key<double>>(prefix[g]), shift, bits, counts, threads);
      } else {
        add_digits<float>(row, static_cast<Key<float>>(prefix[g]), shift, bits, counts, threads);
      }
    }
  }
}

}  // namespace feather
