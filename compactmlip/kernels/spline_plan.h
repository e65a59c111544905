// Shape of a convolution with tabulated radial weights, as kernels/spline_convolution.py writes it.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

namespace compactmlip {

using at::IntArrayRef;
using at::Tensor;

constexpr int64_t kMaxOrder = 7;
constexpr int64_t kMaxHarmonics = (kMaxOrder + 1) * (kMaxOrder + 1);

struct Path {
  int64_t l1, l2, l3, channels;
  int64_t column;   // first column in the table
  int64_t message;  // first channel in the message of order l3
  int64_t entry;    // first of its (2 l3 + 1)(2 l1 + 1) coupling entries, among those of its group

  int64_t components() const { return 2 * l1 + 1; }
  int64_t rows() const { return 2 * l3 + 1; }
};

// Paths that start from one order: they share the features and are worked on together.
struct Group {
  int64_t l1, first, last;  // paths first ... last - 1
  int64_t channels;         // of the features, and of each path unless the features are one
  int64_t column, columns;  // in the table
  int64_t entries;
  const int32_t* terms;            // (entry, harmonic) of each term of the coupling entries
  int64_t num_terms, term_values;  // the values begin at coefficients[term_values]

  int64_t components() const { return 2 * l1 + 1; }
  int64_t size() const { return components() * channels; }
};

struct Plan {
  int64_t lmax = 0, values_per_knot = 0, columns = 0;
  bool solid = false;
  std::vector<Path> paths;
  std::vector<Group> groups;
  std::vector<int64_t> message_channels;  // by l3
  const int32_t* steps = nullptr;         // (target, source, first-order source) of each step
  int64_t num_steps = 0;
};

inline void check_entries(const int32_t* values, int64_t count, int64_t step, int64_t limit,
                          const char* what) {
  for (int64_t k = 0; k < count; k++)
    TORCH_CHECK_VALUE(values[k * step] >= 0 && values[k * step] < limit, "compactmlip::spline_convolve: ",
                      what, " ", values[k * step], " is not below ", limit, ".");
}

// Channels of the message of each order: those of all its paths side by side.  channels: of each path.
inline std::vector<int64_t> message_channels(IntArrayRef paths, IntArrayRef channels) {
  std::vector<int64_t> found;
  TORCH_CHECK_VALUE(paths.size() == 3 * channels.size(),
                    "compactmlip::spline_convolve: paths must be (l1, l2, l3) each, with channels for each; there "
                    "are ", paths.size(), " and ", channels.size(), " numbers.");
  for (size_t k = 0; k < paths.size(); k += 3) {
    const int64_t l3 = paths[k + 2];
    for (size_t n = k; n < k + 3; n++)
      TORCH_CHECK_VALUE(paths[n] >= 0 && paths[n] <= kMaxOrder, "compactmlip::spline_convolve: order ",
                        paths[n], " is not in 0 ... ", kMaxOrder, ".");
    TORCH_CHECK_VALUE(channels[k / 3] > 0, "compactmlip::spline_convolve: path ", k / 3, " has no channels.");
    if (static_cast<int64_t>(found.size()) <= l3) found.resize(l3 + 1);
    found[l3] += channels[k / 3];
  }
  return found;
}

// Reads the head of the structure: largest order, solid harmonics, values per knot, number of steps, number of
// coupling terms of each path.  The steps and the terms follow; the coefficients are in the same order.
inline Plan read_spline_plan(const Tensor& structure, IntArrayRef paths, IntArrayRef channels,
                             int64_t num_coefficients) {
  const int64_t num_paths = static_cast<int64_t>(paths.size()) / 3, head = 4 + num_paths;
  TORCH_CHECK_VALUE(structure.dim() == 1 && structure.scalar_type() == at::kInt && structure.is_contiguous() &&
                        structure.numel() >= head,
                    "compactmlip::spline_convolve: the structure must be a contiguous int32 vector of at least ",
                    head, " numbers.");
  const int32_t *at = structure.const_data_ptr<int32_t>(), *terms_of = at + 4;
  const int32_t* end = at + structure.numel();
  Plan plan;
  plan.lmax = at[0], plan.solid = at[1], plan.values_per_knot = at[2], plan.num_steps = at[3];
  TORCH_CHECK_VALUE(plan.lmax >= 0 && plan.lmax <= kMaxOrder,
                    "compactmlip::spline_convolve: harmonics up to order ", plan.lmax, ", not up to ", kMaxOrder);
  TORCH_CHECK_VALUE(plan.values_per_knot == 2 || plan.values_per_knot == 3,
                    "compactmlip::spline_convolve: 2 or 3 values per knot, not ", plan.values_per_knot, ".");
  TORCH_CHECK_VALUE(plan.num_steps >= 0 && end - at >= head + 3 * plan.num_steps,
                    "compactmlip::spline_convolve: the structure is too short.");
  plan.steps = at + head;
  plan.message_channels = message_channels(paths, channels);
  std::vector<int64_t> filled(plan.message_channels.size(), 0);
  const int32_t* terms = plan.steps + 3 * plan.num_steps;
  int64_t value = plan.num_steps;
  for (int64_t k = 0; k < num_paths; k++) {
    Path path{paths[3 * k], paths[3 * k + 1], paths[3 * k + 2]};
    TORCH_CHECK_VALUE(path.l2 <= plan.lmax, "compactmlip::spline_convolve: path ", k,
                      " needs harmonics of order ", path.l2, "; there are those up to ", plan.lmax, ".");
    if (plan.groups.empty() || plan.groups.back().l1 != path.l1) {
      TORCH_CHECK_VALUE(plan.groups.empty() || plan.groups.back().l1 < path.l1,
                        "compactmlip::spline_convolve: the paths must be sorted.");
      plan.groups.push_back({path.l1, k, k, channels[k], plan.columns, 0, 0, terms, 0, value});
    }
    Group& group = plan.groups.back();
    path.channels = channels[k];
    path.column = plan.columns;
    path.message = filled[path.l3];
    path.entry = group.entries;
    plan.columns += path.channels;
    group.columns += path.channels;
    filled[path.l3] += path.channels;
    group.entries += path.rows() * path.components();
    group.last = k + 1;
    group.num_terms += terms_of[k];
    TORCH_CHECK_VALUE(terms_of[k] >= 0 && end - terms >= 2 * terms_of[k],
                      "compactmlip::spline_convolve: the structure is too short.");
    terms += 2 * terms_of[k];
    value += terms_of[k];
    plan.paths.push_back(path);
  }
  const int64_t harmonics = (plan.lmax + 1) * (plan.lmax + 1);
  check_entries(plan.steps, 3 * plan.num_steps, 1, harmonics, "harmonic");
  for (const Group& group : plan.groups) {
    check_entries(group.terms, group.num_terms, 2, group.entries, "coupling entry");
    check_entries(group.terms + 1, group.num_terms, 2, harmonics, "harmonic");
  }
  TORCH_CHECK_VALUE(terms == end && value == num_coefficients,
                    "compactmlip::spline_convolve: structure and coefficients do not fit each other.");
  return plan;
}

}  // namespace compactmlip
