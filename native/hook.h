#pragma once

// What llama.cpp calls while it builds a graph: it learns the FFNs of the model, and puts other weights and nodes into
// the graph.

#include "coreinfer.h"
#include "llama-ffn.h"

namespace coreinfer {

llama_ffn_hook hook_of(coreinfer_context & ctx);

} // namespace coreinfer
