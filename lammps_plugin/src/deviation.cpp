#include "deviation.h"

#include <cmath>

namespace compactmlip {

void Deviation::begin(int64_t nodes, int models) {
  models_ = models, known_ = 0;
  forces_.assign(3 * models * nodes, 0.0);
}

void Deviation::add(const Graph& graph, const std::vector<double>& gradient) {
  const int64_t stride = 3 * models_;
  double* of_model = forces_.data() + 3 * known_++;
  for (int64_t e = 0; e < graph.edges(); e++) {
    double *center = of_model + stride * graph.centers[e], *neighbor = of_model + stride * graph.neighbors[e];
    for (int k = 0; k < 3; k++) {
      center[k] += gradient[3 * e + k];
      neighbor[k] -= gradient[3 * e + k];
    }
  }
}

const compactmlip_rows* Deviation::rows() {
  rows_ = {forces_.data(), static_cast<int64_t>(3 * models_ * sizeof(double))};
  return &rows_;
}

std::vector<double> Deviation::of_nodes(int64_t owned) const {
  std::vector<double> found(owned), along(models_);
  for (int64_t node = 0; node < owned; node++) {
    double squares = 0;
    for (int k = 0; k < 3; k++) {
      for (int m = 0; m < models_; m++) along[m] = forces_[3 * (models_ * node + m) + k];
      const double one = spread(along);
      squares += one * one;
    }
    found[node] = std::sqrt(squares);
  }
  return found;
}

double spread(const std::vector<double>& values) {
  double mean = 0, squares = 0;
  for (const double value : values) mean += value / values.size();
  for (const double value : values) squares += (value - mean) * (value - mean) / values.size();
  return std::sqrt(squares);
}

}  // namespace compactmlip
