// The op magnitude_select: exact order statistics of magnitudes, usually from a single read of the weights.
//
// 1. Guess a bracket of keys that holds the answer: around the hint (the result of an earlier step); for few elements,
//    the whole range; otherwise from the order statistics of a sample.
// 2. Scan the weights once: count the keys below the bracket and collect the few inside. The answer is an order
//    statistic of those.
// 3. If the answer lies outside, or too many keys lie inside, try the next kind of bracket, and finally radix passes.
//
// A wrong bracket costs time and never changes the result. Groups are handled one after the other, so that one buffer
// of kBufferBytes serves them all.
#include <algorithm>
#include <cmath>
#include <memory>

#include "cpu/radix_select.h"
#include "cpu/selection_groups.h"

namespace feather {
namespace {

constexpr int64_t kBufferBytes = 3 << 20;         // of the keys that a scan collects
constexpr int64_t kCollectAll = 1 << 15;          // elements up to which all keys are collected
constexpr double kDeviations = 4.0;               // half the width of a sample's bracket, in standard deviations
constexpr int64_t kHintWidth = 1 << 13;           // float keys on either side of a hint: 2^-11 to 2^-10 of its value
constexpr int64_t kHintReach = int64_t{1} << 26;  // elements from which the bracket of a hint narrows

// The keys from low to high, both included.
template <class T>
struct Bracket {
  Key<T> low;
  Key<T> high;
};

// Selects from one group. `buffer` has room for kCapacity keys.
template <class T>
class GroupSelector {
 public:
  GroupSelector(const Group& group, int64_t rank, int threads, Key<T>* buffer)
      : group_(group), rank_(rank), size_(group.size()), threads_(threads), buffer_(buffer) {}

  // Writes the rank-th key and the next to found.
  void find(const T* hint, Key<T> found[2]) {
    const int64_t elements = group_.elements();
    if (elements <= kCollectAll) {
      if (search(Bracket<T>{0, FloatFormat<T>::kNanKey}, found)) return;
    } else {
      if (hint != nullptr && hint[0] > 0 && hint[1] >= hint[0] && search(around(hint, elements), found)) return;
      if (search(from_sample(elements), found)) return;
    }
    select_by_radix<T>(group_, rank_, threads_, found);
  }

  // One scan: counts the keys below the bracket and leaves those inside at the front of the buffer. False if they do
  // not fit.
  bool collect_all(Bracket<T> bracket, int64_t& below, int64_t& inside) {
    for (const Row& row : group_.rows) {
      int64_t row_inside = 0;
      if (!collect(row, bracket, inside, below, row_inside)) return false;
      inside += row_inside;
    }
    return true;
  }

 private:
  static constexpr int64_t kCapacity = kBufferBytes / static_cast<int64_t>(sizeof(Key<T>));

  // The bracket around a hint, narrower for more elements.
  static Bracket<T> around(const T* hint, int64_t elements) {
    constexpr int kMoreBits = FloatFormat<T>::kMantissa - FloatFormat<float>::kMantissa;
    Key<T> width = static_cast<Key<T>>(kHintWidth) << kMoreBits;
    if (elements > kHintReach) width /= static_cast<Key<T>>(elements / kHintReach + 1);
    const Key<T> low = clamp_nan<T>(magnitude_key(hint[0]));
    return Bracket<T>{low > width ? low - width : 0, clamp_nan<T>(magnitude_key(hint[1]) + width)};
  }

  // Scans all rows. False if the bracket does not hold both order statistics, or holds too many keys.
  bool search(Bracket<T> bracket, Key<T> found[2]) {
    int64_t below = 0;
    int64_t kept = 0;
    for (const Row& row : group_.rows) {
      int64_t row_below = 0;
      int64_t inside = 0;
      if (!collect(row, bracket, kept, row_below, inside)) return false;
      below += std::min(row_below, row.cap);
      kept += keep_smallest(kept, inside, row.cap - row_below);
    }
    const bool has_next = rank_ + 1 < size_;
    if (rank_ < below || rank_ + (has_next ? 1 : 0) >= below + kept) return false;
    Key<T>* const first = buffer_ + (rank_ - below);
    Key<T>* const end = buffer_ + kept;
    std::nth_element(buffer_, first, end);
    found[0] = *first;
    found[1] = has_next ? *std::min_element(first + 1, end) : found[0];
    return true;
  }

