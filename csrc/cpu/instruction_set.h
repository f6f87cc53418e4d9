// Which instruction set's kernels are in use: the choice at run time among those compiled in.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace feather {

// Names of the instruction sets that were compiled in and that this machine has, from narrow to wide.
std::vector<std::string> available_instruction_sets();

// Name of the one in use: the widest available, unless use_instruction_set chose another.
std::string instruction_set();

// Uses another available one from now on, in every thread. For tests and measurements: the choice changes no result,
// except for the last bit of P(w) with p = 3 between sets that fuse and the one that does not (Kernels::fused).
void use_instruction_set(const std::string& name);

// Its kernels.
const Kernels& kernels();

}  // namespace feather
