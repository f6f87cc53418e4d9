// magnitude_select against sorting, bit for bit; histograms and counts against plain loops.
#include <string.h>

#include <algorithm>

#include "cuda/ops.h"
#include "tests/cuda/arrays.h"
#include "tests/cuda/tests.h"

namespace feather {
namespace {

// A list of arrays of any dtypes and its chunk tables. Chunks are small, so that few elements make many blocks.
class List {
 public:
  explicit List(bool wide) : wide_(wide) {}

  template <class W>
  void add(const Array<W>& w, int64_t group) {
    const double scale = 0.5 + 0.25 * static_cast<double>(members_.size() % 3);
    Member member{w.data(), w.size(), dtype_of<W>(), group, scale, {}, {}};
    for (int64_t i = 0; i < w.size(); ++i) {
      member.scores.push_back(key_of(value_of(w[i]), 1));
      member.scaled.push_back(key_of(value_of(w[i]), scale));
    }
    members_.push_back(member);
  }

  struct Member {
    const void* data;
    int64_t n;
    DType dtype;
    int64_t group;
    double scale;
    std::vector<uint64_t> scores, scaled;  // as keys
  };

  bool wide() const { return wide_; }
  const std::vector<Member>& members() const { return members_; }
  std::vector<uint64_t> keys(size_t index, bool scaled) const {
    return scaled ? members_[index].scaled : members_[index].scores;
  }

  // The chunk tables, given the row of each member. `memory` will hold the entries.
  std::vector<cuda::ChunkTable> chunks(const std::vector<int64_t>& rows,
                                       std::vector<std::vector<int64_t>>& memory) const {
    constexpr int64_t kLength = 700;
    const int64_t bytes[] = {2, 2, 4, 8};
    memory.assign(kDTypes, {});
    for (size_t index = 0; index < members_.size(); ++index) {
      const Member& m = members_[index];
      const int code = static_cast<int>(m.dtype);
      for (int64_t start = 0; start < m.n; start += kLength) {
        const auto address = reinterpret_cast<int64_t>(m.data) + start * bytes[code];
        const int64_t entry[] = {address, std::min(kLength, m.n - start), 0, rows[index], static_cast<int64_t>(index)};
        memory[static_cast<size_t>(code)].insert(memory[static_cast<size_t>(code)].end(), entry, entry + 5);
      }
    }
    std::vector<cuda::ChunkTable> all;
    for (int code = 0; code < kDTypes; ++code) {
      const auto& entries = memory[static_cast<size_t>(code)];
      const auto count = static_cast<int64_t>(entries.size()) / cuda::kChunkColumns;
      if (count > 0) all.push_back({entries.data(), count, static_cast<DType>(code)});
    }
    return all;
  }

  // The scales of all members, in the compute type.
  std::vector<char> scales() const {
    std::vector<char> bytes;
    for (const Member& m : members_) {
      const auto narrow = static_cast<float>(m.scale);
      const char* from = wide_ ? reinterpret_cast<const char*>(&m.scale) : reinterpret_cast<const char*>(&narrow);
      bytes.insert(bytes.end(), from, from + (wide_ ? 8 : 4));
    }
    return bytes;
  }

 private:
  uint64_t key_of(double value, double scale) const {
    if (std::isnan(value * scale)) return wide_ ? FloatFormat<double>::kNanKey : FloatFormat<float>::kNanKey;
    if (wide_) return bits_of(std::fabs(value * scale));
    return bits_of(std::fabs(static_cast<float>(value) * static_cast<float>(scale)));
  }

