#pragma once

// A buffer type to place weights of a model in that are not read at load: their tensors have addresses, and no
// memory.

#include "ggml-backend.h"

#include <cstddef>

namespace coreinfer {

// nullptr where the system has no way to reserve addresses alone.
ggml_backend_buffer_type_t unread_buffer_type();

bool is_unread(const ggml_tensor * tensor);

// Number of tensors in an unread buffer.
size_t n_tensors(ggml_backend_buffer_t buffer);

// Let an unread tensor be written to: it takes memory where it is. Throws Error if it is already, or if the system
// refuses.
void make_writable(const ggml_tensor * tensor);

// The end of that: its memory goes back to the system.
void make_unread(const ggml_tensor * tensor);

// Let the system have the pages of memory back; reading them gives zeros.
void give_back(void * memory, size_t size);

} // namespace coreinfer
