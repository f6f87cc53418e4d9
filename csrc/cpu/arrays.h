// Element addresses by dtype code, and a list of arrays walked as one sequence of elements.
#pragma once

#include <stdint.h>

#include <vector>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "feather/check.h"

namespace feather {

constexpr int64_t kParallel = 1 << 15;  // elements from which a second thread pays off

// The index of a dtype in kernel tables. Fails for a code that is no dtype's.
inline int index_of(DType dtype) {
  const int index = static_cast<int>(dtype);
  FEATHER_CHECK(index >= 0 && index < kDTypes, "dtype code must be in [0, ", kDTypes, "), got ", index);
  return index;
}

// Size of an element.
inline int64_t bytes_of(DType dtype) {
  constexpr int64_t kBytes[kDTypes] = {2, 2, 4, 8};
  return kBytes[index_of(dtype)];
}

// Address of element `index` of an array.
inline const void* at(const void* data, int64_t index, DType dtype) {
  return static_cast<const char*>(data) + index * bytes_of(dtype);
}

inline void* at(void* data, int64_t index, DType dtype) { return static_cast<char*>(data) + index * bytes_of(dtype); }

// Calls f(index, data, n) for the part of each array that lies in `range`, which counts the elements of all arrays as
// if they stood end to end.
template <class F>
void for_each_piece(const std::vector<Array>& arrays, Range range, const F& f) {
  int64_t start = 0;
  for (size_t index = 0; index < arrays.size() && start < range.end; ++index) {
    const Array& array = arrays[index];
    const int64_t begin = range.begin > start ? range.begin - start : 0;
    const int64_t end = range.end - start < array.n ? range.end - start : array.n;
    if (begin < end) f(index, at(array.data, begin, array.dtype), end - begin);
    start += array.n;
  }
}

inline int64_t total_elements(const std::vector<Array>& arrays) {
  int64_t total = 0;
  for (const Array& array : arrays) total += array.n;
  return total;
}

}  // namespace feather
