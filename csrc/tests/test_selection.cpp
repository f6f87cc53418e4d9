// Selection, histograms and the keys inside brackets against sorting. Selection takes every path: all keys collected,
// hint, sample, radix passes.
#include <algorithm>

#include "cpu/instruction_set.h"
#include "cpu/ops.h"
#include "feather/math.h"
#include "harness.h"
#include "samples.h"

namespace feather_tests {
namespace {

using namespace feather;

using Weights = std::vector<std::vector<float>>;

std::vector<Array> arrays_of(const Weights& weights) {
  std::vector<Array> arrays;
  for (const auto& w : weights) arrays.push_back(Array{w.data(), static_cast<int64_t>(w.size()), DType::kFloat32});
  return arrays;
}

std::vector<uint32_t> sorted_keys(const std::vector<float>& weights, float scale) {
  std::vector<uint32_t> keys;
  for (const float w : weights) keys.push_back(clamp_nan<float>(magnitude_key(std::fabs(w) * scale)));
  std::sort(keys.begin(), keys.end());
  return keys;
}

// The keys of the caps[l] smallest scores of each array together, sorted.
std::vector<uint32_t> expected_keys(const Weights& weights, const float* scales, const int64_t* caps) {
  std::vector<uint32_t> all;
  for (size_t l = 0; l < weights.size(); ++l) {
    const std::vector<uint32_t> keys = sorted_keys(weights[l], scales == nullptr ? 1.0f : scales[l]);
    const size_t cap = caps == nullptr ? keys.size() : std::min(keys.size(), static_cast<size_t>(caps[l]));
    all.insert(all.end(), keys.begin(), keys.begin() + static_cast<std::ptrdiff_t>(cap));
  }
  std::sort(all.begin(), all.end());
  return all;
}

void check(const Weights& weights, const float* scales, const int64_t* caps, const std::vector<float>& hint) {
  const std::vector<uint32_t> keys = expected_keys(weights, scales, caps);
  const auto size = static_cast<int64_t>(keys.size());
  const Scores scores{arrays_of(weights), std::vector<int64_t>(weights.size(), 0), 1, scales, caps};
  for (const std::string& name : available_instruction_sets()) {
    use_instruction_set(name);
    for (const int threads : {1, 3}) {
      for (const int64_t rank :
           {int64_t{-1}, int64_t{0}, size / 10, size / 2 - 1, size / 2, size * 98 / 100, size - 2, size - 1, size}) {
        float found[2] = {-1, -1};
        magnitude_select(scores, &rank, hint.empty() ? nullptr : hint.data(), found, threads);
        for (const int64_t i : {int64_t{0}, int64_t{1}}) {
          const bool inside = rank >= 0 && rank < size;
          const auto index = static_cast<size_t>(std::min(rank + i, size - 1));
          const uint32_t expected = inside ? keys[index] : FloatFormat<float>::kNanKey;
          const uint32_t key = clamp_nan<float>(magnitude_key(found[i]));
          CHECK(key == expected, name, " threads=", threads, " rank=", rank, "+", i, " of ", size, " gives ", found[i],
                " instead of ", value_of_key<float>(expected));
        }
      }
    }
  }
}

Weights normal_weights(std::initializer_list<size_t> sizes, uint32_t seed) {
  std::mt19937 generator(seed);
  Weights weights;
  for (const size_t n : sizes) {
    std::normal_distribution<float> distribution(0.0f, 0.02f * static_cast<float>(1 + weights.size()));
    weights.emplace_back(n);
    for (float& w : weights.back()) w = distribution(generator);
  }
  return weights;
}

void few_elements() {
  check(normal_weights({1}, 0), nullptr, nullptr, {});
  check(normal_weights({5, 0, 300, 1}, 1), nullptr, nullptr, {});
  check({weights_around(0.5f, 1000, 2), {kNan, kNan}}, nullptr, nullptr, {});
  check({std::vector<float>(100, -2.5f)}, nullptr, nullptr, {});
}

void sampled_bracket() {
  check(normal_weights({150000, 3, 70001}, 3), nullptr, nullptr, {});
  check({weights_around(0.5f, 90000, 4)}, nullptr, nullptr, {});
}

void hints_right_and_wrong() {
  const Weights weights = normal_weights({100000, 20000}, 5);
  const std::vector<uint32_t> keys = expected_keys(weights, nullptr, nullptr);
  const float middle = value_of_key<float>(keys[keys.size() / 2]);
  for (const std::vector<float>& hint : {std::vector<float>{middle, middle},
                                         {0.0f, 0.0f},
                                         {kNan, kNan},
                                         {1e9f, 1e9f},
                                         {2.0f, 1.0f},
                                         {0.0f, 1e9f},
                                         {-1.0f, -1.0f},
                                         {kInfinity, kInfinity}}) {
    check(weights, nullptr, nullptr, hint);
  }
}

// The wanted key is the last one in the bracket of the hint, and the next lies outside.
void neighbours_outside_the_bracket() {
  Weights weights = {std::vector<float>(50000, 0.25f), std::vector<float>(50000, 2.0f)};
  check(weights, nullptr, nullptr, {0.25f, 0.25f});  // tries rank 49,999 too
}

// Any bracket holds more keys than the buffer.
void ties_take_radix_passes() {
  Weights weights = {std::vector<float>(900000, 0.25f), std::vector<float>(400000, -0.5f)};
  weights[0][17] = 0.125f;
  weights[1][5] = kNan;
  check(weights, nullptr, nullptr, {});
  check(weights, nullptr, nullptr, {0.25f, 0.25f});
}

void caps_and_scales() {
  const std::vector<float> scales = {0.5f, 3.0f, 0.0f, 1.0f};
  const std::vector<int64_t> caps = {60000, 100, 0, 1000000};
  for (const auto& weights : {normal_weights({90000, 5000, 300, 0}, 6), normal_weights({40, 30, 20, 10}, 7)}) {
    check(weights, scales.data(), nullptr, {});
    check(weights, nullptr, caps.data(), {});
    check(weights, scales.data(), caps.data(), {0.02f, 0.02f});
  }
  Weights ties = {std::vector<float>(900000, 0.25f), std::vector<float>(1000, 0.25f), {0.1f, 0.3f}, {}};
  check(ties, nullptr, std::vector<int64_t>{850000, 10, 2, 0}.data(), {});
  ties = {std::vector<float>(900000, 0.25f), {10.0f}};
  ties[0].push_back(3.0f);  // beyond the cap, so not the key after the last 0.25
  check(ties, nullptr, std::vector<int64_t>{900000, 1}.data(), {});
}

void groups_are_independent() {
  const Weights weights = normal_weights({50000, 70, 40000, 9, 0}, 8);
  const std::vector<int64_t> groups = {1, 0, 1, 0, 2};
  const Scores scores{arrays_of(weights), groups, 3, nullptr, nullptr};
  const int64_t rank[3] = {30, 80000, 0};
  float found[6];
  magnitude_select(scores, rank, nullptr, found, 2);
  const std::vector<uint32_t> first = expected_keys({weights[1], weights[3]}, nullptr, nullptr);
  const std::vector<uint32_t> second = expected_keys({weights[0], weights[2]}, nullptr, nullptr);
  CHECK(magnitude_key(found[0]) == first[30] && magnitude_key(found[1]) == first[31], "group 0");
  CHECK(magnitude_key(found[2]) == second[80000] && magnitude_key(found[3]) == second[80001], "group 1");
  CHECK(std::isnan(found[4]) && std::isnan(found[5]), "an empty group");
}

void float64_and_16_bits() {
  std::vector<double> wide;
  std::vector<Half> halves;
  const Weights weights = normal_weights({100000}, 9);
  for (const float w : weights[0]) {
    wide.push_back(static_cast<double>(w) * (1 + 1e-12));
    halves.push_back(to_half(w));
  }
  const int64_t rank = 77777;
  for (const int threads : {1, 2}) {
    std::vector<double> sorted;
    for (const double w : wide) sorted.push_back(std::fabs(w));
    std::sort(sorted.begin(), sorted.end());
    double found[2];
    const Scores scores{{Array{wide.data(), 100000, DType::kFloat64}}, {0}, 1, nullptr, nullptr};
    magnitude_select(scores, &rank, nullptr, found, threads);
    CHECK(found[0] == sorted[77777] && found[1] == sorted[77778], "float64");
    const double hint[2] = {found[0], found[1]};
    magnitude_select(scores, &rank, hint, found, threads);
    CHECK(found[0] == sorted[77777] && found[1] == sorted[77778], "float64 with a hint");
    std::vector<float> narrow;
    for (const Half w : halves) narrow.push_back(std::fabs(to_float(w)));
    std::sort(narrow.begin(), narrow.end());
    float found_half[2];
    magnitude_select({{Array{halves.data(), 100000, DType::kFloat16}}, {0}, 1, nullptr, nullptr}, &rank, nullptr,
                     found_half, threads);
    CHECK(found_half[0] == narrow[77777] && found_half[1] == narrow[77778], "float16");
  }
}

void histograms() {
  const Weights weights = normal_weights({50000, 300, 0}, 10);
  const Scores scores{arrays_of(weights), {0, 1, 0}, 2, nullptr, nullptr};
  const int64_t no_prefix[2] = {0, 0};
  std::vector<int64_t> counts(2 << 11, -1);
  magnitude_histogram(scores, no_prefix, 20, 11, counts.data(), 3);
  std::vector<int64_t> expected(2 << 11, 0);
  for (size_t l = 0; l < 2; ++l) {
    for (const float w : weights[l]) ++expected[l * 2048 + (magnitude_key(w) >> 20)];
  }
  CHECK(counts == expected, "digits");
  const int64_t prefix[2] = {magnitude_key(weights[0][0]) >> 15, int64_t{1} << 40};
  std::vector<int64_t> deeper(2 << 10, -1);
  magnitude_histogram(scores, prefix, 5, 10, deeper.data(), 1);
  std::vector<int64_t> expected_deeper(2 << 10, 0);
  for (const float w : weights[0]) {
    if (magnitude_key(w) >> 15 == prefix[0]) ++expected_deeper[(magnitude_key(w) >> 5) & 1023];
  }
  CHECK(deeper == expected_deeper, "digits under a prefix");
  CHECK_REFUSED(magnitude_histogram(scores, prefix, 21, 11, counts.data(), 1), "bits must be in [1, 16]");
}

struct Collected {
  std::vector<int64_t> below, inside, keys;
};

Collected collect(const Scores& scores, const std::vector<int64_t>& low, const std::vector<int64_t>& high,
                  int64_t capacity, int threads) {
  Collected found{std::vector<int64_t>(low.size(), -7), std::vector<int64_t>(low.size(), -7),
                  std::vector<int64_t>(static_cast<size_t>(capacity) + 1, -7)};
  const KeysInside out{found.below.data(), found.inside.data(), found.keys.data(), capacity};
  collect_keys(scores, low.data(), high.data(), out, threads);
  CHECK(found.keys.back() == -7, "a key beyond the capacity of ", capacity);
  return found;
}

// The sorted keys of each group, and those from low to high.
void check_collected(const std::vector<std::vector<uint32_t>>& groups, const Scores& scores,
                     const std::vector<int64_t>& low, const std::vector<int64_t>& high, int64_t capacity) {
  for (const std::string& name : available_instruction_sets()) {
    use_instruction_set(name);
    for (const int threads : {1, 3}) {
      Collected found = collect(scores, low, high, capacity, threads);
      auto next = found.keys.begin();
      int64_t written = 0;
      for (size_t g = 0; g < groups.size(); ++g) {
        const bool wanted = low[g] <= high[g];
        const auto first = std::lower_bound(groups[g].begin(), groups[g].end(), low[g]);
        const auto last = wanted ? std::upper_bound(first, groups[g].end(), high[g]) : first;
        const auto inside = static_cast<int64_t>(last - first);
        const int64_t below = wanted ? static_cast<int64_t>(first - groups[g].begin()) : 0;
        const bool fits = written + inside <= capacity;
        CHECK(found.below[g] == below, name, " threads=", threads, " group ", g, " has ", found.below[g],
              " below, not ", below);
        CHECK(found.inside[g] == (fits ? inside : -1), name, " threads=", threads, " group ", g, " has ",
              found.inside[g], " inside of ", inside);
        if (!fits) continue;
        std::sort(next, next + inside);  // threads collect in any order
        CHECK(std::equal(first, last, next, next + inside), name, " threads=", threads, " group ", g);
        next += inside;
        written += inside;
      }
    }
  }
}

void keys_inside_brackets() {
  const Weights weights = normal_weights({60000, 70, 40000, 9, 0}, 11);
  const std::vector<float> scales = {1.0f, 0.5f, 3.0f, 1.0f, 1.0f};
  const Scores scores{arrays_of(weights), {1, 0, 1, 0, 2}, 3, scales.data(), nullptr};
  const std::vector<std::vector<uint32_t>> groups = {
      expected_keys({weights[1], weights[3]}, std::vector<float>{0.5f, 1.0f}.data(), nullptr),
      expected_keys({weights[0], weights[2]}, std::vector<float>{1.0f, 3.0f}.data(), nullptr),
      {}};
  const int64_t all = FloatFormat<float>::kNanKey;
  const auto few = [&](size_t g, size_t from, size_t to) {
    return std::pair<int64_t, int64_t>{groups[g][from], groups[g][to]};  // both ends are keys that occur
  };
  const auto [low0, high0] = few(0, 10, 50);
  const auto [low1, high1] = few(1, 70000, 71000);
  check_collected(groups, scores, {low0, low1, 0}, {high0, high1, all}, 2000);
  check_collected(groups, scores, {low0, low1, 0}, {high0, high1, all}, 41 + 1001);  // exactly full
  check_collected(groups, scores, {low0, low1, 0}, {high0, high1, all}, 41 + 1000);  // the second does not fit
  check_collected(groups, scores, {low0, low1, 0}, {high0, high1, all}, 40);         // neither does
  check_collected(groups, scores, {low1, low0, 1}, {low1, low0, 0}, 2000);           // single keys, and none wanted
  check_collected(groups, scores, {1, low1, 0}, {0, high1, all}, 2000);
  check_collected(groups, scores, {0, 0, 0}, {all, 0, all}, 2000);  // all of a group, and its zeros
}

// More keys inside than the buffer of a selection holds.
void brackets_with_too_many_keys() {
  const Weights ties = {std::vector<float>(1300000, 0.25f)};
  const int64_t key = magnitude_key(0.25f);
  const Scores scores{arrays_of(ties), {0}, 1, nullptr, nullptr};
  for (const int threads : {1, 3}) {
    CHECK(collect(scores, {key}, {key}, 2000000, threads).inside[0] == -1, "threads=", threads);
  }
}

void special_and_wide_keys() {
  const Weights special = {weights_around(0.5f, 1000, 12)};
  const int64_t nan = FloatFormat<float>::kNanKey;
  const Scores scores{arrays_of(special), {0}, 1, nullptr, nullptr};
  const std::vector<uint32_t> keys = expected_keys(special, nullptr, nullptr);
  check_collected({keys}, scores, {nan}, {nan}, 100);  // every NaN has one key
  check_collected({keys}, scores, {0}, {nan}, static_cast<int64_t>(keys.size()));
  const std::vector<double> wide = {0.5, -0.25, 0.25 * (1 + 1e-15), 8, kNan};
  const Scores wide_scores{{Array{wide.data(), 5, DType::kFloat64}}, {0}, 1, nullptr, nullptr};
  const auto key = [](double value) { return static_cast<int64_t>(magnitude_key(value)); };
  Collected found = collect(wide_scores, {key(wide[2])}, {key(8)}, 5, 1);
  CHECK(found.below[0] == 1 && found.inside[0] == 3, "float64: ", found.below[0], " ", found.inside[0]);
  std::sort(found.keys.begin(), found.keys.begin() + 3);
  CHECK(found.keys[0] == key(wide[2]) && found.keys[1] == key(0.5) && found.keys[2] == key(8), "float64");
}

void bad_arguments_are_refused() {
  const float value = 1;
  const double wide = 1;
  const int64_t rank = 0;
  float out[2];
  const Array narrow_array{&value, 1, DType::kFloat32};
  const Array wide_array{&wide, 1, DType::kFloat64};
  CHECK_REFUSED(magnitude_select({{narrow_array, wide_array}, {0, 0}, 1, nullptr, nullptr}, &rank, nullptr, out, 1),
                "all float64 or none, at index 1");
  CHECK_REFUSED(magnitude_select({{narrow_array}, {1}, 1, nullptr, nullptr}, &rank, nullptr, out, 1),
                "groups must be in [0, 1), got 1");
  CHECK_REFUSED(magnitude_select({{narrow_array}, {}, 1, nullptr, nullptr}, &rank, nullptr, out, 1),
                "one per weight (1)");
}

}  // namespace
}  // namespace feather_tests

int main() {
  using namespace feather_tests;
  return run_all({{"few elements", few_elements},
                  {"sampled bracket", sampled_bracket},
                  {"hints, right and wrong", hints_right_and_wrong},
                  {"neighbours outside the bracket", neighbours_outside_the_bracket},
                  {"ties take radix passes", ties_take_radix_passes},
                  {"caps and scales", caps_and_scales},
                  {"groups are independent", groups_are_independent},
                  {"float64 and 16 bits", float64_and_16_bits},
                  {"histograms", histograms},
                  {"keys inside brackets", keys_inside_brackets},
                  {"brackets with too many keys", brackets_with_too_many_keys},
                  {"special and wide keys", special_and_wide_keys},
                  {"bad arguments are refused", bad_arguments_are_refused}});
}