  bool wide_;
  std::vector<Member> members_;
};

// The keys of v[rank] and v[rank + 1], found by sorting.
std::pair<uint64_t, uint64_t> sorted(const List& list, int64_t group, int64_t rank, bool scaled,
                                     const std::vector<int64_t>* caps) {
  const uint64_t nan = list.wide() ? FloatFormat<double>::kNanKey : FloatFormat<float>::kNanKey;
  std::vector<uint64_t> all;
  for (size_t l = 0; l < list.members().size(); ++l) {
    if (list.members()[l].group != group) continue;
    std::vector<uint64_t> keys = list.keys(l, scaled);
    std::sort(keys.begin(), keys.end());
    if (caps != nullptr) keys.resize(static_cast<size_t>(std::min((*caps)[l], static_cast<int64_t>(keys.size()))));
    all.insert(all.end(), keys.begin(), keys.end());
  }
  std::sort(all.begin(), all.end());
  const auto size = static_cast<int64_t>(all.size());
  if (rank < 0 || rank >= size) return {nan, nan};
  return {all[static_cast<size_t>(rank)], all[static_cast<size_t>(std::min(rank + 1, size - 1))]};
}

template <class T>
void check_select(const char* name, const List& list, const std::vector<int64_t>& rank, bool scaled,
                  const std::vector<int64_t>* caps, const std::vector<T>* hint, int64_t all_elements = 0) {
  const auto groups = static_cast<int64_t>(rank.size());
  std::vector<int64_t> rows, starts{0}, group_of_row, array_of_row, elements(rank.size());
  rows.resize(list.members().size());
  for (int64_t g = 0; g < groups; ++g) {
    for (size_t l = 0; l < rows.size(); ++l) {
      if (list.members()[l].group != g) continue;
      elements[static_cast<size_t>(g)] += list.members()[l].n;
      rows[l] = caps == nullptr ? g : static_cast<int64_t>(group_of_row.size());
      if (caps != nullptr) group_of_row.push_back(g), array_of_row.push_back(static_cast<int64_t>(l));
    }
    if (caps == nullptr) group_of_row.push_back(g);
    starts.push_back(static_cast<int64_t>(group_of_row.size()));
  }
  std::vector<std::vector<int64_t>> memory;
  const std::vector<char> scales = list.scales();
  std::vector<T> out(2 * rank.size());
  cuda::Selection s{list.chunks(rows, memory),
                    list.wide(),
                    groups,
                    static_cast<int64_t>(group_of_row.size()),
                    all_elements,
                    rank.data(),
                    starts.data(),
                    group_of_row.data(),
                    array_of_row.data(),
                    elements.data(),
                    scaled ? scales.data() : nullptr,
                    caps == nullptr ? nullptr : caps->data(),
                    hint == nullptr ? nullptr : hint->data(),
                    nullptr,
                    out.data()};
  std::vector<int64_t> scratch(static_cast<size_t>(cuda::scratch_size(s)));
  s.scratch = scratch.data();
  cuda::magnitude_select(s, nullptr);
  for (int64_t g = 0; g < groups; ++g) {
    const auto i = static_cast<size_t>(g);
    const auto [low, high] = sorted(list, g, rank[i], scaled, caps);
    const uint64_t keys[] = {clamp_nan<T>(magnitude_key(out[2 * i])), clamp_nan<T>(magnitude_key(out[2 * i + 1]))};
    expect(keys[0] == low && keys[1] == high, "select %s: group %ld rank %ld hint %d: %lx %lx instead of %lx %lx", name,
           g, rank[i], hint != nullptr, keys[0], keys[1], low, high);
  }
}

constexpr int64_t kMany = int64_t{1} << 40;  // claiming so many elements gives the widest brackets

// Selects from a list of one group in every way.
template <class T>
void check_list(const char* name, const List& list) {
  int64_t n = 0;
  for (const auto& member : list.members()) n += member.n;
  std::vector<int64_t> caps;
  for (size_t l = 0; l < list.members().size(); ++l) caps.push_back(list.members()[l].n * (l % 2 == 0 ? 1 : 2) / 2);
  for (const int64_t rank : {int64_t{-1}, int64_t{0}, n / 2, n - 2, n - 1, n}) {
    check_select<T>(name, list, {rank}, false, nullptr, nullptr);
  }
  const T value = value_of_key<T>(static_cast<Key<T>>(sorted(list, 0, n * 9 / 10, false, nullptr).first));
  for (const T hinted : {value, value * T(1.001), value * T(1.5), T(0)}) {  // exact, near, far, at the first key
    const std::vector<T> hint{hinted, hinted};
    for (const int64_t all_elements : {n, kMany}) {
      check_select<T>(name, list, {n * 9 / 10}, false, nullptr, &hint, all_elements);
    }
  }
  const T last = value_of_key<T>(static_cast<Key<T>>(sorted(list, 0, n - 1, false, nullptr).first));
  const std::vector<T> hint{last, last};
  check_select<T>(name, list, {n - 1}, false, nullptr, &hint);
  check_select<T>(name, list, {n * 9 / 10}, true, nullptr, nullptr);
  check_select<T>(name, list, {n / 3}, false, &caps, nullptr);
}

template <class W>
Array<W> random_array(int64_t n, int64_t offset, unsigned seed, bool coarse = false) {
  std::mt19937 chance(seed);
  std::normal_distribution<double> normal;
  Array<W> w(n, offset);
  for (int64_t i = 0; i < n; ++i) w[i] = stored<W>(coarse ? std::round(normal(chance) * 2) : normal(chance));
  return w;
}

template <class W>
void check_dtype() {
  using T = Compute<W>;
  const Array<W> aligned = random_array<W>(2003, 0, 1), misaligned = random_array<W>(801, 1, 2), special(60, 3);
  const Array<W> empty(0), one = random_array<W>(1, 0, 3), coarse = random_array<W>(900, 1, 4, true);
  fill(special, 0.5, 5);
  List list(sizeof(T) == 8), ties(sizeof(T) == 8), single(sizeof(T) == 8);
  list.add(aligned, 0), list.add(misaligned, 0), list.add(empty, 0), list.add(special, 0);
  check_list<T>(name_of<W>(), list);
  ties.add(coarse, 0);
  check_list<T>("ties", ties);
  single.add(one, 0);
  check_list<T>("one element", single);
}

}  // namespace

void test_select() {
  check_dtype<float>();
  check_dtype<BFloat16>();
  check_dtype<Half>();
  check_dtype<double>();
  const Array<float> wide = random_array<float>(900, 2, 11);
  const Array<BFloat16> brain = random_array<BFloat16>(777, 1, 12);
  const Array<Half> half = random_array<Half>(500, 1, 13);
  List mixed(false);
  mixed.add(wide, 0), mixed.add(brain, 0), mixed.add(half, 0);
  check_list<float>("mixed", mixed);
  List groups(false);  // group 1 is empty
  groups.add(wide, 2), groups.add(brain, 0), groups.add(half, 2);
  const std::vector<int64_t> rank{700, 0, 1300}, caps{900, 600, 450};
  const std::vector<float> hint{2, 2, 1, 1, NAN, NAN};
  check_select<float>("groups", groups, rank, false, nullptr, nullptr);
  check_select<float>("groups", groups, rank, false, nullptr, &hint, kMany);
  check_select<float>("groups", groups, {500, 0, 1349}, true, &caps, nullptr);
}

// Runs every kernel of selection once or twice, on little data.
void test_select_once() {
  const Array<float> w = random_array<float>(1500, 1, 41), ties = random_array<float>(600, 0, 42, true);
  const Array<double> wide = random_array<double>(900, 1, 43);
  List list(false), doubles(true);
  list.add(w, 0), list.add(ties, 0), doubles.add(wide, 0);
  const std::vector<float> near{1.25f, 1.25f};
  const std::vector<int64_t> caps{1200, 300};
  check_select<float>("with a hint", list, {1700}, false, nullptr, &near);
  check_select<float>("with caps", list, {1300}, true, &caps, nullptr);
  check_select<double>("of doubles", doubles, {800}, false, nullptr, nullptr);
}

void test_histogram() {
  const Array<float> w = random_array<float>(1500, 1, 21);
  const Array<Half> half = random_array<Half>(300, 1, 22);
  List list(false);
  list.add(w, 0), list.add(half, 1);
  for (const int bits : {1, 7, 11, 13}) {
    const int shift = 31 - bits - 3;
    std::vector<std::vector<int64_t>> memory;
    std::vector<int64_t> counts(size_t{2} << bits), wanted(counts.size());
    const std::vector<int64_t> prefixes{3, 3};  // of the 3 bits above
    for (size_t l = 0; l < 2; ++l) {
      for (const uint64_t key : list.keys(l, false)) {
        if (static_cast<int64_t>(key >> (shift + bits)) != prefixes[l]) continue;
        ++wanted[(l << bits) + ((key >> shift) & ((uint64_t{1} << bits) - 1))];
      }
    }
    cuda::magnitude_histogram(list.chunks({0, 1}, memory), nullptr, prefixes.data(), shift, bits, counts.data(),
                              nullptr);
    expect(counts == wanted, "histogram of %d bits", bits);
  }
}

void test_count() {
  const Array<float> w = random_array<float>(1500, 1, 31);
  const Array<BFloat16> brain = random_array<BFloat16>(777, 3, 32);
  const Array<double> wide = random_array<double>(300, 1, 33);
  List list(false);
  list.add(w, 0), list.add(brain, 1), list.add(wide, 2);
  std::vector<std::vector<int64_t>> memory;
  const std::vector<cuda::ChunkTable> chunks = list.chunks({0, 1, 2}, memory);
  for (const bool is_double : {false, true}) {
    const float narrow[] = {0.5f, 0.25f, -1.0f};
    const double thresholds[] = {0.5, 0.25, 0.1};
    std::vector<int64_t> counts(3), wanted(3);
    for (const float value : std::vector<float>(w.data(), w.data() + w.size())) wanted[0] += std::fabs(value) <= 0.5f;
    for (int64_t i = 0; i < brain.size(); ++i) wanted[1] += std::fabs(value_of(brain[i])) <= 0.25;
    for (int64_t i = 0; i < wide.size(); ++i) wanted[2] += is_double && std::fabs(wide[i]) <= 0.1;
    const void* bounds = is_double ? static_cast<const void*>(thresholds) : narrow;
    cuda::count_pruned(chunks, bounds, is_double, counts.data(), nullptr);
    expect(counts == wanted, "counts %ld %ld %ld", counts[0], counts[1], counts[2]);
  }
}

}  // namespace feather
