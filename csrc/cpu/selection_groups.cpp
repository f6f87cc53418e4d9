#include "cpu/selection_groups.h"

#include <algorithm>

namespace feather {

int64_t Group::elements() const {
  int64_t total = 0;
  for (const Row& row : rows) total += row.n;
  return total;
}

int64_t Group::size() const {
  int64_t total = 0;
  for (const Row& row : rows) total += std::min(row.n, row.cap);
  return total;
}

std::vector<Group> make_groups(const Scores& scores) {
  const std::vector<Array>& weights = scores.weights;
  FEATHER_CHECK(scores.groups.size() == weights.size(), "groups must be one per weight (", weights.size(), "), got ",
                scores.groups.size());
  std::vector<Group> groups(static_cast<size_t>(std::max<int64_t>(scores.group_count, 0)));
  for (size_t l = 0; l < weights.size(); ++l) {
    const Array& w = weights[l];
    FEATHER_CHECK(is_wide(w.dtype) == is_wide(weights[0].dtype), "weights must be all float64 or none, at index ", l);
    const int64_t g = scores.groups[l];
    FEATHER_CHECK(g >= 0 && g < scores.group_count, "groups must be in [0, ", scores.group_count, "), got ", g);
    Group& group = groups[static_cast<size_t>(g)];
    if (group.rows.empty() || scores.caps != nullptr) group.rows.emplace_back();
    Row& row = group.rows.back();
    row.arrays.push_back(w);
    row.n += w.n;
    row.cap = scores.caps == nullptr ? row.n : std::max<int64_t>(scores.caps[l], 0);
    if (scores.scales != nullptr) {
      const void* scale = at(scores.scales, static_cast<int64_t>(l), is_wide(w.dtype) ? w.dtype : DType::kFloat32);
      row.scales.push_back(read_scalar(scale, w.dtype));
    }
  }
  return groups;
}

}  // namespace feather
