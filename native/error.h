#pragma once

#include "coreinfer.h"

#include <stdexcept>
#include <string>

namespace coreinfer {

// An error. The C functions turn it into a status and the text of coreinfer_last_error().
class Error : public std::runtime_error {
  public:
    Error(coreinfer_status code, const std::string & message) : std::runtime_error(message), status(code) {}

    coreinfer_status status;
};

} // namespace coreinfer