  // Scans a row: writes the keys inside the bracket to the buffer from `start` on and adds up those below and inside.
  // Each thread has a part of the buffer; the parts are closed up afterwards. False if one overflows.
  bool collect(const Row& row, Bracket<T> bracket, int64_t start, int64_t& below, int64_t& inside) {
    const int parts = usable_threads(threads_, row.n, kParallel);
    const int64_t room = (kCapacity - start) / parts;
    if (room < 1) return false;
    std::vector<BracketCount> counts(static_cast<size_t>(parts));
    const Kernels& table = kernels();
    run_on_threads(parts, [&](int part) {
      BracketCount mine{0, 0, false};
      Key<T>* keys = buffer_ + start + part * room;
      for_each_piece(row.arrays, part_of(row.n, part, parts), [&](size_t index, const void* data, int64_t n) {
        if (mine.overflow) return;
        const auto scan = table.scan_bracket[index_of(row.arrays[index].dtype)][row.scaled()];
        const BracketCount piece =
            scan(data, n, row.scale(index), bracket.low, bracket.high, keys + mine.inside, room - 1 - mine.inside);
        mine.below += piece.below;
        mine.inside += piece.inside;
        mine.overflow = piece.overflow;
      });
      counts[static_cast<size_t>(part)] = mine;
    });
    for (int part = 0; part < parts; ++part) {
      const BracketCount& mine = counts[static_cast<size_t>(part)];
      if (mine.overflow) return false;
      const Key<T>* from = buffer_ + start + part * room;
      std::copy(from, from + mine.inside, buffer_ + start + inside);
      below += mine.below;
      inside += mine.inside;
    }
    return true;
  }

  // Moves the `wanted` smallest of the `inside` keys at `start` to the front. Returns how many are kept.
  int64_t keep_smallest(int64_t start, int64_t inside, int64_t wanted) {
    if (wanted >= inside) return inside;
    if (wanted <= 0) return 0;
    Key<T>* const first = buffer_ + start;
    std::nth_element(first, first + wanted, first + inside);
    return wanted;
  }

  // A bracket from a sample spread evenly over every row. It misses the answer in one case of 10^4.
  Bracket<T> from_sample(int64_t elements) {
    // Sampling so many takes as long as collecting those inside the bracket that they give.
    const double ideal = 1.5 * std::pow(static_cast<double>(elements), 2.0 / 3.0);
    const int64_t wanted = std::min(static_cast<int64_t>(ideal), kCapacity / 4);
    int64_t kept = 0;
    for (const Row& row : group_.rows) {
      const double share = static_cast<double>(row.n) / static_cast<double>(elements);
      const int64_t count = std::min(row.n, static_cast<int64_t>(share * static_cast<double>(wanted)) + 1);
      if (kept + count > kCapacity) return Bracket<T>{0, FloatFormat<T>::kNanKey};
      sample(row, kept, count);
      const double part = row.n > 0 ? static_cast<double>(row.cap) / static_cast<double>(row.n) : 0.0;
      kept += keep_smallest(kept, count, std::llround(part * static_cast<double>(count)));
    }
    const double fraction = static_cast<double>(rank_) / static_cast<double>(size_);
    const double spread = kDeviations * std::sqrt(static_cast<double>(kept) * fraction * (1 - fraction)) + 2;
    const auto low = static_cast<int64_t>(fraction * static_cast<double>(kept) - spread);
    const auto high = static_cast<int64_t>(fraction * static_cast<double>(kept) + spread) + 1;
    Bracket<T> bracket{0, FloatFormat<T>::kNanKey};
    Key<T>* const begin = buffer_;
    if (high < kept) {
      std::nth_element(begin, begin + high, begin + kept);
      bracket.high = begin[high];
    }
    if (low > 0 && low < kept) {
      std::nth_element(begin, begin + low, begin + std::min(high, kept));
      bracket.low = begin[low];
    }
    return bracket;
  }

