// What LAMMPS and a plugin exchange (LAMMPS developer guide, "Writing plugins").  Declared here because the
// header is not part of an installed LAMMPS.
#pragma once

extern "C" {

struct plugin_record {
  const char *version, *style, *name, *info, *author;
  void* (*create)(void* lammps);
  void* handle;
};
typedef void (*plugin_register)(plugin_record*, void* lammps);

__attribute__((visibility("default"))) void lammpsplugin_init(void* lammps, void* handle, void* register_function);

}  // extern "C"
