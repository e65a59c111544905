// The library of the compiled operators, as this process has it.
#pragma once

#include <string>

#include "ghost_exchange.h"

namespace compactmlip {

// Loads the library of a folder unless the process, which may be Python, has one already; throws std::runtime_error.
compactmlip_set_exchange_type load_kernels(const std::string& folder);

}  // namespace compactmlip
