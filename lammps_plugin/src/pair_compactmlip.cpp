#include "pair_compactmlip.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "atom.h"
#include "comm.h"
#include "error.h"
#include "force.h"
#include "memory.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "update.h"
#include "utils.h"

using namespace LAMMPS_NS;

namespace {

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : " ") + word;
  return text;
}

}  // namespace

PairCompactMLIP::PairCompactMLIP(LAMMPS* lammps, std::string folder) : Pair(lammps), folder_(std::move(folder)) {
  restartinfo = 0;
  one_coeff = 1;
  manybody_flag = 1;
  single_enable = 0;
  no_virial_fdotr_compute = 1;
  // The share of an atom in the virial of a many-body potential is a convention; see compute().
  centroidstressflag = CENTROID_NOTAVAIL;
  nextra = kQuantities;
  pvector = new double[kQuantities]();
}

PairCompactMLIP::~PairCompactMLIP() {
  delete[] pvector;
  if (copymode || !allocated) return;
  memory->destroy(setflag);
  memory->destroy(cutsq);
}

// ------------------------------------------------------------------------------------------------- commands

void PairCompactMLIP::settings(int narg, char** arg) {
  if (strcmp(update->unit_style, "metal") != 0)
    error->all(FLERR, "pair_style compactmlip needs 'units metal' (eV and Angstrom), not 'units {}'", update->unit_style);
  try {
    settings_ = compactmlip::read_settings({arg, arg + narg});
  } catch (const std::exception& failure) {
    error->all(FLERR, "pair_style compactmlip: {}", failure.what());
  }
}

void PairCompactMLIP::coeff(int narg, char** arg) {
  const int types = atom->ntypes;
  if (narg != 3 + types)
    error->all(FLERR, "pair_coeff for compactmlip is '* * FILE' and a symbol or NULL for each of the {} atom types, "
               "but {} were given", types, std::max(0, narg - 3));
  if (!allocated) {
    allocated = 1;
    memory->create(setflag, types + 1, types + 1, "pair:setflag");
    memory->create(cutsq, types + 1, types + 1, "pair:cutsq");
    for (int i = 1; i <= types; i++)
      for (int j = i; j <= types; j++) setflag[i][j] = 0;
    map = new int[types + 1];
  }
  map_element2type(types, arg + 3);
  members_.clear();
  load(arg[2]);
  for (const std::string& path : settings_.committee) load(path.c_str());
  if (settings_.check_every && !members_[0].model->has_trust_region())
    error->all(FLERR, "pair_style compactmlip: 'check' compares with the model's trust region, and {} has none; use "
               "'compactmlip compile --calibration'", members_[0].path);
}

void PairCompactMLIP::load(const char* path) {
  Member member{path, nullptr, {}};
  try {
    member.model = std::make_unique<compactmlip::Model>(path, settings_.device, folder_);
  } catch (const std::exception& failure) {
    error->all(FLERR, "pair_style compactmlip: {}", failure.what());
  }
  const compactmlip::Model& model = *member.model;
  const std::string& wanted = settings_.precision;
  if (!wanted.empty() && wanted != model.precision())
    error->all(FLERR, "pair_style compactmlip: {} is compiled in {}, not in {}; use 'compactmlip compile --dtype {}'",
               path, model.precision(), wanted, wanted);
  if (comm->nprocs > 1 && !model.can_be_split())
    error->all(FLERR, "pair_style compactmlip: {} (compiled with --backend {}) runs on one process, and these are {}; "
               "compile it with --backend kernels", path, model.backend(), comm->nprocs);
  member.species_of_type = species_of_types(member);
  cutoff_ = members_.empty() ? model.cutoff() : std::max(cutoff_, model.cutoff());
  if (comm->me == 0)
    utils::logmesg(lmp, "compactmlip: {}, {}, cutoff {} Angstrom, {}\n", path, joined(model.species()), model.cutoff(),
                   model.precision());
  members_.push_back(std::move(member));
}

std::vector<int> PairCompactMLIP::species_of_types(const Member& member) {
  const auto& known = member.model->species();
  std::vector<int> found(atom->ntypes + 1, -1);
  std::vector<std::string> missing;
  for (int type = 1; type <= atom->ntypes; type++) {
    if (map[type] < 0) continue;
    const std::string symbol = elements[map[type]];
    const auto at = std::find(known.begin(), known.end(), symbol);
    if (at != known.end()) found[type] = static_cast<int>(at - known.begin());
    else if (std::find(missing.begin(), missing.end(), symbol) == missing.end()) missing.push_back(symbol);
  }
  if (!missing.empty())
    error->all(FLERR, "pair_style compactmlip: {} does not cover {}; it covers {}", member.path, joined(missing),
               joined(known));
  return found;
}

