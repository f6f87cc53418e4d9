// The instruction sets this build has kernels for, and the choice among them at run time.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace feather {

// Names of the instruction sets that were compiled in and that this machine has, the narrowest first.
std::vector<std::string> available_instruction_sets();

// Name of the one in use: the widest available one, unless another was chosen.
std::string instruction_set();

// Use another available one from now on, in every thread. For tests and measurements: results do not depend on it.
void use_instruction_set(const std::string& name);

const Kernels& kernels();

}  // namespace feather
