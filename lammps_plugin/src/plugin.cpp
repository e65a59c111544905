// What LAMMPS loads at its start: registers pair_style compactmlip, and loads the library that knows torch, which
// takes longer, only when a pair style is made.
#include <dlfcn.h>

#include <string>

#include "error.h"
#include "lammps.h"
#include "plugin_abi.h"

using LAMMPS_NS::LAMMPS;

namespace {

constexpr const char* kMend = "Run 'compactmlip build' in the Python environment that has this LAMMPS, or "
                              "'compactmlip build --lammps-include DIR' for one that you built";

std::string folder() {
  Dl_info found;
  if (!dladdr(reinterpret_cast<void*>(&folder), &found) || !found.dli_fname) return ".";
  const std::string path = found.dli_fname;
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "." : path.substr(0, slash);
}

// Headers of another version describe objects of another shape.
void check_lammps(LAMMPS* lammps) {
  constexpr int built_for = COMPACTMLIP_LAMMPS_VERSION;
  if (built_for && lammps->num_ver != built_for)
    lammps->error->all(FLERR, "pair_style compactmlip was built for LAMMPS {}, and this is {}. {}", built_for,
                       lammps->num_ver, kMend);
  using Setting = int (*)(void*, const char*);
  if (auto setting = reinterpret_cast<Setting>(dlsym(RTLD_DEFAULT, "lammps_extract_setting")))
    if (setting(lammps, "tagint") != static_cast<int>(sizeof(LAMMPS_NS::tagint)))
      lammps->error->all(FLERR, "pair_style compactmlip was built for other sizes of integers than this LAMMPS has; "
                                "use 'compactmlip build --lammps-include DIR' with or without --bigbig");
}

void* make_pair(void* instance) {
  auto* lammps = static_cast<LAMMPS*>(instance);
  check_lammps(lammps);
  const std::string path = folder() + "/libcompactmlip_pair.so";
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  using Create = void* (*)(void*, const char*);
  auto create = library ? reinterpret_cast<Create>(dlsym(library, "compactmlip_make_pair")) : nullptr;
  if (!create) {
    const char* reason = dlerror();
    lammps->error->all(FLERR, "pair_style compactmlip cannot be loaded: {}. {}", reason ? reason : path, kMend);
  }
  return create(lammps, folder().c_str());
}

}  // namespace

void lammpsplugin_init(void* lammps, void* handle, void* register_function) {
  // Other versions are refused above, when the style is used; LAMMPS would warn at every start.
  plugin_record record{static_cast<LAMMPS*>(lammps)->version,
                       "pair",
                       "compactmlip",
                       "compactmlip models of interatomic potentials",
                       "compactmlip developers",
                       &make_pair,
                       handle};
  reinterpret_cast<plugin_register>(register_function)(&record, lammps);
}