void PairCompactMLIP::init_style() {
  if (force->newton_pair == 0) error->all(FLERR, "pair_style compactmlip needs 'newton on'");
  if (atom->tag_enable == 0) error->all(FLERR, "pair_style compactmlip needs atom IDs ('atom_modify id yes')");
  check_special_bonds();
  if (comm->nprocs > 1) {
    int64_t bytes = settings_.committee_every ? 3 * sizeof(double) * members_.size() : 0;
    for (const Member& member : members_) bytes = std::max(bytes, member.model->message_bytes());
    comm_forward = comm_reverse = static_cast<int>((bytes + 7) / 8);
    // A hybrid style has asked its parts before they had models.
    force->pair->comm_forward = std::max(force->pair->comm_forward, comm_forward);
    force->pair->comm_reverse = std::max(force->pair->comm_reverse, comm_reverse);
  }
  known_local_ = known_ghosts_ = -1;
  has_warned_ = false;
  neighbor->add_request(this, NeighConst::REQ_FULL);
}

// Bonded neighbours, which a model must see, are left out of neighbour lists by default.
void PairCompactMLIP::check_special_bonds() {
  if (atom->molecular == Atom::ATOMIC || atom->nbonds == 0) return;
  for (int k = 1; k <= 3; k++)
    if (force->special_lj[k] == 0.0 && force->special_coul[k] == 0.0)
      error->all(FLERR, "pair_style compactmlip needs all neighbors of an atom, bonded ones as well: use "
                 "'special_bonds lj/coul 1.0 1.0 1.0'");
}

void* PairCompactMLIP::extract(const char* name, int& dim) {
  dim = 0;
  if (strcmp(name, "cutoff") == 0) return &cutoff_;
  if (strcmp(name, trust_score_.trigger_name) == 0 && settings_.check_every) return &trust_score_.trigger;
  if (strcmp(name, force_deviation_.trigger_name) == 0 && settings_.committee_every) return &force_deviation_.trigger;
  return nullptr;
}

void* PairCompactMLIP::extract_peratom(const char* name, int& columns) {
  columns = 0;
  for (PerAtom* property : {&trust_score_, &force_deviation_})
    if (strcmp(name, property->name) == 0) return property->values.data();
  return nullptr;
}

double PairCompactMLIP::memory_usage() {
  return Pair::memory_usage() + system_.bytes() +
         static_cast<double>((energies_.capacity() + gradient_.capacity()) * sizeof(double));
}

// ----------------------------------------------------------------------------------------------- evaluation

void PairCompactMLIP::compute(int eflag, int vflag) {
  ev_init(eflag, vflag);
  number_nodes();
  use(members_[0]);
  if (due(settings_.check_every, trust_score_)) check_trust();
  evaluate(members_[0]);
  add_energies();
  add_forces();
  if (due(settings_.committee_every, force_deviation_)) compare_committee();
}

void PairCompactMLIP::number_nodes() {
  const bool same = neighbor->ago > 0 && neighbor_builds_ == neighbor->ncalls && known_local_ == atom->nlocal &&
                    known_ghosts_ == atom->nghost;
  if (!same) {
    system_.number_nodes(*atom, members_[0].species_of_type);
    neighbor_builds_ = neighbor->ncalls, known_local_ = atom->nlocal, known_ghosts_ = atom->nghost;
  }
  if (comm->nprocs == 1 && system_.has_ghosts())
    error->one(FLERR, "pair_style compactmlip: a ghost atom belongs to no atom; are atom IDs unique?");
}

// The graph is that of this model from here on.
void PairCompactMLIP::use(const Member& member) {
  if (members_.size() > 1) system_.set_species(*atom, member.species_of_type);
  if (!system_.find_edges(*atom, *list, member.model->cutoff())) {
    const int64_t last = system_.graph().edges() - 1;
    error->one(FLERR, "pair_style compactmlip: atoms {} and {} lie on top of each other in step {}",
               atom->tag[system_.center(last)], atom->tag[system_.neighbor(last)], update->ntimestep);
  }
  exchange_ = {system_.graph().owned, system_.graph().nodes(), this, &send, &send_back};
}

