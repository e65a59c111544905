// What the operators of the convolution accept, with messages that say what is wrong.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "convolution.h"
#include "edges.h"

namespace compactmlip {

using at::IntArrayRef;
using at::Tensor;

inline std::vector<int64_t> first_rows(IntArrayRef path_of_row, int64_t paths) {
  std::vector<int64_t> begin(paths + 1, 0);
  for (size_t r = 0; r < path_of_row.size(); r++) {
    const bool grows = r == 0 || path_of_row[r - 1] <= path_of_row[r];
    TORCH_CHECK_VALUE(grows && path_of_row[r] >= 0 && path_of_row[r] < paths,
                      "compactmlip::convolve: path_of_row must not decrease and be in [0, ", paths,
                      "), the number of paths; it has ", path_of_row[r], " at row ", r, ".");
    begin[path_of_row[r] + 1]++;
  }
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  return begin;
}

// Shapes and types, with any symbolic or real sizes.
inline void check(const Tensor& coupling, const Tensor& features, const Tensor& radial, const Tensor& centers,
           const Tensor& neighbors, IntArrayRef path_of_row) {
  TORCH_CHECK_VALUE(coupling.dim() == 3 && features.dim() == 3 && radial.dim() == 3,
                    "compactmlip::convolve: coupling (edges, rows, components), features (nodes, components, "
                    "channels) and radial (edges, paths, channels) must have three axes, but have ",
                    coupling.dim(), ", ", features.dim(), " and ", radial.dim(), ".");
  TORCH_CHECK_VALUE(centers.dim() == 1 && neighbors.dim() == 1 && centers.scalar_type() == at::kLong &&
                        neighbors.scalar_type() == at::kLong,
                    "compactmlip::convolve: centers and neighbors must be int64 with one axis.");
  TORCH_CHECK_VALUE(features.scalar_type() == at::kFloat || features.scalar_type() == at::kDouble,
                    "compactmlip::convolve: float32 or float64 is needed, not ", features.scalar_type(),
                    ".");
  TORCH_CHECK_VALUE(coupling.scalar_type() == features.scalar_type() &&
                        radial.scalar_type() == features.scalar_type(),
                    "compactmlip::convolve: coupling (", coupling.scalar_type(), "), features (",
                    features.scalar_type(), ") and radial (", radial.scalar_type(), ") must have one type.");
  const auto edges = centers.sym_size(0);
  TORCH_CHECK_VALUE(neighbors.sym_size(0) == edges && coupling.sym_size(0) == edges &&
                        radial.sym_size(0) == edges,
                    "compactmlip::convolve: centers, neighbors, coupling and radial have ", edges, ", ",
                    neighbors.sym_size(0), ", ", coupling.sym_size(0), " and ", radial.sym_size(0),
                    " edges.");
  TORCH_CHECK_VALUE(coupling.sym_size(2) == features.sym_size(1), "compactmlip::convolve: coupling has ",
                    coupling.sym_size(2), " components and features have ", features.sym_size(1), ".");
  TORCH_CHECK_VALUE(radial.sym_size(2) == features.sym_size(2), "compactmlip::convolve: radial has ",
                    radial.sym_size(2), " channels and features have ", features.sym_size(2), ".");
  TORCH_CHECK_VALUE(coupling.sym_size(1) == static_cast<int64_t>(path_of_row.size()),
                    "compactmlip::convolve: coupling has ", coupling.sym_size(1),
                    " rows and path_of_row names ", path_of_row.size(), ".");
  TORCH_CHECK_VALUE(features.sym_size(1) <= kMaxA, "compactmlip::convolve: at most ", kMaxA,
                    " components, not ", features.sym_size(1), ".");
}

inline void check_like(const Tensor& x, const Tensor& like, const char* what) {
  TORCH_CHECK_VALUE(x.sym_sizes() == like.sym_sizes() && x.scalar_type() == like.scalar_type(),
                    "compactmlip::convolve: ", what, " has shape ", x.sym_sizes(), " and type ",
                    x.scalar_type(), ", expected ", like.sym_sizes(), " and ", like.scalar_type(), ".");
}

inline void check_gradient(const Tensor& g, const Tensor& K, const Tensor& h) {
  const std::array<c10::SymInt, 3> sizes{h.sym_size(0), K.sym_size(1), h.sym_size(2)};
  TORCH_CHECK_VALUE(g.sym_sizes() == c10::SymIntArrayRef(sizes) && g.scalar_type() == h.scalar_type(),
                    "compactmlip::convolve_backward: the gradient has shape ", g.sym_sizes(), ", expected ",
                    c10::SymIntArrayRef(sizes), ".");
}

}  // namespace compactmlip
