// What follows pair_style compactmlip.
#pragma once

#include <limits>
#include <string>
#include <vector>

namespace compactmlip {

struct Settings {
  std::string device = "cpu";
  std::string precision;  // that the file must have; empty for any
  int threads = 0;        // 0: as LAMMPS has it

  int check_every = 0;  // steps between looks for atoms outside the trust region; 0: never
  bool stop_outside = false;

  int committee_every = 0;             // steps between comparisons with other models; 0: never
  std::vector<std::string> committee;  // their files
  double stop_deviation = std::numeric_limits<double>::infinity();  // of forces, eV/Angstrom
};

// Throws std::runtime_error with a message for the user.
Settings read_settings(const std::vector<std::string>& words);

}  // namespace compactmlip
