// Selection and histograms against sorting, on every path: all keys collected, hint, sample, radix passes.
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
                  {"bad arguments are refused", bad_arguments_are_refused}});
}
