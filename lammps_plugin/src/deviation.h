// How far the forces of several models are apart.
#pragma once

#include <cstdint>
#include <vector>

#include "ghost_exchange.h"
#include "model.h"

namespace compactmlip {

class Deviation {
 public:
  // Forgets what it knew.
  void begin(int64_t nodes, int models);
  // Adds the forces of the next model, from the gradient of the energy with respect to the edge vectors.
  void add(const Graph& graph, const std::vector<double>& gradient);
  // Forces of all models, a row for each node; those of ghosts belong to their owners.  Valid until begin().
  const compactmlip_rows* rows();
  // Of each of the first `owned` nodes, sqrt(<|F - <F>|^2>) over the models (eV/Angstrom): the model deviation of
  // Zhang et al., Phys. Rev. Mater. 3, 023804 (2019).
  std::vector<double> of_nodes(int64_t owned) const;

 private:
  int models_ = 0, known_ = 0;
  std::vector<double> forces_;  // (nodes, models, 3)
  compactmlip_rows rows_{};
};

// Standard deviation over models.
double spread(const std::vector<double>& values);

}  // namespace compactmlip
