// Edges by centre.
#pragma once

#include <ATen/core/Tensor.h>

#include <numeric>
#include <vector>

namespace compactmlip {

using at::Tensor;

struct Edges {
  std::vector<int64_t> order;  // empty if the edges are sorted by centre
  std::vector<int64_t> begin;
};

// Where the edges of each centre begin; refuses indices of nodes that do not exist.
inline Edges sort_edges(const Tensor& centers, const Tensor& neighbors, int64_t nodes) {
  const int64_t edges = centers.size(0);
  const int64_t *i = centers.const_data_ptr<int64_t>(), *j = neighbors.const_data_ptr<int64_t>();
  Edges found;
  found.begin.assign(nodes + 1, 0);
  bool sorted = true, valid = true;
  for (int64_t e = 0; e < edges; e++) {
    const bool inside = i[e] >= 0 && i[e] < nodes && j[e] >= 0 && j[e] < nodes;
    if (!inside) {
      valid = false;
      break;
    }
    sorted &= e == 0 || i[e - 1] <= i[e];
    found.begin[i[e] + 1]++;
  }
  TORCH_CHECK_INDEX(valid, "compactmlip: centers and neighbors must be in [0, ", nodes,
                    "), the number of nodes.");
  std::partial_sum(found.begin.begin(), found.begin.end(), found.begin.begin());
  if (!sorted) {
    found.order.resize(edges);
    std::vector<int64_t> next(found.begin.begin(), found.begin.end() - 1);
    for (int64_t e = 0; e < edges; e++) found.order[next[i[e]]++] = e;
  }
  return found;
}

}  // namespace compactmlip
