// What pair_style compactmlip tells of its own reliability: atoms outside the trust region, and how far a committee of
// models is apart.
#include <algorithm>
#include <cmath>
#include <limits>

#include "atom.h"
#include "comm.h"
#include "error.h"
#include "neighbor.h"
#include "pair_compactmlip.h"
#include "reduce.h"
#include "update.h"

using namespace LAMMPS_NS;

namespace {

double sum(const std::vector<double>& values) {
  double total = 0;
  for (const double value : values) total += value;
  return total;
}

bool is_outside(double score) { return !(score <= 1.0); }  // one that is not a number is outside

}  // namespace

// Whether this is a step to look; values of other steps lose their atoms when LAMMPS sorts them anew.
bool PairCompactMLIP::due(int every, PerAtom& property) {
  const size_t entries = atom->nlocal + 1;
  if (neighbor->ago == 0 || property.values.size() != entries)
    property.values.assign(entries, std::numeric_limits<double>::quiet_NaN());
  return property.trigger || (every && update->ntimestep % every == 0);
}

void PairCompactMLIP::check_trust() {
  std::vector<double> scores;
  try {
    members_[0].model->scores(system_.graph(), exchange(), settings_.threads, scores);
  } catch (const std::exception& failure) {
    error->one(FLERR, "pair_style compactmlip: {}: {}", members_[0].path, failure.what());
  }
  double outside = 0;
  std::fill(trust_score_.values.begin(), trust_score_.values.end(), 0.0);
  for (size_t node = 0; node < scores.size() / compactmlip::kReasons; node++) {
    const double* of_atom = &scores[compactmlip::kReasons * node];
    double worst = 0;
    for (int k = 0; k < compactmlip::kReasons; k++)
      if (!(of_atom[k] <= worst) && !std::isnan(worst)) worst = of_atom[k];
    trust_score_.values[system_.atom_of_node(node)] = worst;
    outside += is_outside(worst);
  }
  std::vector<double> total{outside};
  add_up(total);
  report(kOutside, total[0]);
  if (total[0] > 0 && (settings_.stop_outside || !has_warned_)) warn_of_atoms_outside(scores);
}

// All processes call it together.
void PairCompactMLIP::warn_of_atoms_outside(const std::vector<double>& scores) {
  constexpr int kReasons = compactmlip::kReasons;
  std::vector<double> counts(kReasons + 2);  // for each reason, atoms outside, atoms
  std::vector<double> example{-1};
  for (size_t node = 0; node < scores.size() / kReasons; node++) {
    bool outside = false;
    for (int k = 0; k < kReasons; k++) {
      const bool beyond = is_outside(scores[kReasons * node + k]);
      counts[k] += beyond, outside |= beyond;
    }
    counts[kReasons] += outside, counts[kReasons + 1] += 1;
    if (outside) example[0] = std::max(example[0], static_cast<double>(atom->tag[system_.atom_of_node(node)]));
  }
  add_up(counts);
  find_largest(example);
  std::string reasons;
  for (int k = 0; k < kReasons; k++)
    if (counts[k] > 0)
      reasons += fmt::format("{}{}: {:.0f}", reasons.empty() ? "" : ", ", compactmlip::kReasonNames[k], counts[k]);
  const std::string text =
      fmt::format("pair_style compactmlip: {:.0f} of {:.0f} atoms are outside the model's trust region in step {} ({}), "
                  "atom {:.0f} for instance; their forces may be wrong",
                  counts[kReasons], counts[kReasons + 1], update->ntimestep, reasons, example[0]);
  if (settings_.stop_outside) error->all(FLERR, "{}", text);
  has_warned_ = true;
  if (comm->me == 0) error->warning(FLERR, "{}. This is said once; 'compute pair' counts them in later steps", text);
}

void PairCompactMLIP::compare_committee() {
  std::vector<double> totals;  // energies by model, then the number of atoms
  deviation_.begin(system_.graph().nodes(), static_cast<int>(members_.size()));
  for (const Member& member : members_) {
    if (&member != &members_[0]) {
      use(member);
      evaluate(member);
    }
    deviation_.add(system_.graph(), gradient_);
    totals.push_back(sum(energies_));
  }
  if (comm->nprocs > 1) send_back(this, deviation_.rows(), 1, sizeof(double));

  const std::vector<double> found = deviation_.of_nodes(system_.graph().owned);
  std::fill(force_deviation_.values.begin(), force_deviation_.values.end(), 0.0);
  for (size_t node = 0; node < found.size(); node++)
    force_deviation_.values[system_.atom_of_node(node)] = found[node];
  totals.push_back(static_cast<double>(found.size()));
  totals.push_back(sum(found));
  add_up(totals);
  const double atoms = std::max(totals[members_.size()], 1.0);
  std::vector<double> largest{found.empty() ? 0.0 : *std::max_element(found.begin(), found.end())};
  find_largest(largest);
  report(kLargestDeviation, largest[0]);
  report(kMeanDeviation, totals.back() / atoms);
  totals.resize(members_.size());
  report(kEnergyDeviation, compactmlip::spread(totals) / atoms);
  if (largest[0] <= settings_.stop_deviation) return;

  std::vector<double> worst{-1};
  for (size_t node = 0; node < found.size(); node++)
    if (found[node] == largest[0]) worst[0] = static_cast<double>(atom->tag[system_.atom_of_node(node)]);
  find_largest(worst);
  error->all(FLERR, "pair_style compactmlip: forces of the committee differ by {:.4g} eV/Angstrom at atom {:.0f} in step "
             "{}, more than stop_deviation {:.4g}", largest[0], worst[0], update->ntimestep, settings_.stop_deviation);
}

// LAMMPS adds up what the processes have.
void PairCompactMLIP::report(Quantity quantity, double value) { pvector[quantity] = comm->me == 0 ? value : 0.0; }

void PairCompactMLIP::add_up(std::vector<double>& values) {
  try {
    compactmlip::add_up(world, comm->nprocs, values);
  } catch (const std::exception& failure) {
    error->one(FLERR, "pair_style compactmlip: {}", failure.what());
  }
}

void PairCompactMLIP::find_largest(std::vector<double>& values) {
  try {
    compactmlip::find_largest(world, comm->nprocs, values);
  } catch (const std::exception& failure) {
    error->one(FLERR, "pair_style compactmlip: {}", failure.what());
  }
}
