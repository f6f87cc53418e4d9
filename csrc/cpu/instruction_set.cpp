#include "cpu/instruction_set.h"

#include <atomic>

#include "feather/check.h"

namespace feather {
namespace {

struct InstructionSet {
  const char* name;
  bool present;
  Kernels kernels;
};

using Fill = void (*)(Kernels&);

InstructionSet filled(const char* name, bool present, Fill elementwise, Fill selection) {
  InstructionSet result{name, present, {}};
  elementwise(result.kernels);
  selection(result.kernels);
  return result;
}

// From narrow to wide. __builtin_cpu_supports also asks whether the operating system saves the wide registers.
const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> list;
#if defined(FEATHER_X86)
    list.push_back(filled("baseline", true, baseline::fill_elementwise, baseline::fill_selection));
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    list.push_back(filled("avx2", has_avx2, avx2::fill_elementwise, avx2::fill_selection));
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    list.push_back(filled("avx512", has_avx512, avx512::fill_elementwise, avx512::fill_selection));
#if defined(FEATHER_AVX512BF16)
    const bool has_bfloat16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
    list.push_back(filled("avx512bf16", has_bfloat16, avx512bf16::fill_elementwise, avx512::fill_selection));
#endif
#else
    list.push_back(filled(FEATHER_BASELINE_NAME, true, baseline::fill_elementwise, baseline::fill_selection));
#endif
    return list;
  }();
  return sets;
}

// The one in use; at first the widest that this machine has.
std::atomic<const InstructionSet*>& current() {
  static std::atomic<const InstructionSet*> chosen = [] {
    const InstructionSet* widest = nullptr;
    for (const InstructionSet& set : instruction_sets()) {
      if (set.present) widest = &set;
    }
    return widest;
  }();
  return chosen;
}

}  // namespace

std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : instruction_sets()) {
    if (set.present) names.push_back(set.name);
  }
  return names;
}

std::string instruction_set() { return current().load(std::memory_order_relaxed)->name; }

void use_instruction_set(const std::string& name) {
  for (const InstructionSet& set : instruction_sets()) {
    if (set.present && name == set.name) {
      current().store(&set, std::memory_order_relaxed);
      return;
    }
  }
  std::ostringstream names;
  for (const std::string& available : available_instruction_sets()) names << ' ' << available;
  fail("instruction set must be one of", names.str(), ", got ", name);
}

const Kernels& kernels() { return current().load(std::memory_order_relaxed)->kernels; }

}  // namespace feather
