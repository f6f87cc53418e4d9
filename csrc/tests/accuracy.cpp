// Measures the largest error of P(w) over float32 magnitudes: `accuracy [--every N] [--threads N]` prints csv.
//
// The kernels run over the magnitudes with the bit patterns 0, N, 2 N, ..., up to infinity; --every 1 (the default)
// tries all of them. The exact values are computed in long double. Instruction sets that must give the same bits share
// a row: all of them, except that for p = 3 those that fuse a product and a sum are separate from those that do not.
// Exits with 1 if an error exceeds 2 ulp or bits differ within a row.
#include <algorithm>
#include <cstring>
#include <string>

#include "cpu/instruction_set.h"
#include "cpu/parallel.h"
#include "feather/math.h"
#include "harness.h"
#include "samples.h"

namespace feather_tests {
namespace {

using namespace feather;

constexpr float kThresholds[] = {0.0123f, 1.9999f, 1e-6f};
constexpr double kPowerOf[kPowers] = {INFINITY, 1, 2, 3};  // by P
constexpr int64_t kBlock = 4096;
constexpr uint32_t kLast = 0x7F800000u;  // inf

struct Worst {
  double ulp = 0;
  float weight = 0;
};

// Instruction sets that must give the same bits.
struct Group {
  std::string names;
  std::vector<Kernels> sets;
};

std::vector<Group> groups_for(int power) {
  std::vector<Group> groups;
  for (const std::string& name : available_instruction_sets()) {
    use_instruction_set(name);
    const bool apart = !groups.empty() && power == 3 && groups.back().sets[0].fused != kernels().fused;
    if (groups.empty() || apart) groups.emplace_back();
    Group& group = groups.back();
    group.names += (group.names.empty() ? "" : "=") + name;
    group.sets.push_back(kernels());
  }
  return groups;
}

// exact_threshold (samples.h), but fast enough for every float: products of differences, which long double holds almost
// exactly, and a root in double with one Newton step in long double.
long double exact(float weight, float threshold, int power) {
  const long double a = weight;
  const long double t = threshold;
  if (a <= t) return 0.0L;
  if (power == kInfinitePower || weight > 1e36f * threshold) return a;
  if (power == 1) return a - t;
  if (power == 2) return std::sqrt((a - t) * (a + t));
  const long double z = (a - t) * (a * (a + t) + t * t);
  const long double y = static_cast<long double>(std::cbrt(static_cast<double>(z)));
  return y - (y * y * y - z) / (3 * y * y);
}

// The largest error of the first instruction set in one part of the magnitudes; infinite if another gives other bits.
Worst worst_of_part(const std::vector<Kernels>& sets, float t, int power, int64_t every, int64_t part, int64_t parts) {
  Worst worst;
  std::vector<float> weights(kBlock);
  std::vector<float> results(kBlock);
  std::vector<float> others(kBlock);
  const int64_t count = kLast / every + 1;
  for (int64_t start = part * kBlock; start < count; start += parts * kBlock) {
    const int64_t n = std::min(kBlock, count - start);
    for (int64_t i = 0; i < n; ++i) weights[i] = float_of(static_cast<uint32_t>((start + i) * every));
    sets[0].threshold[2][2][power](weights.data(), results.data(), n, static_cast<double>(t));
    for (size_t set = 1; set < sets.size(); ++set) {
      sets[set].threshold[2][2][power](weights.data(), others.data(), n, static_cast<double>(t));
      if (std::memcmp(results.data(), others.data(), static_cast<size_t>(n) * sizeof(float)) != 0) {
        worst = Worst{INFINITY, weights[0]};
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      const double error = float_ulps(results[i], exact(weights[i], t, power));
      if (error > worst.ulp) worst = Worst{error, weights[i]};
    }
  }
  return worst;
}

}  // namespace
}  // namespace feather_tests

int main(int count, char** arguments) {
  using namespace feather_tests;
  int64_t every = 1;
  int threads = 1;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = arguments[i];
    if (name == "--every") every = std::max(1, std::atoi(arguments[i + 1]));
    if (name == "--threads") threads = std::max(1, std::atoi(arguments[i + 1]));
  }
  bool good = true;
  std::printf("instruction_sets,threshold,power,magnitudes,max_ulp,at_weight\n");
  for (const float t : kThresholds) {
    for (int power = 0; power < kPowers; ++power) {
      for (const Group& group : groups_for(power)) {
        std::vector<Worst> parts(static_cast<size_t>(threads));
        run_on_threads(threads, [&](int part) {
          parts[static_cast<size_t>(part)] = worst_of_part(group.sets, t, power, every, part, threads);
        });
        Worst worst;
        for (const Worst& part : parts) worst = part.ulp > worst.ulp ? part : worst;
        std::printf("%s,%.9g,%.0f,%lld,%.4f,%.9g\n", group.names.c_str(), static_cast<double>(t), kPowerOf[power],
                    static_cast<long long>(kLast / every + 1), worst.ulp, static_cast<double>(worst.weight));
        std::fflush(stdout);
        good = good && worst.ulp <= 2;
      }
    }
  }
  return good ? 0 : 1;
}
