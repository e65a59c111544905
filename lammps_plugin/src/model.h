// A deployed model: needs torch, and knows nothing of LAMMPS.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ghost_exchange.h"

namespace compactmlip {

// Atoms with their neighbours.  Nodes are the owned atoms, then ghosts.
struct Graph {
  int64_t owned = 0;
  std::vector<int64_t> species;             // of each node
  std::vector<int64_t> centers, neighbors;  // of each edge; centers are owned
  std::vector<double> vectors;              // from centre to neighbour, Angstrom

  int64_t nodes() const { return static_cast<int64_t>(species.size()); }
  int64_t edges() const { return static_cast<int64_t>(centers.size()); }
};

// Columns of the scores, as in compactmlip/deploy/trust.py.
constexpr int kReasons = 4;
constexpr const char* kReasonNames[kReasons] = {"species", "distance", "coordination", "features"};

class Model {
 public:
  // Loads a file; throws std::runtime_error with a message for the user.  `folder` holds the library of the compiled
  // operators.
  Model(const std::string& path, const std::string& device, const std::string& folder);
  ~Model();

  const std::vector<std::string>& species() const;
  double cutoff() const;                // Angstrom
  const std::string& precision() const;  // as the file was compiled: float32, float64, mixed, bf16
  const std::string& backend() const;

  // Whether the file can be evaluated on a part of a structure.
  bool can_be_split() const;
  // Bytes per node of the widest message of features.
  int64_t message_bytes() const;
  // Whether the file knows where it was calibrated.
  bool has_trust_region() const;

  // Energies of owned atoms (eV), and the gradient of their sum, on all processes together if there is an exchange,
  // with respect to the edge vectors (eV/Angstrom).  threads: 0 leaves them as they are.
  void evaluate(const Graph& graph, const compactmlip_exchange* exchange, int threads, std::vector<double>& energies,
                std::vector<double>& gradient);
  // Scores of owned atoms (owned, kReasons), on all processes together if there is an exchange; an atom is outside the
  // trust region where one is not at most 1.  Needs has_trust_region().
  void scores(const Graph& graph, const compactmlip_exchange* exchange, int threads, std::vector<double>& found);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace compactmlip
