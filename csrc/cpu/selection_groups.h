// The groups of a selection, in the form that the kernels scan.
#pragma once

#include <stdint.h>

#include <vector>

#include "cpu/arrays.h"
#include "cpu/instruction_set.h"
#include "cpu/ops.h"
#include "feather/math.h"

namespace feather {

// Arrays of which together the `cap` smallest scores take part: a whole group, or one array where there are caps.
struct Row {
  std::vector<Array> arrays;
  std::vector<double> scales;  // one per array, or none
  int64_t n = 0;
  int64_t cap = 0;

  bool scaled() const { return !scales.empty(); }
  double scale(size_t index) const { return scaled() ? scales[index] : 1.0; }
};

struct Group {
  std::vector<Row> rows;

  int64_t elements() const;
  int64_t size() const;  // elements that take part
};

// Throws std::invalid_argument unless scores are of float64 only or of the other dtypes, with groups in range.
std::vector<Group> make_groups(const Scores& scores);

// Counts, for the keys of a row whose bits above shift + bits equal prefix, each value of the bits above shift, added
// to counts (2^bits); returns how many keys have a smaller prefix.
template <class T>
int64_t add_digits(const Row& row, Key<T> prefix, int shift, int bits, int64_t* counts, int threads);

// The rank-th key of a group and the next, by radix passes; rank in [0, size).
template <class T>
void select_by_radix(const Group& group, int64_t rank, int threads, Key<T> found[2]);

// Calls f(keys, n) with blocks of the keys of a part of a row.
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
