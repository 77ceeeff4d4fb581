#pragma once

// A buffer type for weights that llama.cpp does not read when it loads a model. Their tensors have addresses, but no
// memory.

#include "ggml-backend.h"

#include <cstddef>

namespace coreinfer {

// nullptr if the system is not Linux. The library owns the type.
ggml_backend_buffer_type_t unread_buffer_type();

bool is_unread(const ggml_tensor * tensor);

// The number of tensors in an unread buffer.
size_t n_tensors(ggml_backend_buffer_t buffer);

// Make an unread tensor writable. Its pages take memory once they are written. Throws Error if a tensor of the buffer
// is writable already, or if the system refuses.
void make_writable(const ggml_tensor * tensor);

// Return the memory of a writable tensor to the system. Another context may then make it writable.
void make_unread(const ggml_tensor * tensor);

// Return whole pages of memory to the system. They read as zeros afterwards.
void give_back(void * memory, size_t size);

} // namespace coreinfer
