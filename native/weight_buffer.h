#pragma once

// Buffer types to place weights of a model in: for those that are not read at load, which gives their tensors
// addresses and no memory, and for those that are to be as in the file.

#include "ggml-backend.h"

#include <cstddef>

namespace coreinfer {

// nullptr where the system has no way to reserve addresses alone.
ggml_backend_buffer_type_t unread_buffer_type();

bool is_unread(const ggml_tensor * tensor);

// Plain host memory, of a type that is not the CPU's own: llama.cpp then does not look for a faster one.
ggml_backend_buffer_type_t plain_buffer_type();

// Number of tensors in an unread buffer.
size_t n_tensors(ggml_backend_buffer_t buffer);

} // namespace coreinfer
