// The arrays of a selection sorted into groups and rows, and a loop over the keys of a row.
#pragma once

#include <stdint.h>

#include <vector>

#include "cpu/arrays.h"
#include "cpu/instruction_set.h"
#include "cpu/ops.h"
#include "feather/math.h"

namespace feather {

// Arrays whose `cap` smallest scores take part in a selection. Without caps a row holds all arrays of its group and cap
// is n; with caps each array is a row of its own.
struct Row {
  std::vector<Array> arrays;
  std::vector<double> scales;  // one for each array, or empty
  int64_t n = 0;
  int64_t cap = 0;

  bool scaled() const { return !scales.empty(); }
  double scale(size_t index) const { return scaled() ? scales[index] : 1.0; }
};

struct Group {
  std::vector<Row> rows;

  int64_t elements() const;  // of all rows
  int64_t size() const;      // of them, how many take part: the ranks are [0, size)
};

// The groups of a selection. Fails unless the weights are all float64 or none is, and groups are in range.
std::vector<Group> make_groups(const Scores& scores);

// Calls f(keys, n) for one block of keys after the other, until all keys in `range` of a row have been passed.
template <class T, class F>
void for_each_key_block(const Row& row, Range range, const F& f) {
  constexpr int64_t kBlock = 1024;
  Key<T> keys[kBlock];
  const Kernels& table = kernels();
  for_each_piece(row.arrays, range, [&](size_t index, const void* data, int64_t n) {
    const DType dtype = row.arrays[index].dtype;
    const auto kernel = table.keys[index_of(dtype)][row.scaled()];
    for (int64_t start = 0; start < n; start += kBlock) {
      const int64_t length = n - start < kBlock ? n - start : kBlock;
      kernel(at(data, start, dtype), length, row.scale(index), keys);
      f(static_cast<const Key<T>*>(keys), length);
    }
  });
}

}  // namespace feather
