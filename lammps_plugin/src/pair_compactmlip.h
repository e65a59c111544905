// pair_style compactmlip: a deployed model in LAMMPS.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "messages.h"
#include "model.h"
#include "pair.h"
#include "system.h"

namespace LAMMPS_NS {

class PairCompactMLIP : public Pair {
 public:
  // folder: where the library of the compiled operators is.
  PairCompactMLIP(class LAMMPS* lammps, std::string folder);
  ~PairCompactMLIP() override;

  void settings(int narg, char** arg) override;
  void coeff(int narg, char** arg) override;
  void init_style() override;
  double init_one(int, int) override { return cutoff_; }
  void compute(int eflag, int vflag) override;
  void* extract(const char* name, int& dim) override;
  double memory_usage() override;

  int pack_forward_comm(int n, int* atoms, double* buffer, int, int*) override;
  void unpack_forward_comm(int n, int first, double* buffer) override;
  int pack_reverse_comm(int n, int first, double* buffer) override;
  void unpack_reverse_comm(int n, int* atoms, double* buffer) override;

 private:
  void load(const char* path);
  void map_species();
  void check_special_bonds();
  void find_system();
  void evaluate();
  void add_energies();
  void add_forces();
  void check_finite();
  static void send(void* self, const compactmlip_rows* rows, int64_t count);
  static void send_back(void* self, const compactmlip_rows* rows, int64_t count, int64_t scalar);

  std::string folder_, path_, device_ = "cpu", precision_;
  int threads_ = 0;
  std::unique_ptr<compactmlip::Model> model_;
  double cutoff_ = 0;
  std::vector<int> species_of_type_;

  compactmlip::System system_;
  compactmlip::Messages messages_{system_};
  bigint neighbor_builds_ = -1;
  int known_local_ = -1, known_ghosts_ = -1;
  std::vector<double> energies_, gradient_;
};

}  // namespace LAMMPS_NS
