#pragma once

// A device of ggml that is the processor, with queues as a GPU has them: what is enqueued runs later, each queue in its
// order, and between queues in any order that events allow.

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstddef>
#include <vector>

namespace test {

// The only one. Its memory is no main memory to ggml. It takes products of at least 32 columns from the CPU.
ggml_backend_dev_t pretend_device();

// Begin anew: queues interleave as this seed has it, and no bytes have been copied.
void pretend_begin(unsigned seed);

// Bytes that each queue has set, in the order in which the queues were made.
const std::vector<size_t> & pretend_bytes();

} // namespace test