void PairCompactMLIP::evaluate(const Member& member) {
  try {
    member.model->evaluate(system_.graph(), exchange(), settings_.threads, energies_, gradient_);
  } catch (const std::exception& failure) {
    error->one(FLERR, "pair_style compactmlip: {}: {}", member.path, failure.what());
  }
  check_finite(member);
}

// An atom whose energy or force is not finite stops the run: integrating it would spoil all others.  The processes agree
// on it first, so that all stop with the same message; of one that stops alone, mpirun may lose what it has said.
void PairCompactMLIP::check_finite(const Member& member) {
  const auto finite = [](double value) { return std::isfinite(value); };
  int bad = -1;
  const auto energy = std::find_if_not(energies_.begin(), energies_.end(), finite);
  const auto slope = std::find_if_not(gradient_.begin(), gradient_.end(), finite);
  if (energy != energies_.end()) bad = system_.atom_of_node(energy - energies_.begin());
  else if (slope != gradient_.end()) bad = system_.center((slope - gradient_.begin()) / 3);
  // ID and type of the atom in one number, exact up to 2^53.
  const int64_t types = atom->ntypes + 1, mine = bad < 0 ? -1 : int64_t{atom->tag[bad]} * types + atom->type[bad];
  std::vector<double> found{static_cast<double>(mine)};
  find_largest(found);
  if (found[0] < 0.0) return;
  const int64_t both = static_cast<int64_t>(found[0]);
  error->all(FLERR, "pair_style compactmlip: {} gives an energy or force that is not finite at atom {} ({}) in "
             "step {}; the structure may be far from what the model knows (atoms very close, time step too long)",
             member.path, both / types, elements[map[both % types]], update->ntimestep);
}

void PairCompactMLIP::add_energies() {
  if (!eflag_either) return;
  for (size_t node = 0; node < energies_.size(); node++) {
    if (eflag_global) eng_vdwl += energies_[node];
    if (eflag_atom) eatom[system_.atom_of_node(node)] += energies_[node];
  }
}

// Forces and virial from the gradient of the energy with respect to edge vectors.  Each end of an edge gets half of the
// edge's virial.
void PairCompactMLIP::add_forces() {
  double** f = atom->f;
  const compactmlip::Graph& graph = system_.graph();
  for (int64_t e = 0; e < graph.edges(); e++) {
    const int i = system_.center(e), j = system_.neighbor(e);
    const double *g = &gradient_[3 * e], *r = &graph.vectors[3 * e];
    for (int k = 0; k < 3; k++) {
      f[i][k] += g[k];
      f[j][k] -= g[k];
    }
    if (!vflag_either) continue;
    const double v[6] = {-r[0] * g[0], -r[1] * g[1], -r[2] * g[2], -r[0] * g[1], -r[0] * g[2], -r[1] * g[2]};
    for (int k = 0; k < 6; k++) {
      if (vflag_global) virial[k] += v[k];
      if (vflag_atom) vatom[i][k] += 0.5 * v[k], vatom[j][k] += 0.5 * v[k];
    }
  }
}

// ------------------------------------------------------------------------------------------- communication

const compactmlip_exchange* PairCompactMLIP::exchange() { return comm->nprocs > 1 ? &exchange_ : nullptr; }

void PairCompactMLIP::send(void* self, const compactmlip_rows* rows, int64_t count) {
  auto* pair = static_cast<PairCompactMLIP*>(self);
  pair->comm->forward_comm(pair, pair->messages_.begin(rows, count, 0));
}

void PairCompactMLIP::send_back(void* self, const compactmlip_rows* rows, int64_t count, int64_t scalar) {
  auto* pair = static_cast<PairCompactMLIP*>(self);
  pair->comm->reverse_comm(pair, pair->messages_.begin(rows, count, scalar));
}

int PairCompactMLIP::pack_forward_comm(int n, int* atoms, double* buffer, int, int*) {
  return messages_.pack(n, atoms, buffer);
}
void PairCompactMLIP::unpack_forward_comm(int n, int first, double* buffer) { messages_.unpack(n, first, buffer); }
int PairCompactMLIP::pack_reverse_comm(int n, int first, double* buffer) {
  return messages_.pack_reverse(n, first, buffer);
}
void PairCompactMLIP::unpack_reverse_comm(int n, int* atoms, double* buffer) {
  messages_.add_reverse(n, atoms, buffer);
}

// --------------------------------------------------------------------------------------------------- entry

extern "C" __attribute__((visibility("default"))) void* compactmlip_make_pair(void* lammps, const char* folder) {
  return static_cast<Pair*>(new PairCompactMLIP(static_cast<LAMMPS*>(lammps), folder));
}
