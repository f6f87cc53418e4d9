// Selection by radix passes over the keys of a group, most significant digit first.
#pragma once

#include <stdint.h>

#include "cpu/selection_groups.h"
#include "feather/math.h"

namespace feather {

// Writes the rank-th smallest key of a group and the next to found; rank is in [0, group.size()). T is float, or double
// for float64 weights. Reads the weights four times (T float) or seven times and needs no buffer for keys.
template <class T>
void select_by_radix(const Group& group, int64_t rank, int threads, Key<T> found[2]);

}  // namespace feather
