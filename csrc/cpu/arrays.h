// Arrays of several dtypes seen as one row of elements, and its division among threads.
#pragma once

#include <stdint.h>

#include <vector>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "feather/check.h"

namespace feather {

constexpr int64_t kParallel = 1 << 15;  // elements from which a second thread pays

inline int index_of(DType dtype) {
  const int index = static_cast<int>(dtype);
  FEATHER_CHECK(index >= 0 && index < kDTypes, "dtype code must be in [0, ", kDTypes, "), got ", index);
  return index;
}

inline int64_t bytes_of(DType dtype) {
  constexpr int64_t kBytes[kDTypes] = {2, 2, 4, 8};
  return kBytes[index_of(dtype)];
}

inline const void* at(const void* data, int64_t index, DType dtype) {
  return static_cast<const char*>(data) + index * bytes_of(dtype);
}

inline void* at(void* data, int64_t index, DType dtype) { return static_cast<char*>(data) + index * bytes_of(dtype); }

// Calls f(array, data, n) for the pieces of the arrays in the range of the elements of all of them, counted through.
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