  // Writes `count` keys of a row to the buffer from `start` on: one from each of as many equal stretches, at a position
  // hashed from the number of the stretch, so that the sample cannot be in step with a period of the weights.
  void sample(const Row& row, int64_t start, int64_t count) {
    if (count == 0) return;
    const int parts = usable_threads(threads_, count, 1024);
    const Kernels& table = kernels();
    run_on_threads(parts, [&](int part) {
      const Range range = part_of(count, part, parts);
      size_t index = 0;
      int64_t passed = 0;  // elements of the arrays before arrays[index]
      for (int64_t i = range.begin; i < range.end; ++i) {
        const int64_t begin = i * row.n / count;  // i and count are below 2^20
        const int64_t length = (i + 1) * row.n / count - begin;
        const uint64_t hash = static_cast<uint64_t>(i + 1) * 0x9E3779B97F4A7C15ull >> 20;
        const int64_t position = begin + static_cast<int64_t>(hash % static_cast<uint64_t>(length));
        while (position - passed >= row.arrays[index].n) passed += row.arrays[index++].n;
        const Array& array = row.arrays[index];
        const auto key = table.keys[index_of(array.dtype)][row.scaled()];
        key(at(array.data, position - passed, array.dtype), 1, row.scale(index), buffer_ + start + i);
      }
    });
  }

  const Group& group_;
  int64_t rank_;
  int64_t size_;
  int threads_;
  Key<T>* buffer_;
};

template <class T>
void collect_groups(const std::vector<Group>& groups, const int64_t* low, const int64_t* high, const KeysInside& out,
                    int threads) {
  const std::unique_ptr<Key<T>[]> buffer(new Key<T>[static_cast<size_t>(kBufferBytes) / sizeof(Key<T>)]);
  int64_t written = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    out.below[g] = out.inside[g] = 0;
    if (low[g] > high[g]) continue;
    const Bracket<T> bracket{static_cast<Key<T>>(low[g]), static_cast<Key<T>>(high[g])};
    GroupSelector<T> selector(groups[g], 0, threads, buffer.get());
    const bool fits = selector.collect_all(bracket, out.below[g], out.inside[g]);
    if (!fits || written + out.inside[g] > out.capacity) {
      out.inside[g] = -1;
      continue;
    }
    std::copy(buffer.get(), buffer.get() + out.inside[g], out.keys + written);
    written += out.inside[g];
  }
}

template <class T>
void select_groups(const std::vector<Group>& groups, const int64_t* rank, const T* hint, T* out, int threads) {
  // A vector would zero the buffer; this way pages that no key reaches are never touched.
  const std::unique_ptr<Key<T>[]> buffer(new Key<T>[static_cast<size_t>(kBufferBytes) / sizeof(Key<T>)]);
  for (size_t g = 0; g < groups.size(); ++g) {
    Key<T> found[2] = {FloatFormat<T>::kNanKey, FloatFormat<T>::kNanKey};
    if (rank[g] >= 0 && rank[g] < groups[g].size()) {
      GroupSelector<T>(groups[g], rank[g], threads, buffer.get()).find(hint == nullptr ? nullptr : hint + 2 * g, found);
    }
    for (int i = 0; i < 2; ++i) out[2 * g + static_cast<size_t>(i)] = value_of_key<T>(found[i]);
  }
}

}  // namespace

void collect_keys(const Scores& scores, const int64_t* low, const int64_t* high, const KeysInside& out, int threads) {
  const std::vector<Group> groups = make_groups(scores);
  if (!scores.weights.empty() && is_wide(scores.weights[0].dtype)) {
    collect_groups<double>(groups, low, high, out, threads);
  } else {
    collect_groups<float>(groups, low, high, out, threads);
  }
}

void magnitude_select(const Scores& scores, const int64_t* rank, const void* hint, void* out, int threads) {
  const std::vector<Group> groups = make_groups(scores);
  if (!scores.weights.empty() && is_wide(scores.weights[0].dtype)) {
    select_groups(groups, rank, static_cast<const double*>(hint), static_cast<double*>(out), threads);
  } else {
    select_groups(groups, rank, static_cast<const float*>(hint), static_cast<float*>(out), threads);
  }
}

}  // namespace feather
