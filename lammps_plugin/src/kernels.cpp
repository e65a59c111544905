#include "kernels.h"

#include <dlfcn.h>
#include <link.h>

#include <stdexcept>

namespace compactmlip {
namespace {

constexpr const char* kName = "libcompactmlip_kernels.so";

// Path of the library if it is loaded: operators can be registered once only.
std::string loaded_path() {
  std::string found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* to) {
        const std::string path = info->dlpi_name ? info->dlpi_name : "";
        const size_t slash = path.rfind('/');
        if (path.substr(slash == std::string::npos ? 0 : slash + 1) != kName) return 0;
        *static_cast<std::string*>(to) = path;
        return 1;
      },
      &found);
  return found;
}

}  // namespace

compactmlip_set_exchange_type load_kernels(const std::string& folder) {
  std::string path = loaded_path();
  if (path.empty()) path = folder + "/" + kName;
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL | RTLD_NODELETE);
  void* symbol = library ? dlsym(library, "compactmlip_set_exchange") : nullptr;
  if (!symbol) {
    const char* reason = dlerror();
    throw std::runtime_error("it needs the compiled operators, which cannot be loaded (" +
                             std::string(reason ? reason : path) + "); run 'compactmlip build'");
  }
  return reinterpret_cast<compactmlip_set_exchange_type>(symbol);
}

}  // namespace compactmlip
