#pragma once

// The devices of ggml beside the processor, local ones and those of RPC servers.

#include "ggml-backend.h"

#include <cstdint>
#include <vector>

namespace coreinfer {

// All but processors, in the order in which llama.cpp gives them layers: those of RPC servers first. GPUs that share
// the main memory only if there are no others.
std::vector<ggml_backend_dev_t> devices();

// The place in devices() of the one whose memory such a buffer is in, -1 for main memory.
int32_t number_of_device(ggml_backend_buffer_type_t type);

// Whether weights go to this device through WeightsAhead.
bool copies_ahead(ggml_backend_dev_t device);

// Throws Error.
void add_rpc_server(const char * endpoint);

// Whether an RPC server that was added has gone.
bool rpc_lost();

} // namespace coreinfer
