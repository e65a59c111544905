// pair_style compactmlip: a deployed model in LAMMPS.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "deviation.h"
#include "messages.h"
#include "model.h"
#include "pair.h"
#include "settings.h"
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
  void* extract_peratom(const char* name, int& columns) override;
  double memory_usage() override;

  int pack_forward_comm(int n, int* atoms, double* buffer, int, int*) override;
  void unpack_forward_comm(int n, int first, double* buffer) override;
  int pack_reverse_comm(int n, int first, double* buffer) override;
  void unpack_reverse_comm(int n, int* atoms, double* buffer) override;

 private:
  // What `compute pair` gives, from 1 on in LAMMPS.
  enum Quantity { kOutside, kLargestDeviation, kMeanDeviation, kEnergyDeviation, kQuantities };

  // A model, and its species of each atom type (-1 for none).
  struct Member {
    std::string path;
    std::unique_ptr<compactmlip::Model> model;
    std::vector<int> species_of_type;
  };

  // A value for each atom of this process, which `fix pair` reads and can ask for.
  struct PerAtom {
    const char *name, *trigger_name;
    int trigger = 0;
    std::vector<double> values;  // and one more, so that there is an address without atoms
  };

  void load(const char* path);
  std::vector<int> species_of_types(const Member& member);
  void check_special_bonds();
  void number_nodes();
  void use(const Member& member);
  void evaluate(const Member& member);
  void add_energies();
  void add_forces();
  void check_finite(const Member& member);
  const compactmlip_exchange* exchange();
  static void send(void* self, const compactmlip_rows* rows, int64_t count);
  static void send_back(void* self, const compactmlip_rows* rows, int64_t count, int64_t scalar);

  // pair_checks.cpp
  bool due(int every, PerAtom& property);
  void check_trust();
  void warn_of_atoms_outside(const std::vector<double>& scores);
  void compare_committee();
  void report(Quantity quantity, double value);
  void add_up(std::vector<double>& values);
  void find_largest(std::vector<double>& values);

  std::string folder_;
  compactmlip::Settings settings_;
  std::vector<Member> members_;  // forces are those of the first
  double cutoff_ = 0;            // the longest

  compactmlip::System system_;
  compactmlip::Messages messages_{system_};
  bigint neighbor_builds_ = -1;
  int known_local_ = -1, known_ghosts_ = -1;
  std::vector<double> energies_, gradient_;
  compactmlip_exchange exchange_{};

  compactmlip::Deviation deviation_;
  PerAtom trust_score_{"trust_score", "trust_score_flag"};
  PerAtom force_deviation_{"force_deviation", "force_deviation_flag"};
  bool has_warned_ = false;
};

}  // namespace LAMMPS_NS
