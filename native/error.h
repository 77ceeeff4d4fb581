#pragma once

#include "coreinfer.h"

#include <stdexcept>
#include <string>

namespace coreinfer {

// What the C functions turn into a status and coreinfer_last_error().
class Error : public std::runtime_error {
  public:
    Error(coreinfer_status code, const std::string & message) : std::runtime_error(message), status(code) {}

    coreinfer_status status;
};

} // namespace coreinfer
